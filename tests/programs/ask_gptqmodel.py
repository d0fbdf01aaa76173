"""`python tests/programs/ask_gptqmodel.py FOLDER...`: ask transformers with gptqmodel about the image beside an export.

Each FOLDER is OUT/FAMILY/awq or .../gptq that `make_models.py` made. Checks that exactly the decoder's linears are
quantised ones, that every other weight is the student's, and the answer; exits with 1 where one is not.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from chat_models import FAMILIES

from grace.families.base import LINEARS

TOLERANCE = 0.2  # of log-probabilities: fp16 here, fp32 in `expected.json`


def ask(folder: Path) -> bool:
    """Whether it loads as meant and answers as the student does."""
    expected = json.loads((folder.parent / "expected.json").read_text())
    student = AutoModelForImageTextToText.from_pretrained(folder.parent / "student", dtype=torch.float32).state_dict()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float16, device_map="cpu").eval()
    quantised = {name for name, module in model.named_modules() if hasattr(module, "qweight")}
    wanted = {
        f"model.language_model.layers.{layer}.{part}"
        for layer in range(model.config.get_text_config().num_hidden_layers)
        for part in LINEARS
    }
    kept = {name: value for name, value in model.state_dict().items() if name in student}
    equal = all(torch.equal(value, student[name].half()) for name, value in kept.items())
    whole = len(kept) == len(student) - len(wanted)
    processor = FAMILIES[expected["family"]]()[1]
    parts = [
        {"type": "image", "image": Image.open(folder.parent / "image.png")},
        {"type": "text", "text": expected["question"]},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt"
    )  # fmt: skip
    inputs = {name: value.half() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.no_grad():
        first = model(**inputs).logits[0, -1].float().log_softmax(-1)
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    top = first.topk(5).indices
    distance = (first - torch.tensor(expected["first"]))[top].abs().max().item()
    blind = (first - torch.tensor(expected["other_image"]))[top].abs().max().item()
    print(
        f"{folder}: quantised {len(quantised)} linears (the decoder's {len(wanted)}: {quantised == wanted}), "
        f"{len(kept)} other weights equal: {equal and whole}, tokens equal: {tokens.tolist() == expected['tokens']}, "
        f"log-probabilities within {distance:.3f} ({blind:.3f} from another image's)"
    )
    return quantised == wanted and equal and whole and distance < TOLERANCE < blind


if __name__ == "__main__":
    sys.exit(0 if all([ask(Path(name)) for name in sys.argv[1:]]) else 1)
