"""DIST's inter-class relation (Huang et al., arXiv 2205.10536): T^2 (1 - r(p, q)), teacher p and student q at T.

r is Pearson's correlation of one token's two rows of probabilities over the vocabulary. With a and b the centred rows
divided by their lengths, 1 - r = |a - b|^2 / 2, which keeps its digits where r is close to 1.

The paper adds an intra-class relation, the correlation of each class's probability over the samples of a batch. That
one is not here: it has no sum over tokens, so its value would depend on how a batch is cut into micro-batches.
"""

import torch
from torch import Tensor

from grace.distill.log_space import log_softmax


def dist(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Loss of every token [tokens], between 0 and 2 T^2; `labels` take no part.

    A row of equal probabilities has no correlation: its loss is 0, without gradient.
    """
    teacher, related_t = _unit(log_softmax(teacher_logits, temperature).exp())
    student, related_s = _unit(log_softmax(student_logits, temperature).exp())
    losses = 0.5 * temperature**2 * (teacher - student).square().sum(1)
    return losses * (related_t & related_s)


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [tokens, vocab] of probabilities centred and of length 1, and which of them [tokens] are not all alike."""
    centred = rows - rows.mean(1, keepdim=True)
    squares = centred.square().sum(1, keepdim=True)
    floor = (8 * torch.finfo(rows.dtype).eps) ** 2 / rows.shape[1]  # what rounding leaves of equal entries 1 / vocab
    varies = ~(squares <= floor)  # a NaN counts, to be seen in the loss
    return centred * squares.where(varies, 1.0).rsqrt(), varies.squeeze(1)
