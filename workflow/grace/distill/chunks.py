"""A loss over rows of logits, straight from hidden states: forward and backward in one pass over chunks of rows.

The logits of a batch are its largest tensors (2048 tokens x 151,936 classes in fp32: 1.2 GB, several times over in a
composed loss). Here a chunk of student logits is made, turned into its own gradient in place, multiplied back into
the gradients of hidden states and head, and dropped. The weights of the sums must therefore be known beforehand,
which they are: token counts come from the batch and the sum of gates from the teacher's cache.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grace.first_order import first_order

# bytes of logits held at a time; the CPU's reference also holds about ten fp32 tensors of one inner chunk
WORKSPACE = {"cuda": 448 << 20, "cpu": 32 << 20}


class RowLosses(NamedTuple):
    """Per row, at least fp32 [rows]: cross-entropy in nats, distillation loss times its gate, and the gate."""

    ce: Tensor
    kd: Tensor
    gate: Tensor


Rows = Callable[[Tensor, slice, Tensor], RowLosses]
"""(student logits [rows, vocab], which tokens they are, weights [2]) -> losses. It overwrites the logits with
d(weights[0] sum ce + weights[1] sum kd) / d logits."""


class Cut(NamedTuple):
    """How a batch is gone through.

    Attributes:
        dtype: of the logits.
        outer: rows of student logits that are held, and multiplied back, at a time.
        inner: rows that the loss is given at a time.
    """

    dtype: torch.dtype
    outer: int
    inner: int


def cut_rows(
    head: Tensor, tokens: int, logits_dtype: torch.dtype | None, workspace: int | None = None, tensors: int = 1
) -> Cut:
    """The cut for a head [vocab, d].

    Args:
        logits_dtype: what logits are made in, unless the head is wider; None: the head's dtype.
        workspace: bytes of logits held at a time, the student's and the teacher's two to one; None: `WORKSPACE`.
        tensors: for how many tensors of an inner chunk's size that share of the workspace is.
    """
    dtype = torch.promote_types(head.dtype, logits_dtype or head.dtype)
    workspace = workspace or WORKSPACE[head.device.type]
    # the student's chunk is the larger because each one passes once more over the head's gradient
    outer = max(2, 2 * workspace // (3 * head.shape[0] * dtype.itemsize))
    if outer >= 256:
        outer -= outer % 256  # whole tiles of the GEMMs
    return Cut(dtype, min(outer, tokens), min(max(1, outer // (2 * tensors)), tokens))


class Logits:
    """Chunks of `hidden @ head.T` in `dtype`, each written over the one before.

    Args:
        hidden: [tokens, d], taken as constant.
        head: [vocab, d].
        dtype: of the logits. On a GPU the GEMM reads the head's dtype, adds up in fp32 and rounds to `dtype` alone; a
            CPU widens both factors.
        rows: the most rows of one chunk.
    """

    def __init__(self, hidden: Tensor, head: Tensor, dtype: torch.dtype, rows: int) -> None:
        factor = head.dtype if head.is_cuda else dtype
        self.hidden, self.head = hidden.detach().to(factor), head.detach().to(factor)
        self.buffer = torch.empty(rows, head.shape[0], dtype=dtype, device=head.device)

    def make(self, part: slice) -> Tensor:
        """Logits [rows, vocab] of the tokens `part`."""
        rows = self.hidden[part]
        out = self.buffer[: len(rows)]
        if out.dtype == rows.dtype:
            return torch.mm(rows, self.head.T, out=out)
        return torch.mm(rows, self.head.T, out_dtype=out.dtype, out=out)


def loss_in_chunks(
    student_hidden: Tensor,
    student_head: Tensor,
    rows_: Rows,
    cut: Cut,
    ce_weight: float | Tensor,
    kd_weight: float | Tensor,
) -> dict[str, Tensor]:
    """`ce_weight * ce_sum + kd_weight * kd_sum`, with its gradient already made.

    Args:
        student_hidden: [tokens, d].
        student_head: [vocab, d].
        rows_: the loss of a chunk.
        cut: from `cut_rows`.
        ce_weight, kd_weight: floats or scalar tensors.

    Returns:
        as `grace.distill.distillation_loss_from_hidden`.
    """
    weights = torch.empty(2, dtype=torch.promote_types(cut.dtype, torch.float32), device=student_head.device)
    for slot, weight in zip(weights, (ce_weight, kd_weight), strict=True):
        slot.fill_(weight) if isinstance(weight, (int, float)) else slot.copy_(weight)
    loss, ce_sum, kd_sum, gate_sum = _LossInChunks.apply(student_hidden, student_head, weights, rows_, cut)
    return {"loss": loss, "ce_sum": ce_sum, "kd_sum": kd_sum, "gate_sum": gate_sum}


class _LossInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_hidden, student_head, weights, rows_, cut):
        with torch.autocast(student_head.device.type, enabled=False):
            sums, *gradients = _run(student_hidden, student_head, weights, rows_, cut, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
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
        return (*gradients, None, None, None)


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


def _run(
    student_hidden: Tensor, student_head: Tensor, weights: Tensor, rows_: Rows, cut: Cut, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sums [3] (ce, kd, gate), and the gradients of hidden states and head where `needs` says so."""
    tokens = len(student_hidden)
    student = Logits(student_hidden, student_head, cut.dtype, cut.outer)
    head = student.head
    hidden_gradient = torch.empty_like(student.hidden) if needs[0] else None
    head_gradient = None
    if needs[1]:
        head_gradient = torch.empty_like(head) if tokens else torch.zeros_like(head)
    losses = []
    for start in range(0, tokens, max(cut.outer, 1)):
        whole = slice(start, min(start + cut.outer, tokens))
        logits = student.make(whole)
        for first in range(start, whole.stop, cut.inner):
            part = slice(first, min(first + cut.inner, whole.stop))
            losses.append(rows_(logits[first - start : part.stop - start], part, weights))
        gradient = logits.to(head.dtype)
        if hidden_gradient is not None:
            torch.mm(gradient, head, out=hidden_gradient[whole])
        if head_gradient is not None:
            head_gradient.addmm_(gradient.T, student.hidden[whole], beta=int(start > 0))  # the first chunk overwrites

    if losses:
        sums = torch.stack([torch.cat(part).sum() for part in zip(*losses, strict=True)]).to(weights.dtype)
    else:
        sums = torch.zeros(3, dtype=weights.dtype, device=weights.device)
    if hidden_gradient is not None:
        hidden_gradient = hidden_gradient.to(student_hidden.dtype)
    if head_gradient is not None:
        head_gradient = head_gradient.to(student_head.dtype)
    return sums, hidden_gradient, head_gradient
