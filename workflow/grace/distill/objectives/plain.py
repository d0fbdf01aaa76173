"""Plain knowledge distillation (Hinton et al., arXiv 1503.02531): T^2 KL(p || q), teacher p and student q at T."""

from torch import Tensor

from grace.distill.log_space import kl_elements, log_softmax


def plain(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """Loss of every token [tokens] in nats times T^2; `labels` take no part."""
    log_p, log_q = log_softmax(teacher_logits, temperature), log_softmax(student_logits, temperature)
    return temperature**2 * kl_elements(log_p, log_q).sum(1)
