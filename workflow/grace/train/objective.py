"""The loss of one micro-batch, as sums over the global batch's normalisers, so that any cut gives the same gradient.

`CE + beta * KD + omega * RCKA`, where CE is a mean over the global batch's supervised tokens, KD over its sum of gates
where the objective is gated, else over its tokens, and RCKA over its images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from grace.config.runs import TrainRun
from grace.data import Batch, Example
from grace.distill import TokenLoss, distillation_loss_from_hidden, load_objective, relational_cka_sum
from grace.distill.chunk_loss import Mode
from grace.distill.from_hidden import FUSED
from grace.errors import GraceError
from grace.models import forward_inputs, head_weight, image_token_id, output_head
from grace.teacher.reader import CachedTargets, TeacherCache
from grace.teacher.sampled import distillation_loss_from_record


@dataclass
class Totals:
    """What the global batch is divided by, and the weights of this step."""

    tokens: float
    gates: float
    images: float
    beta: float
    omega: float


class Objective:
    """The training loss of one recipe.

    Raises:
        GraceError: the recipe distils and there is no cache, or its vocabulary is another.
    """

    def __init__(self, model: nn.Module, run: TrainRun, cache: TeacherCache | None, vocabulary: int) -> None:
        """`vocabulary` is the tokenizer's V: rows of the head beyond it get no probability and no gradient."""
        self.model, self.run, self.cache, self.vocabulary = model, run, cache, vocabulary
        self.device = output_head(model).weight.device
        self.image_token = image_token_id(model)
        self.distils = run.kd != "none" or run.rcka
        self.logits_dtype = torch.float32 if run.method.logits_dtype == "float32" else None
        self.mode: Mode | TokenLoss = "none"
        self.teacher_head: torch.Tensor | None = None
        if self.distils and cache is None:
            raise GraceError("this recipe distils: give the teacher's cache (--cache)")
        if cache is not None and run.kd != "none":
            self._distil_from(cache, run)
        self.gated = self.mode.gated if isinstance(self.mode, TokenLoss) else self.mode == "gated"

    def _distil_from(self, cache: TeacherCache, run: TrainRun) -> None:
        if cache.vocabulary != self.vocabulary:
            raise GraceError(
                f"{cache.folder}: the teacher's vocabulary has {cache.vocabulary} entries, the student's "
                f"{self.vocabulary}; distil between models of one tokenizer"
            )
        fused = next((mode for mode in FUSED if mode == run.kd), None)
        self.mode = fused or load_objective(run.kd, {**run.method.model_dump(), **run.constants})
        if cache.format != "sampled":
            self.teacher_head = cache.head.to(self.device)
        elif fused is None:
            raise GraceError(f"{cache.folder}: `{run.kd}` needs the teacher's full logits; set cache.format to hidden")

    def totals(self, chosen: Sequence[Example], beta: float, omega: float) -> Totals:
        """The normalisers of a global batch, known before its first forward pass."""
        tokens = sum(example.supervised_tokens() for example in chosen)
        gates: float = tokens
        if self.gated:
            assert self.cache is not None
            gates = self.cache.gate_sum([e.key for e in chosen])
        images = sum(len(example.images) for example in chosen)
        return Totals(float(tokens), float(gates), float(max(images, 1)), beta, omega)

    def backward(
        self, batch: Batch, target: CachedTargets | None, totals: Totals, share: float = 1.0
    ) -> dict[str, torch.Tensor]:
        """Forward and backward of one micro-batch against the teacher's record of it.

        Returns its part of each global loss (the parts add up), as scalars on the device: the host runs ahead of it.
        `share` is 1, or 0 for a process that has nothing left to do but must keep step with the others.
        """
        run, device = self.run, self.device

        def here(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        rows, columns, labels = batch.supervised()
        rows, columns, labels = (*map(here, batch.place(rows, columns)), here(labels))
        inputs = forward_inputs(self.model, batch.input_ids, batch.attention_mask, batch.pixels, batch.packed)
        decoder = cast(nn.Module, self.model.model)  # without the head
        outputs = decoder(**inputs, use_cache=False, output_hidden_states=run.rcka)
        target = target.to(device) if target is not None else None
        states = outputs.last_hidden_state[rows, columns]  # [tokens, d]
        losses = self._token_losses(states, labels, target, totals, share)
        loss = losses["loss"]
        parts = {"ce": losses["ce_sum"] * (share / totals.tokens)}
        if run.kd != "none":
            parts["kd"] = losses["kd_sum"] * (share / totals.gates)
        if run.rcka:
            at, place, sizes = batch.visual(self.image_token)  # asked of the host's copy: the device is not waited for
            at, place = map(here, batch.place(at, place))
            tokens = outputs.hidden_states[-2][at, place].split(sizes)  # per image [n, d]
            rcka = skipped = loss.detach().new_zeros(())  # a micro-batch of text alone has no image to align
            if sizes:
                assert target is not None
                rcka, _, skipped = relational_cka_sum(tokens, teacher_grams=target.grams)
            rcka = rcka * (share / totals.images)
            loss = loss + totals.omega * rcka
            parts |= {"rcka": rcka.detach(), "rcka_skipped": share * skipped}
        loss.backward()
        parts["loss"] = loss.detach()
        return parts

    def _token_losses(
        self, states: torch.Tensor, labels: torch.Tensor, target: CachedTargets | None, totals: Totals, share: float
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy and distillation of states [tokens, d] against labels [tokens] and the teacher's record."""
        method, head = self.run.method, head_weight(self.model, self.vocabulary)
        common: dict[str, Any] = dict(
            temperature=method.temperature,
            alpha=method.alpha,
            beta_dkd=method.beta_dkd,
            mode=self.mode,
            logits_dtype=self.logits_dtype,
            ce_weight=share / totals.tokens,
            kd_weight=share * totals.beta / totals.gates,
        )
        if self.mode == "none":
            return distillation_loss_from_hidden(states, head, None, None, labels, **common)
        assert target is not None
        if target.sampled is not None:
            return distillation_loss_from_record(states, head, target.sampled, labels, **common)
        gates = target.gates if self.gated else None
        return distillation_loss_from_hidden(
            states, head, target.hidden, self.teacher_head, labels, gates=gates, **common
        )
