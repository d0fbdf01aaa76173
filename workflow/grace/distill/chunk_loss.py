"""One chunk of rows of the fused loss: values, and the gradient written over the student's logits.

This is the torch form, used on a CPU and as the reference of the Triton kernel `grace.kernels.gated_dkd`. With
p, q the label's probability at T, p^, q^ the others', r the student's softmax at T = 1 and c = kd_weight g T:

    d loss / d s_y = ce_weight (r_y - 1) + c alpha (q - p)
    d loss / d s_j = ce_weight r_j       + c (beta_dkd (q^_j - p^_j) - alpha (q - p) q^_j)

Plain KD is the same with g = 1, alpha = 1 and beta_dkd = 1 - p, since KL = TCKD + (1 - p) NCKD.
"""

from typing import Literal

import torch
from torch import Tensor

from grace.distill.chunks import RowLosses
from grace.distill.cross_entropy import cross_entropy_rows
from grace.distill.gated_dkd import entropy_gate
from grace.distill.log_space import at_least_fp32, binary_kl, kl_elements, label_split

Mode = Literal["gated", "plain", "none"]


def loss_rows_(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    *,
    mode: Mode,
    temperature: float,
    alpha: float,
    beta_dkd: float,
    gates: Tensor | None = None,
) -> RowLosses:
    """Losses of each row; `student_logits` becomes d(ce_weight sum ce + kd_weight sum kd) / d student_logits.

    Args:
        student_logits: [rows, vocab], overwritten in its own dtype
        teacher_logits: [rows, vocab]; None in mode "none"
        labels: [rows], in [0, vocab)
        weights: [2]: ce_weight, kd_weight
        gates: [rows], in place of those computed from the teacher's logits (mode "gated")
    """
    student = at_least_fp32(student_logits)
    label = labels.unsqueeze(1)
    ce, gradient = cross_entropy_rows(student, labels, weights[0])
    if mode == "none" or teacher_logits is None:
        student_logits.copy_(gradient)
        return RowLosses(ce, torch.zeros_like(ce), torch.zeros_like(ce))

    teacher = at_least_fp32(teacher_logits).to(student.dtype)
    student_odds, student_rest = label_split(student, labels, temperature)
    teacher_odds, teacher_rest = label_split(teacher, labels, temperature)
    tckd = binary_kl(teacher_odds, student_odds)
    nckd = kl_elements(teacher_rest, student_rest).sum(1)
    beta = torch.full_like(ce, beta_dkd)  # [rows]
    if mode == "plain":
        gate, alpha, beta = torch.ones_like(ce), 1.0, torch.sigmoid(-teacher_odds)
    else:
        gate = entropy_gate(teacher) if gates is None else gates.to(student.dtype)
    kd = gate * temperature**2 * (alpha * tckd + beta * nckd)

    # q - p as a difference of small numbers even where both are close to 1
    shift = student_odds.sigmoid() * (-teacher_odds).sigmoid() - teacher_odds.sigmoid() * (-student_odds).sigmoid()
    scale = weights[1] * gate * temperature  # [rows]
    q, p = student_rest.exp_(), teacher_rest.exp_()
    others = (q - p) * (scale * beta).unsqueeze(1) - q * (scale * alpha * shift).unsqueeze(1)
    gradient += others.scatter_(1, label, (scale * alpha * shift).unsqueeze(1))
    student_logits.copy_(gradient)
    return RowLosses(ce, kd, gate)
