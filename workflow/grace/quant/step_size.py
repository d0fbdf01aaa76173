"""Group-wise learned step sizes (LSQ, arXiv 1902.08153) for weights, in the logarithm: `s = exp(theta)`.

The forward value is `bf16(q * s)`, `s = bf16(exp(theta))`: what trains is what ships. Roundings are straight-through.
With `u = w / s`, the gradients of the value `v` are (LSQ, eq. 3 and 5)

    dv/dw = 1             if -Qn < u < Qp, else 0
    dv/ds = round(u) - u  if -Qn < u < Qp, else -Qn or Qp
    ds/dtheta = exp(theta)

Both are linear in the incoming gradient. So the rule may be applied once per optimiser step to the gradient that the
micro-batches have accumulated, which is what training does (`lsq_gradients`), or in every micro-batch by autograd
(`LearnedStepSize.fake_quantize`): the result is the same.
"""

import torch
from torch import nn

from grace.errors import GraceError
from grace.first_order import first_order
from grace.precision import code_range
from grace.quant.grid import best_scales, dequantize, group_count, on_bf16_grid, quantize

__all__ = ["LearnedStepSize", "dequantize", "lsq_gradients", "quantize"]


def _fused(weight: torch.Tensor) -> bool:
    """Whether the Triton kernel takes this weight; the torch form below says what both compute."""
    return weight.is_cuda


def _value(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """bf16(q * s) [out, in]."""
    if _fused(weight):
        from grace.kernels.fake_quant import fake_quantize

        return fake_quantize(weight.contiguous(), scales, bits)
    return dequantize(quantize(weight, scales, bits), scales)


@torch.no_grad()
def lsq_gradients(
    weight: torch.Tensor,
    theta: torch.Tensor,
    grad_of_dequantised: torch.Tensor,
    bits: int,
    group_size: int,
    gradient_scale: bool = False,
    overwrite: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """LSQ's gradients from the gradient of the dequantised weights.

    Args:
        weight: [out, in], the full-precision weights that were quantised.
        theta: [out, in / group_size], log step sizes.
        grad_of_dequantised: [out, in], any float dtype; the arithmetic is fp32.
        gradient_scale: multiply theta's gradient by LSQ's 1 / sqrt(group_size * Qp).
        overwrite: `grad_of_dequantised` is not needed any more: a GPU then masks it where it is, without a copy.

    Returns:
        Gradients of `weight` (fp32, or with `overwrite` perhaps in the dtype that came in: masking rounds nothing)
        and of `theta` (fp32), in their shapes.

    Raises:
        GraceError: unknown width, or a group that does not divide the input.
    """
    lowest, highest = code_range(bits)
    groups = group_count(weight.shape[1], group_size)
    if _fused(weight):
        from grace.kernels.fake_quant import lsq_gradient_

        grad_weight = grad_of_dequantised if overwrite else grad_of_dequantised.to(torch.float32, copy=True)
        grad_weight = grad_weight.contiguous()
        scales = on_bf16_grid(theta.exp())
        grad_theta = lsq_gradient_(weight.contiguous(), theta, scales, grad_weight, bits, gradient_scale)
        return grad_weight, grad_theta
    steps = weight.float().unflatten(1, (groups, -1)) / on_bf16_grid(theta.exp()).float()[..., None]
    grad = grad_of_dequantised.float().unflatten(1, (groups, -1))
    inside = (steps > lowest) & (steps < highest)
    clamped = steps.clamp(lowest, highest)
    slope = torch.where(inside, clamped.round() - steps, clamped)
    grad_theta = (grad * slope).sum(-1) * theta.float().exp()
    if gradient_scale:
        grad_theta /= (group_size * highest) ** 0.5
    return torch.where(inside, grad, 0.0).flatten(1), grad_theta


class _FakeQuantize(torch.autograd.Function):
    """Saves its two inputs and nothing else: backward computes the codes again."""

    @staticmethod
    def forward(ctx, weight, theta, bits, group_size, gradient_scale):
        ctx.save_for_backward(weight, theta)
        ctx.rule = bits, group_size, gradient_scale
        return _value(weight, on_bf16_grid(theta.exp()), bits)

    @staticmethod
    @first_order
    def backward(ctx, grad):
        weight, theta = ctx.saved_tensors
        grad_weight, grad_theta = lsq_gradients(weight, theta, grad, *ctx.rule)
        return grad_weight.to(weight.dtype), grad_theta.to(theta.dtype), None, None, None


class LearnedStepSize(nn.Module):
    """The step sizes of one linear layer.

    Attributes:
        theta: fp32 parameter [out, in / group_size]. Keep it in fp32: in bf16 one step of theta is 3%.
    """

    def __init__(self, theta: torch.Tensor, bits: int, group_size: int, gradient_scale: bool = False) -> None:
        super().__init__()
        code_range(bits)
        self.theta = nn.Parameter(theta.float())
        self.bits, self.group_size, self.gradient_scale = bits, group_size, gradient_scale

    @classmethod
    def from_weight(
        cls,
        weight: torch.Tensor,
        bits: int = 4,
        group_size: int = 128,
        name: str = "weight",
        gradient_scale: bool = False,
    ) -> "LearnedStepSize":
        """Start from the best of 20 scales by squared error (`grid.best_scales`) of `weight` [out, in].

        Raises:
            GraceError: unknown width, a group that does not divide the input, weights that are not finite; it names
                the layer by `name`.
        """
        if weight.ndim != 2 or not weight.is_floating_point():
            raise GraceError(f"{name}: a weight must be [out, in] floats, not {weight.dtype} {list(weight.shape)}")
        with torch.no_grad():
            theta = best_scales(weight, bits, group_size, name).float().log()
        return cls(theta, bits, group_size, gradient_scale)

    @property
    def scales(self) -> torch.Tensor:
        """bf16 [out, in / group_size]: exp(theta) in the export dtype, without gradient."""
        return on_bf16_grid(self.theta.detach().exp())

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """int8 [out, in]."""
        self._check(weight)
        return quantize(weight.detach(), self.scales, self.bits)

    def fake_quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """bf16 [out, in], exactly `dequantize(codes, scales)`, with LSQ's gradients to `weight` and `theta`."""
        self._check(weight)
        return _FakeQuantize.apply(weight, self.theta, self.bits, self.group_size, self.gradient_scale)

    def _check(self, weight: torch.Tensor) -> None:
        """Another shape would be cut into other groups, or be repeated, without a word."""
        shape = (self.theta.shape[0], self.theta.shape[1] * self.group_size)
        if tuple(weight.shape) != shape:
            raise GraceError(f"these step sizes belong to a weight of {list(shape)}, not of {list(weight.shape)}")

    @torch.no_grad()
    def write(self, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Put `fake_quantize(weight)` into `out` [out, in], of any float dtype."""
        if _fused(weight) and out.dtype == torch.bfloat16 and out.is_contiguous():
            from grace.kernels.fake_quant import fake_quantize

            fake_quantize(weight.contiguous(), self.scales, self.bits, out)
        else:
            out.copy_(_value(weight, self.scales, self.bits))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, group_size={self.group_size}, groups={tuple(self.theta.shape)}"
