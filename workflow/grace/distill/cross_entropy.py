"""Cross-entropy straight from hidden states, without a teacher: the same chunks of rows as distillation (`chunks`)."""

import torch
from torch import Tensor

from grace.distill.check import check_labels, check_labels_shape, check_states
from grace.distill.chunks import RowLosses, cut_rows, loss_in_chunks
from grace.distill.log_space import at_least_fp32


def cross_entropy_from_hidden(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    ce_weight: float | Tensor = 1.0,
    logits_dtype: torch.dtype | None = torch.float32,
    workspace: int | None = None,
) -> dict[str, Tensor]:
    """`ce_weight * ce_sum` over supervised positions, with its gradient already made.

    Args:
        hidden: [tokens, d], the final hidden states (after the last norm)
        head: [vocab, d], trainable or frozen
        labels: [tokens], in [0, vocab); one outside makes the loss NaN on a GPU and raises on a CPU
        ce_weight: 1 / (tokens of the global batch)
        logits_dtype, workspace: as `grace.distill.distillation_loss_from_hidden` takes them

    Returns:
        "loss": scalar with gradient to `hidden` and `head` where these ask for it; "ce_sum": scalar in fp32 (fp64 for
        fp64 states) without gradient, that adds up over micro-batches and ranks.

    Raises:
        GraceError: shapes differ; on the CPU also labels outside the vocabulary.
    """
    check_states("student", hidden, head)
    check_labels_shape(labels, hidden.shape[0])
    if labels.device.type == "cpu":
        check_labels(labels, head.shape[0])
    labels = labels.long()

    def rows_(logits: Tensor, part: slice, weights: Tensor) -> RowLosses:
        if logits.is_cuda:
            from grace.kernels.gated_dkd import loss_rows_ as fused_rows_

            fused = fused_rows_(
                logits, None, labels[part], weights, gates=None, mode="none", temperature=1.0, alpha=0.0, beta_dkd=0.0
            )
            return RowLosses(*fused)
        ce, gradient = cross_entropy_rows(at_least_fp32(logits), labels[part], weights[0])
        logits.copy_(gradient)
        return RowLosses(ce, torch.zeros_like(ce), torch.zeros_like(ce))

    cut = cut_rows(head, len(hidden), logits_dtype, workspace)
    found = loss_in_chunks(hidden, head, rows_, cut, ce_weight, 0.0)
    return {"loss": found["loss"], "ce_sum": found["ce_sum"]}


def cross_entropy_rows(logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy [rows] of logits [rows, vocab] (fp32 or fp64), and d(weight * its sum) / d logits."""
    label = labels.unsqueeze(1)
    log_r = logits.log_softmax(1)
    ce = -log_r.gather(1, label).squeeze(1)
    gradient = log_r.exp_().scatter_add_(1, label, torch.full_like(ce, -1.0).unsqueeze(1)).mul_(weight)
    return ce, gradient
