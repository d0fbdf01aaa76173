"""Model cards of packed folders and exports: what it is, how to ask it about an image, how it was made, how well it
does.

Packing keeps what a card says in `card.json`, so that the card of an export, and the one written after an evaluation
(`grace card`), tell the same.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from grace import __version__
from grace.errors import GraceError, reason
from grace.families.files import read_config
from grace.files import read_json
from grace.nested import flatten
from grace.quant.student import DESCRIPTION, TENSORS, StoredQuantization

ABOUT = "card.json"
METHODS = {
    "lsq": "quantisation-aware training with learned step sizes",
    "rtn": "round-to-nearest, without training",
    "awq": "AWQ, without training",
    "gptq": "GPTQ, without training",
    "release": "the authors of GRACE, whose released checkpoint this is, code by code",
}
FORMATS = {
    "pack-quantized": ("compressed-tensors `pack-quantized`", "compressed-tensors"),
    "awq": ("AWQ, GEMM layout, zero point 8", "awq"),
    "gptq": ("GPTQ, symmetric, no activation order", "gptq"),
    "gguf": ("GGUF, Q4_0, with a vision file (`mmproj`)", "gguf"),
}
_QUESTION = "What is in this image?"


@dataclass(frozen=True)
class Origin:
    """What whoever publishes a model knows and its folder does not.

    Attributes:
        licence: a hub's identifier, such as apache-2.0 or llama2.
        base_model: hub id of the model that was quantised.
        datasets: hub ids of the training data.
        scores: {benchmark: (score in points, standard error or None)}.
    """

    licence: str | None = None
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    scores: dict[str, tuple[float, float | None]] = field(default_factory=dict)


def about(stored: StoredQuantization, config: dict, manifest: dict, source: str | None) -> dict[str, Any]:
    """What `card.json` keeps.

    Args:
        stored: the student's codes.
        config: the packed config.json.
        manifest: the student's manifest: what its maker recorded (`run`, `identity`) and its files' hashes.
        source: SHA-256 of the student's files, `contents_hash`.
    """
    hashes = {
        name: entry["sha256"] for name, entry in manifest.get("files", {}).items() if name in (TENSORS, DESCRIPTION)
    }
    if source:
        hashes = {"the student's files": source, **hashes}
    recipe = {key: value for key, value in manifest.items() if key != "files"}
    return {
        "architecture": next(iter(config.get("architectures") or ()), "not named in config.json"),
        "bits": stored.bits,
        "group_size": stored.group_size,
        "method": stored.method,
        "linears": len(stored.layers),
        "recipe": recipe,
        "hashes": hashes,
    }


def scores_of(metrics: Any, row: str) -> dict[str, tuple[float, float | None]]:
    """Scores of a row such as `grace.int4` of an experiment's metrics.json, and the average with its standard error.

    Raises:
        GraceError: `row` is not in the file.
    """
    known = metrics.get("scores") if isinstance(metrics, dict) else None
    found = known = known if isinstance(known, dict) else {}
    for name in row.split("."):
        found = found.get(name, {}) if isinstance(found, dict) else {}
    if "benchmarks" not in found:
        rows = [f"{recipe}.{width}" for recipe, widths in known.items() for width in widths]
        raise GraceError(f"--row {row}: not in the metrics; there are {', '.join(sorted(rows)) or 'no scores'}")
    scores: dict[str, tuple[float, float | None]] = {name: (value, None) for name, value in found["benchmarks"].items()}
    if "average" in found:
        scores["average"] = (found["average"], found.get("average_stderr"))
    return scores


def model_card(said: dict[str, Any], form: str, origin: Origin | None = None) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        said: `about`'s dictionary.
        form: one of FORMATS.
    """
    origin = origin or Origin()
    bits, group = said["bits"], said["group_size"]
    snippets = _snippets(form)
    groups = f"groups of {group} along the input" if group > 0 else "one group per output"
    parts = [
        f"---\n{yaml.safe_dump(_front(form, origin), sort_keys=False)}---",
        f"# {said['architecture']}, INT{bits} ({said['method']})",
        f"{said['linears']} linears of the language model hold signed {bits}-bit codes in {groups}, one step size "
        f"each; head, projector and vision tower are in 16 bits. Made by {METHODS.get(said['method'], said['method'])} "
        f"(grace-pipeline {__version__}, after GRACE, arXiv 2601.22709). Format: {FORMATS[form][0]}. "
        "It needs no code of ours.",
        *(["## Ask it about an image", *snippets] if snippets else []),
        "## Limits",
        _limits(form, bits),
    ]
    if origin.scores:
        rows = {name: _score(*value) for name, value in origin.scores.items()}
        parts += ["## Scores, in points", _table(("benchmark", "score ± standard error"), rows)]
    recipe = {name: leaf for name, leaf in flatten(said["recipe"]) if leaf not in (None, [], {})}
    if recipe:
        parts += ["## Recipe and data", _table(("parameter", "value"), recipe)]
    if said["hashes"]:
        parts += ["## SHA-256 of what it was packed from", _table(("file", "SHA-256"), said["hashes"])]
    parts.append("The files' own SHA-256 stand in manifest.json.")
    return "\n\n".join(parts) + "\n"


