"""The training loss straight from hidden states: head GEMMs, CE and distillation in chunks of rows.

The logits of a batch are its largest tensors (2048 tokens x 151,936 classes in fp32: 1.2 GB, several times over in a
composed loss). Here a chunk of student logits is made, turned into its own gradient in place, multiplied back into
the gradients of hidden states and head, and dropped; so forward and backward are one pass, done in `forward`. The
weights of the sums must therefore be known beforehand, which they are: token counts come from the batch and the sum
of gates from the teacher's cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from grace.distill.check import check_labels, check_labels_shape, check_temperature, check_vocabularies
from grace.distill.chunk_loss import Mode, loss_rows_
from grace.errors import GraceError
from grace.first_order import first_order

# bytes of logits held at a time; the CPU's reference also holds about ten fp32 tensors of one teacher chunk
WORKSPACE = {"cuda": 448 << 20, "cpu": 32 << 20}


@dataclass(frozen=True)
class _Options:
    mode: Mode
    temperature: float
    alpha: float
    beta_dkd: float
    workspace: int


def distillation_loss_from_hidden(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta_dkd: float = 4.0,
    mode: Mode = "gated",
    ce_weight: float | Tensor = 1.0,
    kd_weight: float | Tensor = 1.0,
    gates: Tensor | None = None,
    workspace: int | None = None,
) -> dict[str, Tensor]:
    """`ce_weight * ce_sum + kd_weight * kd_sum` over supervised positions, with its gradient already made.

    Args:
        student_hidden: [tokens, d_S], the student's final hidden states (after its last norm)
        student_head: [vocab, d_S], trainable or frozen
        teacher_hidden: [tokens, d_T], from the cache; None in mode "none"
        teacher_head: [vocab, d_T]; None in mode "none". Logits are made in the head's dtype, as the teacher made them
        labels: [tokens], in [0, vocab); one outside makes the loss NaN on a GPU and raises on a CPU
        temperature, alpha, beta_dkd: of the distillation loss
        mode: "gated" (gated DKD), "plain" (T^2 KL) or "none" (cross-entropy alone)
        ce_weight, kd_weight: floats or scalar tensors: 1 / (tokens of the global batch), and beta / (its gates;
            tokens in mode "plain")
        gates: [tokens], cached gates; None: computed from the teacher's logits
        workspace: bytes of logits held at a time; None: 448 MiB on a GPU, 32 MiB on a CPU

    Returns:
        "loss": scalar with gradient to student_hidden and student_head where these ask for it;
        "ce_sum", "kd_sum" (gates included) and "gate_sum" (tokens in mode "plain", 0 in "none"): scalars in fp32
        (fp64 for fp64 states) without gradient, that add up over micro-batches and ranks.

    Raises:
        GraceError: shapes or vocabularies differ; on the CPU also labels outside the vocabulary.
    """
    _check(student_hidden, student_head, teacher_hidden, teacher_head, labels, gates, mode)
    check_temperature(temperature)
    labels = labels.long()
    options = _Options(mode, temperature, alpha, beta_dkd, workspace or WORKSPACE[student_head.device.type])
    dtype = torch.promote_types(student_head.dtype, torch.float32)
    weights = torch.empty(2, dtype=dtype, device=student_head.device)
    for slot, weight in zip(weights, (ce_weight, kd_weight), strict=True):
        slot.fill_(weight) if isinstance(weight, (int, float)) else slot.copy_(weight)
    if mode == "none":
        teacher_hidden = teacher_head = gates = None
    loss, ce_sum, kd_sum, gate_sum = _FusedLoss.apply(
        student_hidden, student_head, teacher_hidden, teacher_head, labels, weights, gates, options
    )
    return {"loss": loss, "ce_sum": ce_sum, "kd_sum": kd_sum, "gate_sum": gate_sum}


def _check(student_hidden, student_head, teacher_hidden, teacher_head, labels, gates, mode) -> None:
    if mode not in ("gated", "plain", "none"):
        raise GraceError(f"mode is {mode!r}; it must be gated, plain or none")
    states = {"student": (student_hidden, student_head)}
    if mode != "none":
        if teacher_hidden is None or teacher_head is None:
            raise GraceError(f"mode {mode!r} distils: give the teacher's hidden states and head")
        states["teacher"] = (teacher_hidden, teacher_head)
        check_vocabularies(student_head.shape[0], teacher_head.shape[0])
    for who, (hidden, head) in states.items():
        if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1]:
            raise GraceError(
                f"the {who}'s hidden states {list(hidden.shape)} and head {list(head.shape)} do not fit: "
                "[tokens, width] and [vocab, width] are needed"
            )
        check_labels_shape(labels, hidden.shape[0])
    if gates is not None and gates.shape != labels.shape:
        raise GraceError(f"gates are {list(gates.shape)} where one per token, {list(labels.shape)}, is needed")
    if labels.device.type == "cpu":
        check_labels(labels, student_head.shape[0])


def chunk_rows(vocabulary: int, itemsize: int, workspace: int) -> tuple[int, int]:
    """Rows of student logits, and of teacher logits, that fit `workspace` bytes two to one.

    The student's chunk is the larger because each one passes once more over the head's gradient.
    """
    student = max(2, 2 * workspace // (3 * vocabulary * itemsize))
    if student >= 256:
        student -= student % 256  # whole tiles of the GEMMs
    return student, student // 2


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, labels, weights, gates, options):
        with torch.autocast(student_head.device.type, enabled=False):
            sums, hidden_gradient, head_gradient = _run(
                student_hidden, student_head, teacher_hidden, teacher_head, labels, weights, gates, options,
                ctx.needs_input_grad[:2],
            )  # fmt: skip
        ctx.save_for_backward(hidden_gradient, head_gradient)
        loss = torch.dot(weights, sums[:2])
        outputs = (loss, *sums.unbind())
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @first_order
    def backward(ctx, grad_loss, *_):
        gradients = ctx.saved_tensors
        for saved in gradients:
            if saved is not None:
                _scale_(saved, grad_loss)
        return (*gradients, None, None, None, None, None, None)


def _scale_(gradient: Tensor, factor: Tensor) -> None:
    """`gradient *= factor`, where it is: a head's gradient is too large to hold twice, or to pass over for nothing.

    A second backward would scale it again; torch is told of the change, and refuses that.
    """
    if gradient.is_cuda:
        from grace.kernels.gated_dkd import scale_

        scale_(gradient, factor)
    elif factor != 1:
        gradient.mul_(factor)
    torch.autograd.graph.increment_version(gradient)


def _run(student_hidden, student_head, teacher_hidden, teacher_head, labels, weights, gates, options, needs):
    """Sums [3] (ce, kd, gate), and the gradients of hidden states and head where `needs` says so."""
    if student_head.is_cuda:
        from grace.kernels.gated_dkd import loss_rows_ as rows_
    else:
        rows_ = loss_rows_
    tokens, vocabulary = student_hidden.shape[0], student_head.shape[0]
    hidden = student_hidden.detach().to(student_head.dtype)
    hidden_gradient = torch.empty_like(hidden) if needs[0] else None
    head_gradient = None
    if needs[1]:
        head_gradient = torch.empty_like(student_head) if tokens else torch.zeros_like(student_head)
    outer, inner = chunk_rows(vocabulary, student_head.element_size(), options.workspace)
    outer, inner = min(outer, tokens), min(inner, tokens)
    student_buffer = hidden.new_empty(outer, vocabulary)
    if teacher_head is not None:
        teacher_hidden = teacher_hidden.to(teacher_head.dtype)
        teacher_buffer = teacher_head.new_empty(inner, vocabulary)

    losses = []
    for start in range(0, tokens, max(outer, 1)):
        rows = hidden[start : start + outer]
        logits = torch.mm(rows, student_head.T, out=student_buffer[: len(rows)])
        for first in range(start, start + len(rows), inner):
            part = slice(first, min(first + inner, start + len(rows)))
            student_logits = logits[first - start : part.stop - start]
            teacher_logits = None
            if teacher_head is not None:
                teacher_logits = torch.mm(
                    teacher_hidden[part], teacher_head.T, out=teacher_buffer[: len(student_logits)]
                )
            losses.append(
                rows_(
                    student_logits, teacher_logits, labels[part], weights,
                    mode=options.mode, temperature=options.temperature, alpha=options.alpha,
                    beta_dkd=options.beta_dkd, gates=gates[part] if gates is not None else None,
                )
            )  # fmt: skip
        if hidden_gradient is not None:
            torch.mm(logits, student_head, out=hidden_gradient[start : start + len(rows)])
        if head_gradient is not None:
            head_gradient.addmm_(logits.T, rows, beta=int(start > 0))  # the first chunk overwrites

    if losses:
        sums = torch.stack([torch.cat(part).sum() for part in zip(*losses, strict=True)]).to(weights.dtype)
    else:
        sums = torch.zeros(3, dtype=weights.dtype, device=weights.device)
    if hidden_gradient is not None:
        hidden_gradient = hidden_gradient.to(student_hidden.dtype)
    return sums, hidden_gradient, head_gradient
