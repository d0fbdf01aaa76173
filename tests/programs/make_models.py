"""`python tests/programs/make_models.py OUT [MODEL...]`: tiny models in every form, and what they should answer.

MODEL is a family (its decoder 64 wide, 4 bits in groups of 32), FAMILY-wide (256, groups of 128), FAMILY-int8 or, of a
Qwen, FAMILY-tied; without one, every family of the first two kinds. OUT/MODEL/ gets `student`, `plain` (without its
codes: vLLM reads every *.safetensors of a folder), `packed`, `awq`, `gptq`, `gguf` as far as they hold its width,
`image.png` and `expected.json`: the question, the first tokens of the student's greedy answer, and the
log-probabilities [vocab] of the first one, for this image and another.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from chat_models import FAMILIES, SIDES, blocks, talking_student

from grace.quant.export import export
from grace.quant.pack import pack

QUESTION = "what is in this image?"
KINDS = {"": {}, "-wide": {"group_size": 128, "width": 256}, "-int8": {"bits": 8}, "-tied": {"tied": True}}


def answer(model, processor, image):
    """Log-probabilities [vocab] of the first token, and eight tokens."""
    parts = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt"
    )  # fmt: skip
    with torch.no_grad():
        first = model(**inputs).logits[0, -1].log_softmax(-1)
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return first.tolist(), tokens.tolist(), inputs["input_ids"].shape[1]


def make(folder: Path, family: str, settings: dict) -> None:
    talking_student(folder / "student", family, **settings)
    shutil.copytree(folder / "student", folder / "plain", ignore=shutil.ignore_patterns("quantization.*"))
    pack(folder / "student", folder / "packed")
    for format in ("awq", "gptq", "gguf") if settings.get("bits", 4) == 4 else ("gptq",):
        export(folder / "packed", format, folder / format)
    image = blocks(SIDES[family])
    image.save(folder / "image.png")
    processor = FAMILIES[family]()[1]
    model = AutoModelForImageTextToText.from_pretrained(folder / "student", dtype=torch.float32)
    first, tokens, length = answer(model, processor, image)
    other, _, _ = answer(model, processor, blocks(SIDES[family], 5))
    about = {"family": family, "question": QUESTION, "prompt_tokens": length, "tokens": tokens}
    (folder / "expected.json").write_text(json.dumps(about | {"first": first, "other_image": other}))
    print(f"{folder}: made")


def main(out: Path, models: list[str]) -> None:
    for name in models or [family + kind for kind in ("", "-wide") for family in FAMILIES]:
        kind = next((kind for kind in KINDS if kind and name.endswith(kind)), "")
        make(out / name, name.removesuffix(kind), KINDS[kind])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
