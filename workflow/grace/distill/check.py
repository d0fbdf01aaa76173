"""What the losses refuse, in one sentence each.

Shapes cost nothing and are always checked. Values (labels inside the vocabulary, finite logits) need a look at the
data: a CUDA tensor would make the host wait for the device, so the losses look only at tensors on the CPU, and a
trainer on a GPU sees the same faults as a loss that is not finite. `check_inputs` looks wherever the tensors are.
"""

import torch
from torch import Tensor

from grace.errors import GraceError


def check_shapes(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> None:
    """Raise GraceError unless student and teacher are [tokens, vocab] alike and labels are integers [tokens]."""
    if student.dim() != 2 or teacher.dim() != 2:
        raise GraceError(
            f"logits must be [tokens, vocab]: the student's are {list(student.shape)}, the teacher's "
            f"{list(teacher.shape)}; flatten the batch and keep the supervised positions"
        )
    check_vocabularies(student.shape[1], teacher.shape[1])
    if student.shape[0] != teacher.shape[0]:
        raise GraceError(
            f"student logits cover {student.shape[0]} tokens and teacher logits {teacher.shape[0]}; give both the "
            "same supervised positions"
        )
    if labels is not None:
        check_labels_shape(labels, student.shape[0])


def check_vocabularies(student: int, teacher: int) -> None:
    """Raise GraceError unless both vocabularies have the same size, of at least two classes."""
    if student != teacher:
        raise GraceError(
            f"the student's vocabulary has {student} entries and the teacher's {teacher}; distil between models of "
            "one tokenizer, and cut rows that only pad a head before the loss"
        )
    if student < 2:
        raise GraceError(f"a vocabulary of {student} entries has nothing to distil; it needs at least 2")


def check_labels_shape(labels: Tensor, tokens: int) -> None:
    """Raise GraceError unless labels are integers [tokens]."""
    if labels.shape != (tokens,) or labels.is_floating_point():
        raise GraceError(
            f"labels must be {tokens} integers, one per token, but are {labels.dtype} {list(labels.shape)}"
        )


def check_labels(labels: Tensor, vocabulary: int) -> None:
    """Raise GraceError if a label lies outside [0, vocabulary). Waits for the device of `labels`."""
    outside = (labels < 0) | (labels >= vocabulary)
    if outside.any():
        token = int(outside.nonzero()[0])
        raise GraceError(
            f"label {int(labels[token])} of token {token} lies outside the vocabulary of {vocabulary} entries; "
            "pass supervised positions only (none labelled -100)"
        )


def check_finite(values: Tensor, name: str) -> None:
    """Raise GraceError if `values` hold a NaN or an infinity. Waits for the device of `values`."""
    bad = ~torch.isfinite(values)
    if bad.any():
        where = bad.nonzero()[0].tolist()
        raise GraceError(
            f"{name} hold a NaN or an infinity, first at {where}; look at the model's weights and its inputs"
        )


def check_inputs(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> None:
    """Every check of shapes and values, on any device; raises GraceError.

    Args:
        student_logits, teacher_logits: [tokens, vocab]
        labels: [tokens] integers, or None where the loss needs none
    """
    check_shapes(student_logits, teacher_logits, labels)
    if labels is not None:
        check_labels(labels, student_logits.shape[1])
    check_finite(student_logits, "student logits")
    check_finite(teacher_logits, "teacher logits")


def check_cheaply(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> None:
    """Shapes always; values only where looking at them does not make the host wait for a device."""
    if student_logits.device.type == "cpu" and teacher_logits.device.type == "cpu":
        check_inputs(student_logits, teacher_logits, labels)
    else:
        check_shapes(student_logits, teacher_logits, labels)
