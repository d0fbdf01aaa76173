"""Plain knowledge distillation, the baseline: T^2 KL(p || q) over the whole vocabulary at temperature T."""

import torch
from torch import Tensor

from grace.distill.check import check_inputs, check_temperature
from grace.distill.log_space import at_least_fp32, kl_elements


def plain_kd_sum(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> tuple[Tensor, Tensor]:
    """Sum over tokens of T^2 KL(teacher || student) at temperature T, and the number of tokens.

    Args:
        student_logits, teacher_logits: [tokens, vocab], any float dtype
        temperature: T > 0

    Returns:
        two scalars, fp32 (fp64 for fp64 logits): the sum, with gradient to the student alone, and the token count.
        Both add up over micro-batches and ranks.

    Raises:
        GraceError: shapes or vocabularies differ, NaN or infinite logits.
    """
    check_inputs(student_logits, teacher_logits)
    check_temperature(temperature)
    student, teacher = at_least_fp32(student_logits), at_least_fp32(teacher_logits.detach())
    # shifted before the division, so that large logits keep the digits in which classes differ
    log_q = ((student - student.detach().amax(1, keepdim=True)) / temperature).log_softmax(1)
    log_p = ((teacher - teacher.amax(1, keepdim=True)) / temperature).log_softmax(1)
    loss_sum = temperature**2 * kl_elements(log_p, log_q).sum()
    return loss_sum, torch.full_like(loss_sum.detach(), student.shape[0])
