"""The loss of one micro-batch, as sums over the global batch's normalisers, so that any cut gives the same gradient.

Without a teacher it is CE, a mean over the global batch's supervised tokens. `grace.train.distillation` adds the rest,
in a module of its own, so that an edit there trains nothing again that has no teacher.
"""

from collections.abc import Sequence
from typing import Any, Protocol, Self, cast

import torch
from torch import nn

from grace.config.job_parameters import TrainRun
from grace.data import Batch, Example
from grace.distill.cross_entropy import cross_entropy_from_hidden
from grace.models import forward_inputs, head_weight, output_head

LOGITS_ROWS = 512  # tokens whose logits are made together where nothing is trained on them


class Targets(Protocol):
    """What the teacher says of a micro-batch."""

    def to(self, device: torch.device) -> Self: ...

    def pin_memory(self) -> Self: ...


class Objective:
    """Cross-entropy, and the frame that distillation hangs its losses into."""

    def __init__(self, model: nn.Module, run: TrainRun, vocabulary: int) -> None:
        """`vocabulary` is the tokenizer's V: rows of the head beyond it get no probability and no gradient."""
        self.model, self.run, self.vocabulary = model, run, vocabulary
        self.device = output_head(model).weight.device
        self.logits_dtype = torch.float32 if run.method.logits_dtype == "float32" else None

    def check(self, examples: Sequence[Example]) -> None:
        """Refuse conversations that the teacher has not seen."""

    def targets(self, keys: Sequence[str]) -> Targets | None:
        """What the teacher says of these conversations; called in the background."""
        return None

    def totals(self, chosen: Sequence[Example], step: int) -> dict[str, float]:
        """What the sums of a global batch are divided by, and its weights at `step`; known before its first forward."""
        return {"tokens": float(sum(example.supervised_tokens() for example in chosen))}

    def backward(
        self, batch: Batch, target: Targets | None, totals: dict[str, float], share: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """Forward and backward of one micro-batch against the teacher's record of it.

        Returns its part of each global loss (the parts add up), as scalars on the device: the host runs ahead of it.
        `share` is 1, or 0 for a process that has nothing left to do but must keep step with the others.
        """
        rows, columns, labels = batch.supervised()
        rows, columns, labels = map(self._here, (*batch.place(rows, columns), labels))
        inputs = forward_inputs(self.model, batch.input_ids, batch.attention_mask, batch.pixels, batch.packed)
        decoder = cast(nn.Module, self.model.model)  # without the head
        outputs = decoder(**inputs, use_cache=False, output_hidden_states=self.run.rcka)
        target = target.to(self.device) if target is not None else None
        states = outputs.last_hidden_state[rows, columns]  # [tokens, d]
        loss, parts = self._token_losses(states, labels, target, totals, share)
        if self.run.rcka:
            aligned, more = self._image_losses(outputs.hidden_states, batch, target, totals, share)
            loss, parts = loss + aligned, parts | more
        loss.backward()
        return parts | {"loss": loss.detach()}

    @torch.no_grad()
    def cross_entropy(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """The sum of the cross-entropy over a batch's labels, fp64 on the device, and how many there are."""
        rows, columns, labels = batch.supervised()
        rows, columns, labels = map(self._here, (*batch.place(rows, columns), labels))
        inputs = forward_inputs(self.model, batch.input_ids, batch.attention_mask, batch.pixels, batch.packed)
        states = cast(nn.Module, self.model.model)(**inputs, use_cache=False).last_hidden_state[rows, columns]
        head, total = head_weight(self.model, self.vocabulary), torch.zeros((), dtype=torch.float64, device=self.device)
        for some, asked in zip(states.split(LOGITS_ROWS), labels.split(LOGITS_ROWS), strict=True):
            total += nn.functional.cross_entropy(some.float() @ head.float().T, asked, reduction="sum")
        return total, len(labels)

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _token_losses(
        self, states: torch.Tensor, labels: torch.Tensor, target: Any, totals: dict[str, float], share: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of states [tokens, d] against labels [tokens] and the teacher's record, and its parts."""
        weight = share / totals["tokens"]
        head = head_weight(self.model, self.vocabulary)
        losses = cross_entropy_from_hidden(states, head, labels, ce_weight=weight, logits_dtype=self.logits_dtype)
        return losses["loss"], {"ce": losses["ce_sum"] * weight}

    def _image_losses(
        self, states: Any, batch: Batch, target: Any, totals: dict[str, float], share: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of every layer's states [batch, length, d] at the images' tokens, and its parts."""
        raise NotImplementedError("only a teacher has something to say of images")

    def logged(self, totals: dict[str, float]) -> dict[str, float]:
        """What the training log says of a step besides its losses."""
        return {}

    def applied(self, parts: dict[str, float]) -> None:
        """A step with these global losses was applied."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint kept."""
