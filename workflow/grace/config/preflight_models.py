"""Whether a pretrained model can be fetched and fits the experiment, by names, sizes and headers alone; no torch."""

import json
import operator
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from grace.config.schema import Experiment, FilesData, Model
from grace.config.sections import Release
from grace.errors import GraceError
from grace.families import FAMILIES, Family, family_of_folder, lacking_package
from grace.families.files import read_config

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
HUB_SECONDS = 2.0


def model_problems(
    experiment: Experiment, model: Model | Release, role: str, configs: dict[str, dict[str, Any]]
) -> Iterator[str]:
    """A sentence for each thing that a pretrained model lacks: of its folder, or of what the hub's cache has; else the
    hub must be there.

    Args:
        role: where the configuration names it: `teacher`, `student`, `recipes.grace.released.int4`.
        configs: gets its config.json under `role`, where that is readable and of the experiment's family.
    """
    assert model.pretrained is not None
    folder = Path(model.pretrained)
    if not folder.is_dir():
        cached = _cached(model)
        if cached is None:
            yield from _hub(model, role)
            return
        folder = cached
    elif not any(folder.glob("*.safetensors")):
        yield f"{folder}: holds no *.safetensors; name a model in the transformers format as {role}.pretrained"
    try:
        found = family_of_folder(folder) if (folder / "config.json").is_file() else None
    except GraceError as error:
        yield str(error)
        return
    if found is None:
        yield f"{folder / 'config.json'}: no such file; name a model in the transformers format as {role}.pretrained"
        return
    if found.name != experiment.family:
        yield (
            f"{folder}: config.json says {found.name} and the configuration family: {experiment.family}; correct either"
        )
        return
    config = read_config(folder)
    configs[role] = config
    if isinstance(experiment.data, FilesData):
        yield from _processor(folder)
    if role == "student":
        yield from _groups(folder, config, experiment.quantization.group_size)
    yield from _words(folder, config, FAMILIES[experiment.family])


def _processor(folder: Path) -> Iterator[str]:
    """What reads images and texts stands beside the weights."""
    about = folder / "processor_config.json"
    if not (folder / "preprocessor_config.json").is_file():
        try:
            within = about.is_file() and "image_processor" in json.loads(about.read_text())
        except (OSError, ValueError, TypeError):
            within = False
        if not within:
            yield f"{folder}: has no preprocessor_config.json; copy the model's image processor there"
    if not any((folder / name).is_file() for name in TOKENIZERS):
        yield f"{folder}: has no {', '.join(TOKENIZERS[:-1])} or {TOKENIZERS[-1]}; copy the model's tokenizer there"


def _groups(folder: Path, config: dict[str, Any], group_size: int) -> Iterator[str]:
    """Groups of weights along the input divide every decoder linear's."""
    text = config.get("text_config") or config
    heads, each = text.get("num_attention_heads"), text.get("head_dim")
    widths = {name: text.get(name) for name in ("hidden_size", "intermediate_size")}
    if isinstance(heads, int) and isinstance(each, int):
        widths["num_attention_heads x head_dim"] = heads * each
    for name, width in widths.items():
        if isinstance(width, int) and width % group_size:
            yield (
                f"{folder}: its decoder's {name} is {width}, no multiple of quantization.group_size {group_size}; "
                "lower that"
            )


def _words(folder: Path, config: dict[str, Any], family: Family) -> Iterator[str]:
    """The tokenizer has the family's image token, where config.json says, and the head a row for every token."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        if lacking := lacking_package(folder):
            yield lacking
        return
    try:
        about = json.loads(path.read_text())
        words = dict(about["model"]["vocab"])
        words |= {token["content"]: token["id"] for token in about.get("added_tokens", [])}
        words = {word: operator.index(number) for word, number in words.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        yield f"{path}: not a readable tokenizer; fetch the model again"
        return
    text = config.get("text_config") or {}
    rows = text.get("vocab_size") or config.get("vocab_size")
    size = max(words.values(), default=-1) + 1
    if isinstance(rows, int) and rows < size:
        yield f"{folder}: its head has {rows} rows and the tokenizer {size} tokens; use the model's own tokenizer"
    image = config.get("image_token_index", config.get("image_token_id"))
    if lacking := family.lacks(words):
        yield f"{path}: {lacking}; use the model's own tokenizer"
    elif image is not None and words[family.image_token] != image:
        yield (
            f"{folder}: {family.image_token} is token {words[family.image_token]} and config.json says {image}; use "
            "the model's own tokenizer"
        )


def _cached(model: Model | Release) -> Path | None:
    """A snapshot in the hub's cache, of the revision that is asked for."""
    home = Path(os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface")))
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    repository = hub / f"models--{str(model.pretrained).replace('/', '--')}"
    reference = repository / "refs" / (model.revision or "main")
    revision = reference.read_text().strip() if reference.is_file() else model.revision
    snapshot = repository / "snapshots" / (revision or "")
    return snapshot if revision and (snapshot / "config.json").exists() else None


def _hub(model: Model | Release, role: str) -> Iterator[str]:
    said = f"{model.pretrained}: neither a local folder nor in the hub's cache"
    fix = f"download it, and name its folder as {role}.pretrained"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        yield f"{said}, and HF_HUB_OFFLINE is set; {fix}"
    elif str(model.pretrained).count("/") != 1:
        yield f"{said}, and no name that the hub could have; correct {role}.pretrained"
    elif not (os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")):
        host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
        try:
            port = host.port or (80 if host.scheme == "http" else 443)
            socket.create_connection((host.hostname or "", port), HUB_SECONDS).close()
        except (OSError, ValueError):
            yield f"{said}, and {host.hostname} cannot be reached; {fix}"
