"""Jensen-Shannon divergence (generalised as in arXiv 2306.13649), teacher p and student q at T:

    T^2 (w KL(p || m) + (1 - w) KL(q || m)),    m = w p + (1 - w) q,    w the mixture weight

At w = 1/2 it is symmetric and at most T^2 log 2.
"""

import math

import torch
from torch import Tensor

from grace.distill.log_space import kl_elements, log_softmax
from grace.errors import GraceError


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float, mixture: float = 0.5
) -> Tensor:
    """Loss of every token [tokens] in nats times T^2; `labels` take no part.

    Args:
        mixture: w, the teacher's share of m, between 0 and 1 and neither.

    Raises:
        GraceError: `mixture` is out of its range.
    """
    if not 0 < mixture < 1:
        raise GraceError(f"jensen_shannon's mixture is {mixture}; it must lie between 0 and 1")
    log_p, log_q = log_softmax(teacher_logits, temperature), log_softmax(student_logits, temperature)
    log_m = torch.logaddexp(log_p + math.log(mixture), log_q + math.log1p(-mixture))
    divergence = mixture * kl_elements(log_p, log_m) + (1 - mixture) * kl_elements(log_q, log_m)
    return temperature**2 * divergence.sum(1)
