"""GPTQ (arXiv 2210.17323): round column by column, and let the columns to come make up for each error.

With H = X^T X damped by 1% of its mean diagonal and U the upper Cholesky factor of H^-1, rounding column j to q_j
leaves the error e = (w_j - q_j) / U_jj, and every later column k takes w_k -= e U_jk: the optimal brain surgeon's
update. Step sizes are the best of 20 by squared error, taken when a group is reached, from its updated weights; a
group is also the block after which the rest of the matrix is updated at once.
"""

from typing import cast

import torch
from torch import nn

from grace.errors import GraceError
from grace.precision import code_range
from grace.quant.calibration import INPUTS, Moments
from grace.quant.grid import best_scales, dequantize, group_count

DAMPING = 0.01


def inverse_factor(second: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Upper Cholesky factor, float64 [in, in], of the inverse of damped H [in, in]."""
    hessian = second.double().clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    diagonal += damping * mean if mean > 0 else 1.0
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        raise GraceError(
            "gptq: the activations' second moments are not positive definite; raise quantization.calibration"
        )
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)


def gptq(
    weight: torch.Tensor, second: torch.Tensor, bits: int, group_size: int, name: str = "weight"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round one linear.

    Args:
        weight: [out, in], any float dtype.
        second: fp32 [in, in], the sum over tokens of x x^T of its inputs.

    Returns:
        int8 codes [out, in] and bf16 scales [out, in / group_size].
    """
    lowest, highest = code_range(bits)
    groups = group_count(weight.shape[1], group_size, name)
    factor = inverse_factor(second).float()
    left = weight.float().clone()
    codes = torch.empty(left.shape, dtype=torch.int8, device=left.device)
    scales = torch.empty(left.shape[0], groups, dtype=torch.bfloat16, device=left.device)
    for group in range(groups):
        begin, end = group * group_size, (group + 1) * group_size
        block, own = left[:, begin:end], factor[begin:end, begin:end]
        scales[:, group] = best_scales(block, bits, group_size, name)[:, 0]
        step = scales[:, group].float()
        errors = torch.empty_like(block)
        for column in range(group_size):
            code = (block[:, column] / step).clamp(lowest, highest).round()
            codes[:, begin + column] = code.to(torch.int8)
            errors[:, column] = (block[:, column] - code * step) / own[column, column]
            block[:, column:] -= errors[:, column, None] * own[column, column:]
        left[:, end:] -= errors @ factor[begin:end, end:]
    return codes, scales


def round_layer(
    layer: nn.Module, moments: dict[str, Moments], bits: int, group_size: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Round a decoder layer's linears in place; (codes, scales) by part."""
    rounded = {}
    for source, parts in INPUTS.items():
        for part in parts:
            linear = cast(nn.Linear, layer.get_submodule(part))
            rounded[part] = gptq(linear.weight, moments[source].second, bits, group_size, part)
            linear.weight.copy_(dequantize(*rounded[part]))
    return rounded
