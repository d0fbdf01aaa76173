"""Triton: the elementwise half of relational CKA, over one student Gram matrix and nothing else of its size.

The teacher's Gram is centred as it is read (row means come in); the three HSIC sums take one pass, loss and gradient a
second that overwrites the student's Gram. Sums go through one partial per program and a final torch sum: the same
bits in every run, which atomics would not give.

Formulas: `grace.distill.relational_cka`, whose torch form this is tested against.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 32


@triton.jit
def _centred_tile(student, teacher, means, mean, n, teacher_stride, TILE: tl.constexpr):
    """This program's tile of both centred matrices (zero outside), its offsets and mask."""
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = (rows < n)[:, None] & (columns < n)[None, :]
    offsets = rows[:, None] * n + columns[None, :]
    k_s = tl.load(student + offsets, mask=mask, other=0.0)
    k_t = tl.load(teacher + rows[:, None] * teacher_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    row_means = tl.load(means + rows, mask=rows < n, other=0.0)
    column_means = tl.load(means + columns, mask=columns < n, other=0.0)
    k_t = tl.where(mask, k_t - row_means[:, None] - column_means[None, :] + tl.load(mean), 0.0)
    return k_s, k_t, offsets, mask


@triton.jit
def _hsic(student, teacher, means, mean, partials, n, teacher_stride, TILE: tl.constexpr):
    k_s, k_t, _, _ = _centred_tile(student, teacher, means, mean, n, teacher_stride, TILE)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partials + program * 3, tl.sum(tl.sum(k_t * k_t, 1), 0))
    tl.store(partials + program * 3 + 1, tl.sum(tl.sum(k_s * k_s, 1), 0))
    tl.store(partials + program * 3 + 2, tl.sum(tl.sum(k_t * k_s, 1), 0))


@triton.jit
def _gradient(student, teacher, means, mean, scalars, partials, n, teacher_stride, TILE: tl.constexpr):
    """Half the squared distance of the two unit matrices, and the loss's gradient over the student's Gram."""
    k_s, k_t, offsets, mask = _centred_tile(student, teacher, means, mean, n, teacher_stride, TILE)
    inverse_t, inverse_s, cka, valid = (
        tl.load(scalars),
        tl.load(scalars + 1),
        tl.load(scalars + 2),
        tl.load(scalars + 3),
    )
    a, b = k_t * inverse_t, k_s * inverse_s
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partials + program, 0.5 * tl.sum(tl.sum((a - b) * (a - b), 1), 0))
    tl.store(student + offsets, (cka * b - a) * inverse_s * valid, mask=mask)


def align_(student: Tensor, teacher_gram: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Loss of two Gram matrices and whether neither is degenerate; `student` becomes the loss's gradient.

    Args:
        student: fp32 [n, n], centred, contiguous; overwritten
        teacher_gram: [n, n], fp32, fp16 or bf16, not centred
        floor: a centred Gram whose Frobenius norm is at most this is degenerate

    Returns:
        scalars on the device: fp32 loss (0 if degenerate, with a gradient of 0) and bool.
    """
    n = student.shape[0]
    tiles = triton.cdiv(n, _TILE)
    means = teacher_gram.mean(1, dtype=torch.float32)
    mean = means.mean()
    matrices = (student, teacher_gram, means, mean)
    if teacher_gram.stride(1) != 1 or not student.is_contiguous():
        raise ValueError("both Gram matrices must be contiguous along their rows")
    partials = torch.empty(tiles * tiles, 3, dtype=torch.float32, device=student.device)
    _hsic[(tiles, tiles)](*matrices, partials, n, teacher_gram.stride(0), TILE=_TILE)
    sums = partials.sum(0)
    norms = sums[:2].sqrt()  # teacher, student
    valid = ~(norms <= floor).any()  # a NaN counts, to be seen in the loss
    inverse = norms.where(valid, 1.0).reciprocal()
    scalars = torch.cat([inverse, (sums[2] * inverse.prod()).view(1), valid.view(1)])
    losses = torch.empty(tiles * tiles, dtype=torch.float32, device=student.device)
    _gradient[(tiles, tiles)](*matrices, scalars, losses, n, teacher_gram.stride(0), TILE=_TILE)
    return losses.sum().where(valid, 0.0), valid
