"""The integer grid: signed symmetric codes, one bf16 scale per group of weights along the input.

A weight `w` with scale `s` has the code `q = round(clamp(w / s, -Qn, Qp))` and ships as `bf16(q * s)`, with
`Qn = 2^(bits-1)` and `Qp = 2^(bits-1) - 1` (LSQ, arXiv 1902.08153, eq. 1 and 2). The clamp comes before the rounding.
Step sizes are always on bf16's grid, since that is what a packed model stores.
"""

from collections.abc import Callable

import torch

from grace.errors import GraceError
from grace.precision import code_range

# Largest magnitudes are tried as `factor * max|w| / Qp`: the paper's K = 20 factors in [0.3, 1.2].
FACTORS = torch.linspace(0.3, 1.2, 20).tolist()
_PIECE = 1 << 18  # weights
SMALLEST = torch.finfo(torch.bfloat16).tiny
LARGEST = torch.finfo(torch.bfloat16).max


def group_count(in_features: int, group_size: int, name: str = "weight") -> int:
    """Groups along an input of `in_features`; a `GraceError` names the layer that the group does not divide."""
    if group_size < 1 or in_features % group_size:
        raise GraceError(
            f"{name}: its input of {in_features} is not a multiple of group_size {group_size}; set "
            f"quantization.group_size to a divisor of {in_features}"
        )
    return in_features // group_size


def on_bf16_grid(scales: torch.Tensor) -> torch.Tensor:
    """Positive scales rounded to bf16 and kept normal, so that no weight is ever divided by zero."""
    return scales.float().clamp(SMALLEST, LARGEST).to(torch.bfloat16)


def _by_rows(rule: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """`rule(*tensors)`; on a CPU by pieces of rows that stay in the cache, which is several times faster."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= _PIECE:
        return rule(*tensors)
    rows = max(1, _PIECE // first.shape[1])
    return torch.cat([rule(*pieces) for pieces in zip(*(t.split(rows) for t in tensors), strict=True)])


def quantize(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes int8 [out, in] of `weight` [out, in] (any float) on `scales` [out, groups] (positive)."""
    lowest, highest = code_range(bits)

    def rule(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        steps = weight.float().unflatten(1, (scales.shape[1], -1)) / scales.float()[..., None]
        return steps.clamp_(lowest, highest).round_().to(torch.int8).flatten(1)

    return _by_rows(rule, weight, scales)


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bf16 weights [out, in] of int8 `codes` [out, in] and bf16 `scales` [out, groups].

    A code has at most eight significant bits and so is exact in bf16; the product is rounded once, which is what
    compressed-tensors' decompression computes too.
    """

    def rule(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        grouped = codes.to(torch.bfloat16).unflatten(1, (scales.shape[1], -1))
        return (grouped * scales.to(torch.bfloat16)[..., None]).flatten(1)

    return _by_rows(rule, codes, scales)


def _largest(weight: torch.Tensor, group_size: int, name: str) -> torch.Tensor:
    """max|w| fp32 [out, groups]; groups of zeros take the mean of the others, so that they can still learn."""
    groups = group_count(weight.shape[1], group_size, name)
    largest = weight.unflatten(1, (groups, -1)).abs().amax(-1).float()
    if not torch.isfinite(largest).all():
        raise GraceError(f"{name}: holds NaN or infinite weights; repair or rebuild the checkpoint")
    filled = largest > 0
    stand_in = largest[filled].mean() if filled.any() else 1.0
    return torch.where(filled, largest, stand_in)


def largest_scales(weight: torch.Tensor, bits: int, group_size: int, name: str = "weight") -> torch.Tensor:
    """Round-to-nearest's scales, max|w| / Qp, bf16 [out, groups]: nothing is clipped."""
    return on_bf16_grid(_largest(weight, group_size, name) / code_range(bits)[1])


def format_scales(weight: torch.Tensor, bits: int, group_size: int, name: str = "weight") -> torch.Tensor:
    """compressed-tensors' own symmetric scales, max|w| / ((2^bits - 1) / 2), bf16 [out, groups].

    The largest weight lies half a step beyond the largest positive code, so that positive ones are clipped a little.
    """
    lowest, highest = code_range(bits)
    return on_bf16_grid(_largest(weight, group_size, name) / ((highest - lowest) / 2))


def best_scales(weight: torch.Tensor, bits: int, group_size: int, name: str = "weight") -> torch.Tensor:
    """Step sizes bf16 [out, groups] with the least squared error among 20 in [0.3, 1.2] x max|w| / Qp.

    Each candidate is rounded to bf16 before its error is taken. Ties go to the smaller one.
    """
    lowest, highest = code_range(bits)
    widest = _largest(weight, group_size, name) / highest

    def rule(weight: torch.Tensor, widest: torch.Tensor) -> torch.Tensor:
        grouped = weight.float().unflatten(1, (widest.shape[1], -1))
        least = torch.full_like(widest, torch.inf)
        best = on_bf16_grid(widest)
        for factor in FACTORS:
            scales = on_bf16_grid(widest * factor)
            step = scales.float()[..., None]
            error = ((grouped / step).clamp_(lowest, highest).round_().mul_(step).sub_(grouped)).square_().sum(-1)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, scales, best)
        return best

    return _by_rows(rule, weight, widest)
