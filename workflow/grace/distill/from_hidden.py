"""The training loss straight from hidden states: head GEMMs, CE and distillation in chunks of rows (see `chunks`).

GRACE's own objective, plain KL and cross-entropy alone have a gradient written by hand (`chunk_loss`, and a Triton
kernel on a GPU); every other objective takes autograd's, chunk by chunk.
"""

from functools import partial
from typing import get_args

import torch
from torch import Tensor

from grace.distill.autograd_rows import TENSORS, autograd_rows_
from grace.distill.check import check_labels, check_labels_shape, check_states, check_temperature, check_vocabularies
from grace.distill.chunk_loss import Mode, loss_rows_
from grace.distill.chunks import Logits, RowLosses, cut_rows, loss_in_chunks
from grace.distill.gated_dkd import entropy_gate
from grace.distill.log_space import at_least_fp32
from grace.distill.objectives import TokenLoss
from grace.errors import GraceError

FUSED = get_args(Mode)


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
    mode: Mode | TokenLoss = "gated",
    ce_weight: float | Tensor = 1.0,
    kd_weight: float | Tensor = 1.0,
    gates: Tensor | None = None,
    logits_dtype: torch.dtype | None = torch.float32,
    workspace: int | None = None,
) -> dict[str, Tensor]:
    """`ce_weight * ce_sum + kd_weight * kd_sum` over supervised positions, with its gradient already made.

    Args:
        student_hidden: [tokens, d_S], the student's final hidden states (after its last norm)
        student_head: [vocab, d_S], trainable or frozen
        teacher_hidden: [tokens, d_T], from the cache; None in mode "none"
        teacher_head: [vocab, d_T]; None in mode "none"
        labels: [tokens], in [0, vocab); one outside makes the loss NaN on a GPU and raises on a CPU
        temperature, alpha, beta_dkd: of the modes "gated" and "plain"; an objective has its own
        mode: "gated" (gated DKD), "plain" (T^2 KL), "none" (cross-entropy alone), or any other objective
        ce_weight, kd_weight: floats or scalar tensors: 1 / (tokens of the global batch), and beta / (its gates in mode
            "gated" and for an objective that is `gated`, else its tokens)
        gates: [tokens], cached gates; None: computed from the teacher's logits
        logits_dtype: what both models' logits are made in (a wider head's own dtype stays); None: each head's dtype
        workspace: bytes of logits held at a time; None: 448 MiB on a GPU, 32 MiB on a CPU

    Returns:
        "loss": scalar with gradient to student_hidden and student_head where these ask for it;
        "ce_sum", "kd_sum" (gates included) and "gate_sum" (tokens where nothing is gated, 0 in mode "none"): scalars
        in fp32 (fp64 for fp64 states) without gradient, that add up over micro-batches and ranks.

    Raises:
        GraceError: shapes or vocabularies differ; on the CPU also labels outside the vocabulary.
    """
    _check(student_hidden, student_head, teacher_hidden, teacher_head, labels, gates, mode)
    check_temperature(temperature)
    labels = labels.long()
    cut = cut_rows(
        student_head, len(student_hidden), logits_dtype, workspace, TENSORS if isinstance(mode, TokenLoss) else 1
    )
    teacher = None
    if mode != "none" and teacher_hidden is not None and teacher_head is not None:  # `_check` refuses any other case
        dtype = torch.promote_types(teacher_head.dtype, logits_dtype or teacher_head.dtype)
        teacher = Logits(teacher_hidden, teacher_head, dtype, cut.inner)
    if not isinstance(mode, TokenLoss):
        if student_head.is_cuda:
            from grace.kernels.gated_dkd import loss_rows_ as fused_rows_
        else:
            fused_rows_ = loss_rows_
        fused_rows_ = partial(fused_rows_, mode=mode, temperature=temperature, alpha=alpha, beta_dkd=beta_dkd)

        def rows_(logits: Tensor, part: slice, weights: Tensor) -> RowLosses:
            teacher_logits = teacher.make(part) if teacher is not None else None
            given = gates[part] if gates is not None and mode != "none" else None
            return RowLosses(*fused_rows_(logits, teacher_logits, labels[part], weights, gates=given))

    else:
        assert teacher is not None
        objective, make = mode, teacher.make

        def rows_(logits: Tensor, part: slice, weights: Tensor) -> RowLosses:
            teacher_logits = at_least_fp32(make(part))
            gate = torch.ones_like(teacher_logits[:, 0])
            if objective.gated:
                gate = entropy_gate(teacher_logits) if gates is None else gates[part].to(gate.dtype)
            distillation = partial(_objective, objective, teacher_logits, gate)
            return autograd_rows_(logits, labels[part], weights, distillation, gate)

    return loss_in_chunks(student_hidden, student_head, rows_, cut, ce_weight, kd_weight)


def _objective(objective: TokenLoss, teacher: Tensor, gates: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    return objective(student, teacher.to(student.dtype), labels, gates)


def _check(student_hidden, student_head, teacher_hidden, teacher_head, labels, gates, mode) -> None:
    if mode not in FUSED and not isinstance(mode, TokenLoss):
        raise GraceError(f"mode is {mode!r}; it must be {', '.join(FUSED)}, or an objective from load_objective")
    states = {"student": (student_hidden, student_head)}
    if mode != "none":
        if teacher_hidden is None or teacher_head is None:
            raise GraceError(f"mode {mode!r} distils: give the teacher's hidden states and head")
        states["teacher"] = (teacher_hidden, teacher_head)
        check_vocabularies(student_head.shape[0], teacher_head.shape[0])
    for who, (hidden, head) in states.items():
        check_states(who, hidden, head)
        check_labels_shape(labels, hidden.shape[0])
    if gates is not None and gates.shape != labels.shape:
        raise GraceError(f"gates are {list(gates.shape)} where one per token, {list(labels.shape)}, is needed")
    if labels.device.type == "cpu":
        check_labels(labels, student_head.shape[0])
