"""Relational alignment: linear CKA between the Gram matrices of an image's visual tokens.

Rows x_i of the penultimate decoder layer's output at one image's visual tokens, l2-normalised; K = X X^T; K_c = H K H
with H = I - 11^T / n (double centring):

    CKA = <K_cT, K_cS> / (||K_cT|| ||K_cS||),    loss = 1 - CKA = 1/2 || K_cT / ||K_cT|| - K_cS / ||K_cS|| ||^2

The right-hand form is the one computed: it is never negative and keeps its digits when CKA is close to 1. Centring the
rows (X_c = H X) centres the Gram from both sides, so the student's one [n, n] matrix is made centred, and the
gradient overwrites it. Teacher and student may differ in width. A Gram without relations (one token, or rows all
alike) has no CKA: such an image has a loss of 0 with no gradient, and the sum counts it as skipped.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grace.distill.check import check_finite
from grace.distill.log_space import at_least_fp32
from grace.errors import GraceError
from grace.first_order import first_order


def relational_cka(student_tokens: Tensor, teacher_tokens: Tensor) -> Tensor:
    """`1 - CKA` of one image's visual tokens.

    Args:
        student_tokens: [n, d_S], any float dtype
        teacher_tokens: [n, d_T], any float dtype; taken as constant

    Returns:
        scalar in [0, 1], fp32 (fp64 for fp64 tokens), with gradient to the student's tokens; 0 without gradient where
        either Gram is degenerate.

    Raises:
        GraceError: no visual tokens, different numbers of them, NaN or infinite values.
    """
    _check_tokens(teacher_tokens, "teacher")
    return relational_cka_from_gram(student_tokens, gram_matrix(teacher_tokens))


def relational_cka_from_gram(student_tokens: Tensor, teacher_gram: Tensor) -> Tensor:
    """`relational_cka` with the teacher's Gram [n, n] of l2-normalised rows (not centred) in place of its tokens."""
    _check_tokens(student_tokens, "student")
    _check_pair(student_tokens, teacher_gram)
    return _losses(student_tokens.unsqueeze(0), teacher_gram.unsqueeze(0))[0].squeeze(0)


