"""Reading a model folder: plain, or packed as compressed-tensors, which transformers dequantises on the way in."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CompressedTensorsConfig, PreTrainedModel

from grace.errors import GraceError


def model_folder(folder: str | Path) -> dict:
    """Check that `folder` is a checkpoint folder and return its config.json; a `GraceError` says what is missing."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise GraceError(
            f"{folder}: not a model folder (config.json is missing); give the folder of a checkpoint"
        ) from None
    except json.JSONDecodeError as error:
        raise GraceError(f"{folder / 'config.json'}: not valid JSON ({error}); build or copy the model again") from None
    if not any(folder.glob("*.safetensors")):
        raise GraceError(f"{folder}: has no *.safetensors; build or copy the model again")
    return config


def load_model(
    folder: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu", attention: str = "sdpa"
) -> PreTrainedModel:
    """Load a vision-language model for inference or as the start of training.

    Args:
        folder: a checkpoint folder, plain or packed.
        dtype: of the weights in memory; "auto" takes the checkpoint's own (bf16 for everything made here).
        attention: "sdpa", or "eager" where attention maps are wanted.
    """
    config = model_folder(folder)
    more = {}
    if "quantization_config" in config:
        more["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, local_files_only=True, **more
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GraceError(
            f"{folder}: transformers could not load it ({reason}); build or copy the model again"
        ) from error
    return model.to(device).eval()


def load_processor(folder: str | Path):
    """The processor (tokenizer, image preprocessing, chat template) kept beside a model or in the data folder."""
    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GraceError(f"{folder}: no usable processor ({reason}); build the data or the model again") from error
