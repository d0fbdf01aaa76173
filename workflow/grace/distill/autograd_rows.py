"""One chunk of rows of any loss, by autograd: values, and the gradient written over the student's logits.

The general form of `grace.distill.chunk_loss.loss_rows_`, whose gradient is written by hand. Autograd holds some ten
tensors of the chunk's size, so chunks are an eighth as large (`TENSORS`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from grace.distill.chunks import RowLosses
from grace.distill.log_space import at_least_fp32

TENSORS = 8


def autograd_rows_(
    student_logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    distillation: Callable[[Tensor, Tensor], Tensor],
    gate: Tensor,
) -> RowLosses:
    """Losses of each row; `student_logits` becomes d(weights[0] sum ce + weights[1] sum kd) / d student_logits.

    Args:
        student_logits: [rows, vocab], overwritten in its own dtype.
        labels: int64 [rows]; one outside [0, vocab) makes the row's losses NaN.
        weights: [2]: ce_weight, kd_weight.
        distillation: student logits [rows, vocab] and labels [rows] -> kd [rows].
        gate: [rows], handed on.
    """
    inside = (labels >= 0) & (labels < student_logits.shape[1])
    inside_labels = labels.where(inside, 0)
    with torch.enable_grad():
        student = at_least_fp32(student_logits.detach()).requires_grad_()
        ce = torch.nn.functional.cross_entropy(student, inside_labels, reduction="none")
        kd = distillation(student, inside_labels)
        ce, kd = ce.where(inside, torch.nan), kd.where(inside, torch.nan)
        (gradient,) = torch.autograd.grad(weights[0] * ce.sum() + weights[1] * kd.sum(), student)
    student_logits.copy_(gradient)
    return RowLosses(ce.detach(), kd.detach(), gate)
