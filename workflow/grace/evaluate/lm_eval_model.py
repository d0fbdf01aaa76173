"""Our batched runner as a model of lm-eval, for its tasks about images and its language tasks."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from grace.benchmarks.extraction import Answer
from grace.data.conversations import Message
from grace.errors import GraceError
from grace.evaluate.runner import Question, Runner, turns

IMAGE = "<image>"  # lm-eval's own placeholder


class RunnerLM(TemplateLM):
    """Our runner as a model of lm-eval: answers about images, and likelihoods of text for its language tasks.

    Attributes:
        images: encoded image by question id; set before each task.
        said: what was rendered, by its text: lm-eval hands texts around, and a text does not say what is control.
        answers: the last task's answers by `doc_id`, with what lm-eval does not keep.
    """

    MULTIMODAL = True

    def __init__(self, runner: Runner, advance: Callable[[int], None] = lambda steps: None) -> None:
        super().__init__()
        self.runner, self.tokenizer, self.advance = runner, runner.tokenizer, advance
        self._render = cache(self._render)  # the same question is asked of many images
        self.images: Mapping[str, bytes] = {}
        self.said: dict[str, tuple[Message, ...]] = {}
        self.answers: dict[int, Answer] = {}

    @property
    def eot_token_id(self) -> int:
        return int(self.runner.ends[0])

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Longest text in tokens."""
        return self.runner.model.config.text_config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """lm-eval's messages in the processor's template; `<image>` in a message becomes an image."""
        return self._render(tuple((message["role"], message["content"]) for message in chat_history))

    def _render(self, messages: tuple[tuple[str, str], ...]) -> str:
        said = []
        for role, content in messages:
            before, image, after = content.partition(IMAGE)
            parts = [{"type": "text", "text": before}] if before else []
            parts += [{"type": "image"}] if image else []
            said.append({"role": role, "content": [*parts, {"type": "text", "text": after}]})
        text = self.runner.render(said)
        self.said[text] = turns(said)
        return text

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers in the order of `requests`, each about one image, cut at the task's stop strings."""
        questions = []
        for request in requests:
            if len(request.args) < 3:
                raise GraceError(
                    f"lm-eval task {request.task_name}: has no images; this model generates about images only"
                )
            name = request.args[2]["visual"][0]
            if request.args[0] not in self.said:
                raise GraceError(
                    f"lm-eval task {request.task_name}: changes rendered prompts; run it with --apply_chat_template"
                )
            prompt, longest = self.said[request.args[0]], request.args[1].get("max_gen_toks")
            questions.append(Question(name, prompt, (self.images[name],), longest))
        found = self.runner.answer(questions, self.advance)
        self.answers = {request.doc_id: answer for request, answer in zip(requests, found, strict=True)}
        texts = []
        for request, answer in zip(requests, found, strict=True):
            text = answer.text
            for stop in request.args[1].get("until", []):
                text = text.split(stop)[0]
            texts.append(text)
        return texts

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        written = bool(self.tokenizer.bos_token) and string.startswith(self.tokenizer.bos_token)
        special = not written if add_special_tokens is None else add_special_tokens
        return self.tokenizer(string, add_special_tokens=special)["input_ids"]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            whole = (context + continuation)[-(self.max_length + 1) :]
            kept = min(len(continuation), len(whole) - 1)
            pairs.append((whole[:-kept], whole[-kept:]))
        return self.runner.score(pairs)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood (nats) of whole texts, in windows of the model's length that each predict new tokens once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, rolling):
                windows.append(window)
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self.runner.score(windows), strict=True):
            totals[owner] += logprob
        return totals
