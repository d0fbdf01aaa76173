"""Triton: the elementwise half of relational CKA, over the student's Gram matrices and nothing else of their size.

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
def _centred_tile(student, teacher, means, mean, n, TILE: tl.constexpr):
    """This program's tile of one image's centred matrices (zero outside), its offsets and mask."""
    image = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = (rows < n)[:, None] & (columns < n)[None, :]
    offsets = image * n * n + rows[:, None] * n + columns[None, :]
    k_s = tl.load(student + offsets, mask=mask, other=0.0)
    k_t = tl.load(teacher + offsets, mask=mask, other=0.0).to(tl.float32)
    row_means = tl.load(means + image * n + rows, mask=rows < n, other=0.0)
    column_means = tl.load(means + image * n + columns, mask=columns < n, other=0.0)
    k_t = tl.where(mask, k_t - row_means[:, None] - column_means[None, :] + tl.load(mean + image), 0.0)
    return k_s, k_t, offsets, mask


@triton.jit
def _program():
    return (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def _hsic(student, teacher, means, mean, partials, n, TILE: tl.constexpr):
    k_s, k_t, _, _ = _centred_tile(student, teacher, means, mean, n, TILE)
    partials += _program() * 3
    tl.store(partials, tl.sum(tl.sum(k_t * k_t, 1), 0))
    tl.store(partials + 1, tl.sum(tl.sum(k_s * k_s, 1), 0))
    tl.store(partials + 2, tl.sum(tl.sum(k_t * k_s, 1), 0))


@triton.jit
def _gradient(student, teacher, means, mean, scalars, partials, n, TILE: tl.constexpr):
    """Half the squared distance of the two unit matrices, and the loss's gradient over the student's Gram."""
    k_s, k_t, offsets, mask = _centred_tile(student, teacher, means, mean, n, TILE)
    scalars += tl.program_id(2) * 4
    inverse_t, inverse_s = tl.load(scalars), tl.load(scalars + 1)
    cka, valid = tl.load(scalars + 2), tl.load(scalars + 3)
    a, b = k_t * inverse_t, k_s * inverse_s
    tl.store(partials + _program(), 0.5 * tl.sum(tl.sum((a - b) * (a - b), 1), 0))
    tl.store(student + offsets, tl.where(valid > 0, (cka * b - a) * inverse_s, 0.0), mask=mask)


def align_(student: Tensor, teacher_gram: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Losses of pairs of Gram matrices and whether neither is degenerate; `student` becomes the losses' gradients.

    Args:
        student: fp32 [images, n, n], centred, contiguous; overwritten
        teacher_gram: [images, n, n], fp32, fp16 or bf16, not centred, contiguous
        floor: a centred Gram whose Frobenius norm is at most this is degenerate

    Returns:
        [images] on the device: fp32 losses (0 if degenerate, with a gradient of 0) and bool.
    """
    images, n, _ = student.shape
    if not (teacher_gram.is_contiguous() and student.is_contiguous()):
        raise ValueError("both stacks of Gram matrices must be contiguous")
    tiles = triton.cdiv(n, _TILE)
    grid = (tiles, tiles, images)
    means = teacher_gram.mean(2, dtype=torch.float32)  # [images, n]
    matrices = (student, teacher_gram, means, means.mean(1))
    partials = torch.empty(images, tiles * tiles, 3, dtype=torch.float32, device=student.device)
    _hsic[grid](*matrices, partials, n, TILE=_TILE)
    sums = partials.sum(1)  # [images, 3]
    norms = sums[:, :2].sqrt()  # teacher, student
    valid = ~(norms <= floor).any(1)  # a NaN counts, to be seen in the loss
    inverse = norms.where(valid[:, None], 1.0).reciprocal()
    cka = sums[:, 2:] * inverse.prod(1, keepdim=True)
    scalars = torch.cat([inverse, cka, valid[:, None]], 1)
    losses = torch.empty(images, tiles * tiles, dtype=torch.float32, device=student.device)
    _gradient[grid](*matrices, scalars, losses, n, TILE=_TILE)
    return losses.sum(1).where(valid, 0.0), valid
