"""Confidence-gated decoupled knowledge distillation (GRACE, arXiv 2601.22709).

For a supervised next-token position with label y, teacher p and student q at temperature T:

    TCKD = KL({p_y, 1 - p_y} || {q_y, 1 - q_y})          the label against the rest
    NCKD = KL(p^ || q^), p^ and q^ renormalised without y  the rest among itself
    DKD  = T^2 (alpha TCKD + beta_dkd NCKD)
    g    = exp(-H / log V), H the teacher's entropy at T = 1, in nats
    GDKD = sum over tokens of g DKD / sum over tokens of g

Gradient flows to the student alone. Arithmetic is in fp32 (fp64 for fp64 inputs) and in log space (`log_space`).
These functions are the definition; training calls `from_hidden`, which equals them without holding all logits.
"""

import math

import torch
from torch import Tensor

from grace.distill.check import check_finite, check_inputs, check_temperature
from grace.distill.log_space import at_least_fp32, binary_kl, kl_elements, label_split
from grace.errors import GraceError


def entropy_gate(teacher_logits: Tensor) -> Tensor:
    """`confidence_gate` of finite logits [tokens, vocab], fp32 or fp64, unchecked."""
    log_p = teacher_logits.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    return torch.exp(-entropy / math.log(teacher_logits.shape[1]))


def confidence_gate(teacher_logits: Tensor) -> Tensor:
    """How much each token counts: exp(-H / log V), from 1/e (uniform teacher) to 1 (certain teacher).

    Args:
        teacher_logits: [tokens, vocab], any float dtype

    Returns:
        [tokens], fp32 (fp64 for fp64 logits), without gradient.

    Raises:
        GraceError: a vocabulary of one entry, NaN or infinite logits.
    """
    teacher = teacher_logits.detach()
    if teacher.dim() != 2 or teacher.shape[1] < 2:
        raise GraceError(f"teacher logits must be [tokens, vocab] with at least 2 classes, not {list(teacher.shape)}")
    check_finite(teacher, "teacher logits")
    return entropy_gate(at_least_fp32(teacher))


def gated_dkd_terms(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """TCKD, NCKD (in nats, not yet times T^2) and gate of every token.

    Args:
        student_logits, teacher_logits: [tokens, vocab], any float dtype
        labels: [tokens], in [0, vocab)
        temperature: T > 0

    Returns:
        three tensors [tokens], fp32 (fp64 for fp64 logits); the gate carries no gradient.

    Raises:
        GraceError: shapes or vocabularies differ, labels outside the vocabulary, NaN or infinite logits.
    """
    check_inputs(student_logits, teacher_logits, labels)
    check_temperature(temperature)
    student, teacher = at_least_fp32(student_logits), at_least_fp32(teacher_logits.detach())
    return *dkd_terms(student, teacher, labels.long(), temperature), entropy_gate(teacher)


def dkd_terms(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD [tokens] of logits [tokens, vocab], fp32 or fp64, unchecked."""
    student_odds, student_rest = label_split(student_logits, labels, temperature)
    teacher_odds, teacher_rest = label_split(teacher_logits, labels, temperature)
    return binary_kl(teacher_odds, student_odds), kl_elements(teacher_rest, student_rest).sum(1)


def gated_dkd_sum(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta_dkd: float = 4.0,
) -> tuple[Tensor, Tensor]:
    """The two sums that GDKD is the ratio of: sum of g DKD (scalar) and sum of g (scalar, no gradient).

    Both add up over micro-batches and ranks. No tokens give zeros. Arguments and errors as in `gated_dkd`.
    """
    tckd, nckd, gate = gated_dkd_terms(student_logits, teacher_logits, labels, temperature)
    dkd = temperature**2 * (alpha * tckd + beta_dkd * nckd)
    return (gate * dkd).sum(), gate.sum()


def gated_dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta_dkd: float = 4.0,
) -> Tensor:
    """Gated decoupled distillation loss of aligned positions: sum of g DKD / sum of g.

    Args:
        student_logits, teacher_logits: [tokens, vocab], any float dtype; row i of both predicts labels[i]
        labels: [tokens], in [0, vocab): supervised positions only
        temperature: T > 0
        alpha, beta_dkd: weights of TCKD and NCKD

    Returns:
        scalar, fp32 (fp64 for fp64 logits), in nats times T^2; gradient to the student's logits alone.

    Raises:
        GraceError: shapes or vocabularies differ, no tokens, labels outside the vocabulary, NaN or infinite logits.
    """
    if student_logits.shape[0] == 0:
        raise GraceError("gated_dkd has no supervised tokens to average over; use gated_dkd_sum for empty batches")
    loss_sum, gate_sum = gated_dkd_sum(student_logits, teacher_logits, labels, temperature, alpha, beta_dkd)
    return loss_sum / gate_sum