def relational_cka_sum(
    student_tokens: Sequence[Tensor],
    teacher_tokens: Sequence[Tensor] | None = None,
    *,
    teacher_grams: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of `1 - CKA` over images, the number of images in it, and the number skipped as degenerate.

    Args:
        student_tokens: per image [n_i, d_S]
        teacher_tokens: per image [n_i, d_T], or instead
        teacher_grams: per image [n_i, n_i]

    Returns:
        three scalars that add up over micro-batches and ranks; gradient flows through the first, to the students.

    Raises:
        GraceError: no visual tokens, different numbers of them; the lists differ in length, or are empty. Values are
            not looked at: a NaN or an infinity is a loss of NaN, which a training loop asks about.
    """
    teachers = teacher_grams if teacher_tokens is None else teacher_tokens
    if teachers is None or (teacher_tokens is not None and teacher_grams is not None):
        raise GraceError("give relational_cka_sum either teacher_tokens or teacher_grams")
    if len(student_tokens) != len(teachers) or not teachers:
        raise GraceError(
            f"{len(student_tokens)} images of the student and {len(teachers)} of the teacher; give as many of both, at "
            "least one"
        )
    if teacher_grams is None:
        for tokens in teachers:
            _check_shape(tokens, "teacher")
        teachers = [gram_matrix(tokens) for tokens in teachers]
    for student, gram in zip(student_tokens, teachers, strict=True):
        _check_pair(student, gram)
    by_size: dict[int, list[int]] = {}
    for image, student in enumerate(student_tokens):
        by_size.setdefault(student.shape[0], []).append(image)
    sums = []
    for images in by_size.values():  # images of one size go together: they are many small operations
        losses, valid = _losses(
            torch.stack([student_tokens[i] for i in images]), torch.stack([teachers[i] for i in images])
        )
        sums.append((losses.sum(), valid.sum(), (~valid).sum()))
    loss, images, skipped = (torch.stack(column).sum() for column in zip(*sums, strict=True))
    return loss, images, skipped


def unit_rows(tokens: Tensor) -> Tensor:
    """Rows divided by their length [..., n, d], at least fp32; a row of zeros stays zero."""
    return _unit_rows(tokens)[0]


def _unit_rows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows [..., n, d] and one over each one's length [..., n, 1], 0 for a row of zeros; without gradient."""
    tokens = at_least_fp32(tokens.detach())
    # the length is that of the row over its largest entry, so that squares neither overflow nor vanish
    peak = tokens.abs().amax(-1, keepdim=True)
    shrunk = tokens / peak.where(peak != 0, torch.inf)  # a NaN stays one, to be seen in the loss
    inverse = shrunk.square().sum(-1, keepdim=True).where(peak != 0, 1.0).rsqrt()
    return shrunk * inverse, (inverse / peak).where(peak != 0, 0.0)


def gram_matrix(tokens: Tensor) -> Tensor:
    """The Gram matrix [..., n, n], at least fp32, of l2-normalised rows of `tokens` [..., n, d]; without gradient."""
    return _products(unit_rows(tokens))


def _products(rows: Tensor) -> Tensor:
    """rows rows^T [..., n, n], in their own precision also where autocast would lower it."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ rows.mT


def _check_tokens(tokens: Tensor, who: str) -> None:
    _check_shape(tokens, who)
    check_finite(tokens, f"the {who}'s visual tokens")


def _check_shape(tokens: Tensor, who: str) -> None:
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise GraceError(f"the {who}'s visual tokens of one image must be [n, width], not {list(tokens.shape)}")
    if tokens.shape[0] == 0:
        raise GraceError(
            f"the {who}'s visual tokens are {list(tokens.shape)}: the image has no visual tokens; leave the record out "
            "or check its image placeholder"
        )


def _check_pair(student_tokens: Tensor, teacher_gram: Tensor) -> None:
    _check_shape(student_tokens, "student")
    n = student_tokens.shape[0]
    if teacher_gram.shape != (n, n):
        raise GraceError(
            f"the student has {n} visual tokens where the teacher's Gram matrix is {list(teacher_gram.shape)}; "
            "process the image alike for both, and rebuild a cache that was made with another processor"
        )


def _losses(student_tokens: Tensor, teacher_grams: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of images of one size and which of them count, both [images]; tokens [images, n, d], Grams [images, n,
    n].
    """
    return _GramAlignment.apply(student_tokens, teacher_grams.detach())


class _GramAlignment(torch.autograd.Function):
    """Losses and the tokens' gradient in one pass; only the gradient, in the tokens' dtype, is kept for backward."""

    @staticmethod
    def forward(ctx, tokens: Tensor, teacher_grams: Tensor) -> tuple[Tensor, Tensor]:
        rows, inverse_lengths = _unit_rows(tokens)
        centred = rows - rows.mean(1, keepdim=True)
        student = _products(centred)  # [images, n, n], centred already
        if student.is_cuda:
            from grace.kernels.relational_cka import align_
        else:
            align_ = _align_
        # rounding leaves entries of about eps in the centred Gram of identical rows
        floor = 8 * torch.finfo(student.dtype).eps * tokens.shape[1]
        losses, valid = align_(student, teacher_grams, floor)  # `student` now holds d loss / d Gram
        with torch.autocast(student.device.type, enabled=False):
            gradient = student @ centred  # half that of the rows: the Gram's is symmetric, and centred like the rows
        gradient.sub_(rows * (gradient * rows).sum(2, keepdim=True)).mul_(2 * inverse_lengths)  # a length has none
        ctx.save_for_backward(gradient.to(tokens.dtype))
        ctx.mark_non_differentiable(valid)
        return losses, valid

    @staticmethod
    @first_order
    def backward(ctx, grad_losses: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_losses[:, None, None]).to(gradient.dtype), None


def _align_(student: Tensor, teacher_gram: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """`1 - CKA` of centred student Grams and uncentred teacher Grams, and whether neither is degenerate: [images].

    Overwrites `student` with the losses' gradients: -(K_cT / ||K_cT|| - CKA K_cS / ||K_cS||) / ||K_cS||.

    Args:
        student, teacher_gram: [images, n, n]
    """
    teacher = teacher_gram.to(student.dtype)
    means = teacher.mean(2, keepdim=True)
    teacher = teacher - means - means.mT + means.mean(1, keepdim=True)
    teacher_norm, student_norm = (matrix.flatten(1).norm(dim=1) for matrix in (teacher, student))  # [images]
    valid = ~((teacher_norm <= floor) | (student_norm <= floor))  # a NaN counts, to be seen in the loss
    per_image = (slice(None), None, None)
    a = teacher / teacher_norm.where(valid, 1.0)[per_image]
    b = student / student_norm.where(valid, 1.0)[per_image]
    loss = 0.5 * (a - b).flatten(1).square().sum(1)
    gradient = ((1 - loss)[per_image] * b - a) / student_norm.where(valid, 1.0)[per_image]
    student.copy_(gradient.where(valid[per_image], 0.0))
    return loss.where(valid, 0.0), valid
