"""The packed codes as an AWQ checkpoint in GEMM layout, 4 bits, zero point 8.

`qweight` int32 [in, out / 8] holds eight outputs a word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits;
`qzeros` int32 [in / group, out / 8] holds 8 everywhere; `scales` fp16 [in / group, out].
"""

import torch

from grace.errors import GraceError
from grace.quant.bits import pack_codes, unpack_codes
from grace.quant.checkpoint import TensorSpec
from grace.quant.packed import OUTSIDE, PackedModel, exact_fp16

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_gemm(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes [out, in] to `qweight` int32 [in, out / 8]."""
    ordered = codes.T.unflatten(1, (-1, 8))[..., list(ORDER)].flatten(1)
    return pack_codes(ordered.contiguous(), 4)


def unpack_gemm(qweight: torch.Tensor) -> torch.Tensor:
    """The inverse."""
    stored = unpack_codes(qweight, 4, qweight.shape[1] * 8).unflatten(1, (-1, 8))
    return stored[..., torch.tensor(ORDER).argsort()].flatten(1).T.contiguous()


def _outside() -> list[str]:
    """What is not the decoder, by both names that it has: transformers matches from the start of a module's path."""
    return [prefix + part for part in OUTSIDE for prefix in ("", "model.")]


def config(model: PackedModel) -> dict:
    """`quantization_config`; a `GraceError` where AWQ has no such format."""
    if model.bits != 4:
        raise GraceError(f"{model.folder}: holds {model.bits}-bit codes, but AWQ's GEMM layout holds 4 bits; use gptq")
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": model.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head", *_outside(), *model.unquantised()],
    }


def specs(model: PackedModel, key: str) -> list[TensorSpec]:
    """The tensors that stand for the linear `key`."""
    rows, columns = model.shape(key)
    if rows % 8:
        raise GraceError(f"{key}: its {rows} outputs are not a multiple of 8, which AWQ's GEMM layout needs; use gptq")
    groups, name = columns // model.group_size, key.removesuffix("weight")
    return [
        TensorSpec(f"{name}qweight", torch.int32, (columns, rows // 8)),
        TensorSpec(f"{name}qzeros", torch.int32, (groups, rows // 8)),
        TensorSpec(f"{name}scales", torch.float16, (groups, rows)),
    ]


def tensor(model: PackedModel, key: str, kind: str) -> torch.Tensor:
    """One of them: `qweight`, `qzeros` or `scales`."""
    codes, scales = model[key]
    if kind == "qweight":
        return pack_gemm(codes)
    if kind == "qzeros":
        return pack_codes(torch.zeros(scales.T.shape, dtype=torch.int8), 4)  # code 0 is stored as 8
    return exact_fp16(scales, key).T.contiguous()


def read(tensors: dict[str, torch.Tensor], model: PackedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, bf16 scales) of `{"qweight", "qzeros", "scales"}`, to check what was written."""
    zeros = unpack_gemm(tensors["qzeros"]).repeat_interleave(model.group_size, 1)
    return unpack_gemm(tensors["qweight"]) - zeros, tensors["scales"].T.bfloat16()
