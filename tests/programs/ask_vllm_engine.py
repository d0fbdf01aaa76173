"""`python tests/programs/ask_vllm_engine.py FOLDER...`: the evaluation's engine `vllm` on folders that `make_models.py` made.

For each FOLDER (OUT/FAMILY/packed or .../plain) the engine is asked about the image beside it, about another and about none.
Prints one line a folder; exits with 1 where the first tokens are not the student's own, or where vLLM's prompt is not
this package's. Needs vLLM and this package's needs in one environment, and PYTHONPATH=workflow.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from grace.evaluate.engine_vllm import VllmRunner
from grace.evaluate.question import Question, turns


def ask(folder: Path) -> bool:
    expected = json.loads((folder.parent / "expected.json").read_text())
    image = (folder.parent / "image.png").read_bytes()

    def question(name: str, images: tuple[bytes, ...]) -> Question:
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": expected["question"]}]
        return Question(name, turns([{"role": "user", "content": parts}]), images, 8)

    with VllmRunner.of_folder(folder, 4) as runner:
        asked = [question("one", (image,)), question("two", (image, image)), question("none", ())]
        one, two, none = runner.answer(asked)
        wanted = runner.tokenizer.decode(expected["tokens"], skip_special_tokens=True).strip()
    print(f"{folder}: {one.text!r} (the student's {wanted!r}), two images {two.text!r}, none {none.text!r}")
    return bool(wanted) and one.text.split()[:1] == wanted.split()[:1]


if __name__ == "__main__":
    sys.exit(0 if all([ask(Path(name)) for name in sys.argv[1:]]) else 1)
