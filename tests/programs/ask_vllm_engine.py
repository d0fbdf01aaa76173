"""`python tests/programs/ask_vllm_engine.py FOLDER...`: the evaluation's engine `vllm` on what `make_models.py` made.

For each FOLDER (OUT/FAMILY/packed or .../plain) vLLM and this package's own runner are asked about the image beside it,
about two images and about none. Prints a line each; exits with 1 where vLLM's prompt is not this package's, or where
the answer about the image begins otherwise or its log-probability is further off than bf16 rounding makes it (random
weights have near ties: later tokens, and answers to a prompt without an image, may part). Needs vLLM and this package's
needs in one environment, and PYTHONPATH=workflow.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from grace.evaluate.engine_vllm import VllmRunner
from grace.evaluate.question import Question, turns
from grace.evaluate.runner import Runner
from grace.models import load_model, load_processor

TOLERANCE = 0.5  # of an answer's log-probability, over eight tokens in bf16


def ask(folder: Path) -> bool:
    text = json.loads((folder.parent / "expected.json").read_text())["question"]
    image = (folder.parent / "image.png").read_bytes()

    def question(name: str, images: tuple[bytes, ...]) -> Question:
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        return Question(name, turns([{"role": "user", "content": parts}]), images, 8)

    asked = [question("one", (image,)), question("two", (image, image)), question("none", ())]
    ours = Runner(load_model(folder), load_processor(folder), 4).answer(asked)
    with VllmRunner.of_folder(folder, 4) as runner:
        theirs = runner.answer(asked)
    for one, other, of in zip(ours, theirs, asked, strict=True):
        print(f"{folder}, {of.id}: {other.text!r} {other.logprob:.3f}; own runner {one.text!r} {one.logprob:.3f}")
    one, other = ours[0], theirs[0]
    return one.text[:1] == other.text[:1] and abs(one.logprob - other.logprob) < TOLERANCE


if __name__ == "__main__":
    sys.exit(0 if all([ask(Path(name)) for name in sys.argv[1:]]) else 1)
