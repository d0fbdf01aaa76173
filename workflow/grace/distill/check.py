"""What the losses refuse, in one sentence each.

The losses of whole logits, which define the method, check shapes and values (labels inside the vocabulary, finite
logits). The training path checks shapes alone, as looking at values makes the host wait for the device; it sees such
faults as a loss that is not finite, and the trainer stops there with the records named.
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
    found = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
    integers = isinstance(labels, Tensor) and labels.dtype in (
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8
    )  # fmt: skip
    if not integers or labels.shape != (tokens,):
        raise GraceError(f"labels must be a tensor of {tokens} integers, one per token, but are {found}")


def check_states(who: str, hidden: Tensor, head: Tensor) -> None:
    """Raise GraceError unless hidden states are [tokens, width] and the head [vocab, width]."""
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
        raise GraceError(
            f"the {who}'s hidden states {list(hidden.shape)} and head {list(head.shape)} do not fit: "
            "[tokens, width] and [vocab, width] are needed"
        )


def check_temperature(temperature: float) -> None:
    """Raise GraceError unless the temperature is positive and finite."""
    if not 0 < temperature < float("inf"):
        raise GraceError(f"temperature is {temperature}; it must be greater than 0 and finite")


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
