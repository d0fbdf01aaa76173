"""Reverse KL (as in MiniLLM, arXiv 2306.08543): T^2 KL(q || p), teacher p and student q at T.

It asks the student to put no mass where the teacher has none, and not to cover all that the teacher allows.
"""

from torch import Tensor

from grace.distill.log_space import kl_elements, log_softmax


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Loss of every token [tokens] in nats times T^2; `labels` take no part."""
    log_p, log_q = log_softmax(teacher_logits, temperature), log_softmax(student_logits, temperature)
    return temperature**2 * kl_elements(log_q, log_p).sum(1)
