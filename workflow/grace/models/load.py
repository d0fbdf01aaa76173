"""Reading a model folder: plain, or packed as compressed-tensors, which transformers dequantises on the way in."""

import importlib.metadata
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, CompressedTensorsConfig, PreTrainedModel

from grace.errors import GraceError, panics_as_errors, reason
from grace.families import family_named, family_of_folder, lacking_package
from grace.families.files import own_code, read_config, read_object
from grace.models.template import marks_answers

TESTED = ((5, 20), (5, 24))  # of transformers: from, and below


def check_transformers() -> None:
    """Refuse a transformers that this code was not tested with:
    an older one swallows arguments that it does not know.
    """
    version = importlib.metadata.version("transformers")
    least, below = TESTED
    if not least <= tuple(int(part) for part in version.split(".")[:2]) < below:
        raise GraceError(
            f"transformers {version} is installed, and this pipeline was tested with {'.'.join(map(str, least))} up to "
            f"below {'.'.join(map(str, below))}; install one of those"
        )


def model_folder(folder: str | Path) -> dict:
    """Check that `folder` is a checkpoint folder and return its config.json; a `GraceError` says what is missing."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise GraceError(f"{folder}: not a model folder (config.json is missing); give the folder of a checkpoint")
    config = read_config(folder)
    family_named(config.get("model_type"), folder / "config.json")
    if not any(folder.glob("*.safetensors")):
        raise GraceError(f"{folder}: has no *.safetensors; build or copy the model again")
    return config


def _no_code(folder: Path) -> None:
    if file := own_code(folder):
        raise GraceError(
            f"{file}: asks for code of its own (auto_map), which is never run; use the model as transformers has it"
        )


def check_size(folder: str | Path) -> None:
    """Refuse a config.json of a far larger model than the weight files can hold, before memory is taken for it.

    A config that lost its sizes describes transformers' default, of billions of weights; a file stores at least two
    bits of each.

    Raises:
        GraceError: so it is, or transformers makes no model of the config.
    """
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            asked = sum(p.numel() for p in AutoModelForImageTextToText.from_config(config).parameters())
    except Exception as error:  # whatever a file of others makes transformers raise
        raise GraceError(f"{folder}: transformers makes no model of its config.json ({reason(error)})") from error
    stored = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    if asked > 4 * stored:
        raise GraceError(
            f"{folder}: config.json describes a model of {asked:,} weights and its files have {stored:,} bytes; they "
            "do not belong together: fetch the model again"
        )


def load_model(
    folder: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu", attention: str = "sdpa"
) -> PreTrainedModel:
    """Load a vision-language model for inference or as the start of training.

    Args:
        folder: a checkpoint folder, plain or packed.
        dtype: of the weights in memory; "auto" takes the checkpoint's own (bf16 for everything made here).
        attention: "sdpa", or "eager" where attention maps are wanted.

    Raises:
        GraceError: no checkpoint, another transformers than those tested, code of its own, or weights that are missing,
            unexpected or of another shape than the model's.
    """
    check_transformers()
    config = model_folder(folder)
    _no_code(Path(folder))
    check_size(folder)
    more: dict[str, Any] = {}
    if "quantization_config" in config:
        more["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    try:
        model, loaded = cast(Any, AutoModelForImageTextToText).from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the others
            **more,
        )
    except Exception as error:  # whatever a file of others makes transformers raise
        raise GraceError(
            f"{folder}: transformers could not load it ({reason(error)}); build or copy the model again"
        ) from error
    check_loaded(folder, loaded)
    return model.to(device).eval()


def check_loaded(folder: str | Path, loaded: dict[str, Any]) -> None:
    """Refuse a model of which weights are missing, unexpected or of another shape; a `GraceError` names some of each.

    `loaded` is what `from_pretrained(output_loading_info=True)` reports; it counts a tied head as there.
    """
    problems = []
    for kind, words in (("missing", "lacks"), ("unexpected", "has unknown"), ("mismatched", "has other shapes of")):
        names = [str(entry if isinstance(entry, str) else entry[0]) for entry in loaded.get(f"{kind}_keys") or ()]
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            problems.append(f"{words} {shown}")
    if problems:
        raise GraceError(
            f"{folder}: {'; '.join(problems)}; its weights are not those of its config.json: fetch it again"
        )


def load_processor(folder: str | Path) -> Any:
    """The processor of a model's or the data's folder, as this pipeline trains and asks: the family's geometry, and its
    template unless the folder's own one marks its answers.
    """
    check_transformers()
    folder = Path(folder)
    if not folder.is_dir():
        raise GraceError(f"{folder}: no such folder; build the data or the model again")
    _no_code(folder)
    family = family_of_folder(folder)
    if lacking := lacking_package(folder):
        raise GraceError(lacking)
    try:
        with panics_as_errors():
            processor = family.load_processor(folder)
    except GraceError:
        raise
    except Exception as error:  # whatever a file of others makes transformers raise
        raise GraceError(
            f"{folder}: no usable processor ({reason(error)}); build the data or the model again"
        ) from error
    own = _own_template(folder, processor)
    processor.chat_template = own if own and marks_answers(processor.tokenizer, own) else family.template
    processor.tokenizer.chat_template = None  # one template, beside the processor
    return processor


def _own_template(folder: Path, processor: Any) -> str | None:
    """The folder's chat template, wherever its version of the library kept it."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file():
            kept = read_object(folder / name).get("chat_template")
            if isinstance(kept, str):
                return kept
    kept = processor.tokenizer.chat_template
    return kept if isinstance(kept, str) else None
