"""The INT4 GEMM (W4A16) on a CPU: torch's own int4 kernel,
which multiplies packed weights without unpacking them first.
"""

import torch

from grace.kernels.w4a16_layout import GROUPS

ROWS = 16  # outputs come in blocks of so many


def serves(out_features: int, in_features: int, group_size: int, dtype: torch.dtype) -> bool:
    """Whether torch's kernel takes this shape and pays: in fp32 and fp16 it is slower than a dense GEMM."""
    return (
        dtype == torch.bfloat16 and group_size in GROUPS and out_features % ROWS == 0 and in_features % group_size == 0
    )


def pack(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes [out, in] in [-8, 7] -> the kernel's own order, uint8 [out, in/2]."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32) + 8, 1)


def scales_and_zeros(scales: torch.Tensor) -> torch.Tensor:
    """Step sizes [out, in/group] -> bf16 [in/group, out, 2]; symmetric codes have zero points of 0."""
    by_group = scales.to(torch.bfloat16).t()
    return torch.stack((by_group, torch.zeros_like(by_group)), dim=-1).contiguous()


def gemm(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """x [rows, in] bf16 times the weight of `pack` and `scales_and_zeros`: [rows, out] bf16, accumulated in fp32."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales)
