"""The packed codes as a GPTQ checkpoint (symmetric, no activation order).

`qweight` int32 [in * bits / 32, out] is the packed stream of each output's row, stood upright; `qzeros` int32
[in / group, out * bits / 32] holds the zero point minus one, as the first version of the format has it; `scales` fp16
[in / group, out]; `g_idx` int32 [in] names each input's group.
"""

import re

import torch

from grace.errors import GraceError
from grace.quant.bits import pack_codes, unpack_codes, words_per_row
from grace.quant.checkpoint import TensorSpec
from grace.quant.packed import OUTSIDE, PackedModel, exact_fp16


def config(model: PackedModel) -> dict:
    """`quantization_config`; `dynamic` with a leading minus names what stays in 16 bits."""
    kept = [f"{part}.*" for part in ("lm_head", *OUTSIDE)]
    kept += [f"{re.escape(name)}$" for name in model.unquantised()]
    return {
        "quant_method": "gptq",
        "bits": model.bits,
        "group_size": model.group_size,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "dynamic": {f"-:.*{pattern}": {} for pattern in kept},
    }


def specs(model: PackedModel, key: str) -> list[TensorSpec]:
    """The tensors that stand for the linear `key`."""
    rows, columns = model.shape(key)
    for side, width in (("inputs", columns), ("outputs", rows)):
        if width % 32:
            raise GraceError(
                f"{key}: its {width} {side} are not a multiple of 32, which GPTQ's layout needs; use the packed folder"
            )
    groups, name = columns // model.group_size, key.removesuffix("weight")
    return [
        TensorSpec(f"{name}qweight", torch.int32, (words_per_row(columns, model.bits), rows)),
        TensorSpec(f"{name}qzeros", torch.int32, (groups, words_per_row(rows, model.bits))),
        TensorSpec(f"{name}scales", torch.float16, (groups, rows)),
        TensorSpec(f"{name}g_idx", torch.int32, (columns,)),
    ]


def tensor(model: PackedModel, key: str, kind: str) -> torch.Tensor:
    """One of them: `qweight`, `qzeros`, `scales` or `g_idx`."""
    if kind == "qweight":
        return model.tensors[f"{key}_packed"].T.contiguous()
    rows, columns = model.shape(key)
    if kind == "g_idx":
        return torch.arange(columns, dtype=torch.int32) // model.group_size
    if kind == "scales":
        return exact_fp16(model.tensors[f"{key}_scale"], key).T.contiguous()
    minus_one = torch.full((columns // model.group_size, rows), -1, dtype=torch.int8)  # stored as zero point - 1
    return pack_codes(minus_one, model.bits)


def read(tensors: dict[str, torch.Tensor], model: PackedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, bf16 scales) of `{"qweight", "qzeros", "scales", "g_idx"}`, to check what was written."""
    columns, rows = len(tensors["g_idx"]), tensors["scales"].shape[1]
    zeros = unpack_codes(tensors["qzeros"], model.bits, rows) + 1
    codes = unpack_codes(tensors["qweight"].T.contiguous(), model.bits, columns)
    return codes - zeros[tensors["g_idx"].long()].T, tensors["scales"].T.bfloat16()
