"""Triton: group-wise fake quantisation, its codes, and the learned step size's gradient.

With step s per group along the input, u = w / s, and the codes' range [-Qn, Qp] = [-2^(b-1), 2^(b-1) - 1]:

    code  = round(clamp(u, -Qn, Qp)), half to even          fake-quantised weight = code s
    d/dw  = incoming gradient where -Qn < u < Qp, else 0
    d/ds  = sum over the group of incoming gradient x (round(u) - u where -Qn < u < Qp, else -Qn or Qp)
    d/dtheta = exp(theta) d/ds

as LSQ (arXiv 1902.08153, eq. 1 to 5) and `grace.quant.step_size`, the torch form, define it. Steps come in rounded to
the export dtype (`LearnedStepSize.scales`), since a GPU's fast exponential could round to a neighbour and train other
codes than ship. Meant to run once per optimiser step, on the accumulated gradient: weights and gradients are read
once each, and of the gradients only the clipped ones written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from grace.precision import code_range

_TILE = 2048  # weights per program


@triton.jit
def _round_half_even(x):
    """For |x| < 2^22: adding 1.5 x 2^23 leaves fp32 no bits below 1."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _load_groups(weights, scales, groups, GROUP: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Weights over their step [GROUPS, WIDTH], steps [GROUPS, 1], offsets and mask of this program's tile."""
    index = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    element = tl.arange(0, WIDTH)
    mask = (index < groups)[:, None] & (element < GROUP)[None, :]
    offsets = index[:, None] * GROUP + element[None, :]
    scale = tl.load(scales + index, mask=index < groups, other=1.0).to(tl.float32)[:, None]
    weight = tl.load(weights + offsets, mask=mask, other=0.0).to(tl.float32)
    # IEEE division: an approximate one moves weights that lie on a rounding boundary
    ratio = tl.div_rn(weight, tl.broadcast_to(scale, [GROUPS, WIDTH]))
    return ratio, scale, index, offsets, mask


@triton.jit
def _quantize(
    weights, scales, out, groups, qn, qp,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    ratio, scale, _, offsets, mask = _load_groups(weights, scales, groups, GROUP, GROUPS, WIDTH)
    code = _round_half_even(tl.minimum(tl.maximum(ratio, qn), qp))
    tl.store(out + offsets, (code * scale).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _lsq_gradient(
    weights, scales, thetas, gradients, theta_gradients, groups, qn, qp, factor,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    ratio, _, index, offsets, mask = _load_groups(weights, scales, groups, GROUP, GROUPS, WIDTH)
    gradient = tl.load(gradients + offsets, mask=mask, other=0.0).to(tl.float32)
    clamped = tl.minimum(tl.maximum(ratio, qn), qp)
    inside = (ratio > qn) & (ratio < qp)
    slope = tl.where(inside, _round_half_even(clamped) - ratio, clamped)
    theta = tl.load(thetas + index, mask=index < groups, other=0.0)
    tl.store(theta_gradients + index, tl.sum(gradient * slope, 1) * tl.exp(theta) * factor, mask=index < groups)
    # a gradient inside stays where it is: only the clipped few are written
    tl.store(gradients + offsets, tl.zeros_like(gradient).to(gradients.dtype.element_ty), mask=mask & ~inside)


def _layout(weight: Tensor, scales: Tensor) -> tuple[int, dict[str, int]]:
    """Number of groups and the tile's shape; refuses layouts that the flat addressing would misread."""
    out_features, in_features = weight.shape
    if scales.shape[0] != out_features or in_features % scales.shape[1]:
        raise ValueError(f"steps {list(scales.shape)} do not divide a weight of {list(weight.shape)} into groups")
    if not (weight.is_contiguous() and scales.is_contiguous()):
        raise ValueError("weight and steps must be contiguous")
    group = in_features // scales.shape[1]
    width = triton.next_power_of_2(group)
    return scales.numel(), {"GROUP": group, "GROUPS": max(1, _TILE // width), "WIDTH": width}


def fake_quantize(weight: Tensor, scales: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Weights as the packed model will hold them: code x step, rounded to the steps' dtype.

    Args:
        weight: [out, in], any float dtype (fp32 masters)
        scales: [out, in / group], steps in the export dtype (bf16)
        bits: 2, 3, 4 or 8
        out: [out, in], written in place of a new tensor of the steps' dtype
    """
    if out is None:
        out = torch.empty_like(weight, dtype=scales.dtype)
    groups, tile = _layout(weight, scales)
    if not out.is_contiguous() or out.shape != weight.shape:
        raise ValueError(f"the output must be contiguous and {list(weight.shape)}, not {list(out.shape)}")
    lowest, highest = map(float, code_range(bits))
    _quantize[(triton.cdiv(groups, tile["GROUPS"]),)](weight, scales, out, groups, lowest, highest, **tile)
    return out


def lsq_gradient_(
    weight: Tensor, theta: Tensor, scales: Tensor, gradient: Tensor, bits: int, gradient_scale: bool = False
) -> Tensor:
    """Turn the gradient of the fake-quantised weight into the weight's (in place) and return theta's.

    Args:
        weight, scales, bits: what `fake_quantize` was given, before the step's update
        theta: fp32 [out, in / group], log scales
        gradient: [out, in], any float dtype: accumulated gradient of the fake-quantised weight; overwritten
        gradient_scale: multiply theta's gradient by LSQ's 1 / sqrt(group Qp)

    Returns:
        d loss / d theta, fp32 [out, in / group]
    """
    groups, tile = _layout(weight, scales)
    if not gradient.is_contiguous() or gradient.shape != weight.shape or theta.shape != scales.shape:
        raise ValueError(f"gradient {list(gradient.shape)} or theta {list(theta.shape)} does not fit the weight")
    theta_gradient = torch.empty(scales.shape, dtype=torch.float32, device=weight.device)
    lowest, highest = map(float, code_range(bits))
    factor = (tile["GROUP"] * highest) ** -0.5 if gradient_scale else 1.0
    _lsq_gradient[(triton.cdiv(groups, tile["GROUPS"]),)](
        weight, scales, theta, gradient, theta_gradient, groups, lowest, highest, factor, **tile
    )
    return theta_gradient
