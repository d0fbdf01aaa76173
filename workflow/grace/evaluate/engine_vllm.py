"""The engine `vllm`: vLLM computes the answers; what is asked, of which rows and how it counts stays this package's.

vLLM is given training's own tokens with one visual token for each image, which it expands itself, and the decoded
images. Its expanded prompt comes back with every answer and is held against this package's, so that another geometry of
the image processor, a template of vLLM's own or a lost BOS stops the evaluation instead of changing it. It opens the
folder with its own processor class, whose fast image processor may change pixels by a level of 255.
"""

import gc
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from grace.benchmarks.extraction import Answer
from grace.data.examples import Tokeniser
from grace.errors import GraceError
from grace.evaluate.image_encoder import ImageEncoder
from grace.evaluate.question import Question
from grace.evaluate.runner import Runner
from grace.families.files import end_tokens
from grace.files import read_json
from grace.models import load_processor
from grace.world import this_world

AT_ONCE = 256  # questions handed over together; vLLM forms its own batches
LONGEST = (
    32_768  # tokens of prompt and answer; a model's own limit, where it is larger, would take the memory of its cache
)
IMAGES = 8  # in one prompt
# Set, not left out: its processes import what started them, and `grace.arithmetic` fills what is not set. torch ignores
# `auto`.
UNLIMITED = {"ONEDNN_MAX_CPU_ISA": "DEFAULT", "ATEN_CPU_CAPABILITY": "auto", "MKL_CBWR": "AUTO"}


class VllmRunner(Runner):
    """A `Runner` whose answers are vLLM's; it has no model in this process and scores no plain text.

    Entropies are NaN: vLLM gives the likeliest tokens' probabilities, not the distribution.

    Args:
        engine: vllm.LLM of the folder.
        processor: the folder's.
        ends: tokens that end an answer.
        batch: as `Runner`'s, at least `AT_ONCE`.
    """

    def __init__(self, engine: Any, processor: Any, ends: Sequence[int], batch: int = AT_ONCE) -> None:
        self.engine, self.processor, self.tokenizer = engine, processor, processor.tokenizer
        self.tokeniser = Tokeniser(processor)
        self.stops = list(ends)
        self.batch, self.max_new_tokens = max(batch, AT_ONCE), 8
        self.image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        self.encoder = ImageEncoder(None, processor, {}, workers=0)
        self.log, self.known, self.world = None, {}, this_world()

    @classmethod
    @contextmanager
    def of_folder(cls, folder: Path, batch: int) -> Iterator["VllmRunner"]:
        """vLLM over a model's folder, plain or packed; it is ended with the block.

        Raises:
            GraceError: vLLM does not load it.
        """
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ["VLLM_CPU_INT4_W4A8"] = "0"  # where a processor has AMX, activations would be rounded to 8 bits
        from vllm import LLM  # type: ignore[import-not-found]  # not among the pipeline's packages

        processor, config = load_processor(folder), read_json(folder / "config.json")
        own = (config.get("text_config") or config).get("max_position_embeddings", LONGEST)
        try:
            with _every_instruction():
                engine = LLM(
                    str(folder), seed=0, max_model_len=min(own, LONGEST), trust_remote_code=False,
                    limit_mm_per_prompt={"image": IMAGES, "video": 0},
                )  # fmt: skip
        except Exception as error:  # whatever its loaders and compilers raise
            reason = " ".join((str(error).strip() or type(error).__name__).split())[:300]
            raise GraceError(f"{folder}: vLLM does not load it ({reason}); set evaluation.engine: grace") from error
        try:
            yield cls(engine, processor, _ends(folder, processor), batch)
        finally:
            engine.llm_engine.engine_core.shutdown()
            del engine
            gc.collect()

    def _answer(self, questions: Sequence[Question], prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
        from vllm import SamplingParams  # type: ignore[import-not-found]

        laid = [(question.prompt, [1] * len(question.images)) for question in questions]
        asked: list[dict[str, Any]] = []
        for question, (ids, _) in zip(questions, self.tokeniser.template.tokens(laid, prompt=True), strict=True):
            images = [self.encoder._open(question, image) for image in question.images]
            asked.append({"prompt_token_ids": ids, **({"multi_modal_data": {"image": images}} if images else {})})
        how = SamplingParams(temperature=0.0, max_tokens=new_tokens, logprobs=0, stop_token_ids=self.stops)
        found = self.engine.generate(asked, how, use_tqdm=False)
        for question, ids, each in zip(questions, prompts, found, strict=True):
            if list(each.prompt_token_ids) != list(ids):
                raise GraceError(
                    f"question {question.id}: vLLM read {len(each.prompt_token_ids)} tokens of prompt that are not "
                    f"this package's {len(ids)}; set evaluation.engine: grace"
                )
        return [self._as_answer(each.outputs[0]) for each in found]

    def _as_answer(self, output: Any) -> Answer:
        tokens = list(output.token_ids)
        logprob = sum(entry[token].logprob for token, entry in zip(tokens, output.logprobs, strict=True))
        return Answer(self.tokenizer.decode(tokens, skip_special_tokens=True).strip(), logprob, math.nan)

    def score(self, pairs: Any) -> Any:
        raise GraceError("evaluation.language: engine `vllm` scores no plain text; set evaluation.engine: grace")


@contextmanager
def _every_instruction() -> Iterator[None]:
    """Without this package's limits on a CPU's instructions: vLLM's 16-bit products need more;
    its processes start within.
    """
    limits = {name: os.environ.get(name) for name in UNLIMITED}
    os.environ.update(UNLIMITED)
    try:
        yield
    finally:
        for name, limit in limits.items():
            del os.environ[name]
            os.environ.update({name: limit} if limit is not None else {})


def _ends(folder: Path, processor: Any) -> list[int]:
    """End tokens as transformers' generation takes them from the folder."""
    ends: list[int] = []
    if (folder / "generation_config.json").is_file():
        ends = end_tokens(GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id)
    return sorted(ends) or [processor.tokenizer.eos_token_id]