def write_card(folder: Path, origin: Origin | None = None, out: Path | None = None) -> None:
    """`grace card`: the card of a packed folder or an export, as Markdown in `out` (None: the folder's README.md).

    Raises:
        GraceError: a folder without card.json.
    """
    if not (folder / ABOUT).is_file():
        raise GraceError(f"{folder}: has no {ABOUT}, which packing and exporting leave; pack or export it again")
    said, form = read_json(folder / ABOUT), form_of(folder)
    if form not in FORMATS:
        raise GraceError(f"{folder}: config.json says {form}; a card can be written for {', '.join(FORMATS)}")
    try:
        text = model_card(said, form, origin)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GraceError(f"{folder / ABOUT}: damaged ({reason(error)}); pack or export the model again") from None
    (out or folder / "README.md").write_text(text, encoding="utf-8")


def form_of(folder: Path) -> str:
    """Which of FORMATS a folder is."""
    if any(folder.glob("*.gguf")):
        return "gguf"
    method = (read_config(folder).get("quantization_config") or {}).get("quant_method")
    return "pack-quantized" if method == "compressed-tensors" else str(method)


def _front(form: str, origin: Origin) -> dict[str, Any]:
    front: dict[str, Any] = {}
    if origin.licence:
        front["license"] = origin.licence
    if origin.base_model:
        front |= {"base_model": origin.base_model, "base_model_relation": "quantized"}
    if origin.datasets:
        front["datasets"] = list(origin.datasets)
    library = "gguf" if form == "gguf" else "transformers"
    return front | {
        "library_name": library,
        "pipeline_tag": "image-text-to-text",
        "tags": ["grace", FORMATS[form][1], "quantized", "vision-language"],
    }


def _snippets(form: str) -> list[str]:
    """Code that asks about an image, for every program that is known to open the format."""
    if form == "gguf":
        return [_LLAMA.format(folder="FOLDER", question=_QUESTION)]
    needs = {"pack-quantized": '"compressed-tensors>=0.15"', "awq": "gptqmodel", "gptq": "gptqmodel"}.get(form)
    if needs is None:
        return []
    shown = [_TRANSFORMERS.format(needs=needs, question=_QUESTION), _VLLM.format(question=_QUESTION)]
    if form == "pack-quantized":
        export = "In llama.cpp, after `grace export --packed FOLDER --format gguf --out GGUF`:\n\n"
        shown.append(export + _LLAMA.format(folder="GGUF", question=_QUESTION))
    return shown


_TRANSFORMERS = """In transformers (`pip install "transformers>=5.20" accelerate torchvision {needs}`):

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER", device_map="auto")
processor = AutoProcessor.from_pretrained("FOLDER")
content = [{{"type": "image", "path": "image.jpg"}}, {{"type": "text", "text": "{question}"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=128, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""
_VLLM = """In vLLM (`pip install vllm`):

```python
import base64
from pathlib import Path

from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM may start processes that import this file
    image = "data:image/jpeg;base64," + base64.b64encode(Path("image.jpg").read_bytes()).decode()
    content = [{{"type": "image_url", "image_url": {{"url": image}}}}, {{"type": "text", "text": "{question}"}}]
    model = LLM("FOLDER", max_model_len=4096)
    (answer,) = model.chat([{{"role": "user", "content": content}}], SamplingParams(temperature=0, max_tokens=128))
    print(answer.outputs[0].text)
```"""
_LLAMA = """```sh
llama-mtmd-cli -m {folder}/model-Q4_0.gguf --mmproj {folder}/mmproj-BF16.gguf --image image.jpg -p "{question}"
llama-server -m {folder}/model-Q4_0.gguf --mmproj {folder}/mmproj-BF16.gguf    # chats, with images, in a browser
```"""

_VLLM_COMPUTES = {
    4: ", and on a CPU with AMX rounds activations to 8 bits before each product unless VLLM_CPU_INT4_W4A8=0 is set",
    8: " on a GPU; on a CPU it has no product of 8 bits (seen in 0.32)",
}


def _limits(form: str, bits: int) -> str:
    said = {
        "pack-quantized": "Loaded by transformers without a quantised product, the weights are unpacked and take the "
        "memory of 16 bits; vLLM keeps them packed"
        + _VLLM_COMPUTES.get(bits, f", with products of {bits} bits for NVIDIA GPUs alone (seen in 0.32)")
        + ".",
        "awq": "Scales are fp16; compute in fp16.",
        "gptq": "Scales are fp16; compute in fp16.",
        "gguf": "llama.cpp rounds activations to 8 bits before each Q4_0 product and resizes images its own way, so "
        "answers can differ from the packed model's. It puts a CLIP tower's class token behind the patches (seen in "
        "build 11549), by which a LLaVA with such a tower sees its patches one place shifted; SigLIP and Qwen towers "
        "are exact.",
    }.get(form, "")
    return (
        f"{said} It answers as the model it was made from does, with its errors and its biases; check what matters."
    ).strip()


def _score(value: float, error: float | None) -> str:
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


def _table(head: tuple[str, str], rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |" for name, value in rows.items()]
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *lines])
