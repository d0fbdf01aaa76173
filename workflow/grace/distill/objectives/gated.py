"""Gated decoupled distillation, GRACE's own: g T^2 (alpha TCKD + beta_dkd NCKD), see `grace.distill.gated_dkd`."""

from torch import Tensor

from grace.distill.gated_dkd import dkd_terms


def gated(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    gates: Tensor,
    temperature: float,
    alpha: float = 1.0,
    beta_dkd: float = 4.0,
) -> Tensor:
    """Loss of every token [tokens] in nats times T^2, its gate included."""
    tckd, nckd = dkd_terms(student_logits, teacher_logits, labels, temperature)
    return gates * temperature**2 * (alpha * tckd + beta_dkd * nckd)
