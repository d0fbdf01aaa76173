"""Loading a model to run it: a packed folder keeps its weights packed, a plain one its bf16."""

import logging
import warnings
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig, PreTrainedModel

from grace.errors import GraceError, reason
from grace.infer.fuse import JOINED, fuse_dense, install
from grace.infer.int4_linear import Int4Linear
from grace.kernels.w4a16_layout import unpack_int4
from grace.models import decoder, load_model, model_folder
from grace.models.load import check_loaded, check_size
from grace.quant.packed import PackedModel

OLDEST_GPU = (8, 0)  # compute capability with bf16 tensor cores


def load_for_inference(
    folder: str | Path, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", fuse: bool = True
) -> PreTrainedModel:
    """Load a checkpoint folder, plain or packed by compressed-tensors, ready to decode.

    A folder packed to 4 bits keeps its decoder packed, in `Int4Linear`; one packed to another width is dequantised,
    because no backend multiplies it packed.

    Args:
        folder: the checkpoint.
        dtype: of activations and of weights that are not packed.
        device: "cpu", "cuda" or "cuda:1".
        fuse: whether to join q, k and v, and gate and up, into one GEMM each.

    Raises:
        GraceError: a folder that is no checkpoint, a damaged file, weights that are missing or unknown, or a GPU that
            is too old or too small.
    """
    folder = Path(folder)
    config = model_folder(folder)
    check_safetensors(folder)
    check_device(device, folder)
    try:
        if packed_bits(config, folder) == 4:
            packed = PackedModel.open(folder)
            for key in packed.linears if packed.group_size > 0 else ():
                packed.shape(key)  # held against config.json before anything is loaded
            model = _load_packed(folder, dtype)
            _swap(model, dtype, device, fuse)
        else:
            model = load_model(folder, dtype=dtype)
            if fuse:
                fuse_dense(decoder(model))
        return cast(Any, model).to(device).eval().requires_grad_(False)
    except torch.cuda.OutOfMemoryError as error:
        raise GraceError(
            f"{folder}: does not fit into the memory of {device}; use a GPU with more memory, or a packed folder"
        ) from error


def packed_bits(config: dict, folder: Path) -> int | None:
    """Width of the packed weights that config.json declares; None for a plain checkpoint."""
    about = config.get("quantization_config")
    if about is None:
        return None
    try:
        if about["quant_method"] != "compressed-tensors" or about["format"] != "pack-quantized":
            raise KeyError
        (group,) = about["config_groups"].values()
        weights = group["weights"]
        if weights["type"] != "int" or not weights["symmetric"]:
            raise KeyError
        return weights["num_bits"]
    except (KeyError, TypeError, ValueError):
        raise GraceError(
            f"{folder / 'config.json'}: quantization_config is not symmetric integer `pack-quantized` of "
            f"compressed-tensors with one group; pack the model with `grace pack`"
        ) from None


def check_safetensors(folder: Path) -> None:
    """Open every weight file, which compares its header with its length; a truncated one is a `GraceError`."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise GraceError(
                f"{file}: damaged or cut short ({reason(error)}); copy it again, or build it again"
            ) from error


def check_device(device: str, what: str | Path) -> None:
    """Raise a `GraceError` where `device` is not usable here."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise GraceError(f"--device {device}: not a device that models run on; use cpu, cuda or cuda:1")
    if kind == "cpu":
        return
    if not torch.cuda.is_available():
        raise GraceError(f"{what}: no CUDA device here; use the CPU")
    if index and int(index) >= torch.cuda.device_count():
        raise GraceError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices, from cuda:0 on"
        )
    if torch.cuda.get_device_capability(device) < OLDEST_GPU:
        name = torch.cuda.get_device_name(device)
        raise GraceError(f"{what}: {name} is older than compute capability 8.0 (Ampere); use the CPU")


def _load_packed(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with compressed-tensors' packed parameters in its linears, on the CPU."""
    check_size(folder)
    # compressed-tensors draws progress bars of a moment's work; what goes wrong is raised
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        logging.getLogger("compressed_tensors").setLevel(logging.ERROR)
        try:
            model, loaded = cast(Any, AutoModelForImageTextToText).from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation="sdpa",
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with the others
                quantization_config=CompressedTensorsConfig(dequantize=False),
            )
        except Exception as error:  # whatever a file of others makes transformers raise
            raise GraceError(
                f"{folder}: transformers could not load it ({reason(error)}); pack the model again"
            ) from error
    check_loaded(folder, loaded)
    hook = getattr(model, "ct_decompress_hook", None)
    if hook is not None:
        hook.remove()  # at the first forward it would wrap every module to unpack what is no longer there
    return model


def _swap(model: nn.Module, dtype: torch.dtype, device: str, fuse: bool) -> None:
    """Replace every packed linear of the decoder by an `Int4Linear`, fused where `fuse` says so."""
    for layer in decoder(model).layers:
        for part, names in JOINED.items():
            parent = getattr(layer, part, None)
            linears: list[Any] = [getattr(parent, name, None) for name in names]
            if fuse and parent is not None and all(_is_packed(linear) for linear in linears):
                install(
                    parent, names, _int4(linears, dtype, device), [linear.weight_packed.shape[0] for linear in linears]
                )
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if _is_packed(child):
                    setattr(parent, name, _int4([child], dtype, device))
    rest = [name for name, module in model.named_modules() if _is_packed(module)]
    if rest:
        raise GraceError(f"packed weights outside the decoder's layers ({rest[0]}); pack the model with `grace pack`")


def _is_packed(module: nn.Module | None) -> bool:
    return module is not None and "weight_packed" in module._parameters


def _int4(linears: list[Any], dtype: torch.dtype, device: str) -> Int4Linear:
    """One layer from the packed parameters of one or several linears, outputs one after the other."""
    codes = torch.cat([unpack_int4(linear.weight_packed.data) for linear in linears])
    scales = torch.cat([linear.weight_scale.data for linear in linears])
    biases = [linear.bias for linear in linears]
    bias = None if biases[0] is None else torch.cat([b.data for b in biases])
    return Int4Linear(codes, scales, bias, dtype, device)
