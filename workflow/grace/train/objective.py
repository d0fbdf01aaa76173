"""The loss of one micro-batch, as sums over the global batch's normalisers, so that any cut gives the same gradient.

`CE + beta * KD + omega * RCKA`, where CE is a mean over the global batch's supervised tokens, gated KD over its sum
of gates (plain KD: tokens) and RCKA over its images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from grace.config.runs import TrainRun
from grace.data import Batch
from grace.distill import distillation_loss_from_hidden, relational_cka_from_gram
from grace.errors import GraceError
from grace.models import image_token_id, output_head
from grace.teacher.reader import TeacherCache


@dataclass
class Totals:
    """What the global batch is divided by, and the weights of this step."""

    tokens: float
    gates: float
    images: float
    beta: float
    omega: float


class Objective:
    """The training loss of one recipe."""

    def __init__(self, model: nn.Module, run: TrainRun, cache: TeacherCache | None) -> None:
        self.model, self.run, self.cache = model, run, cache
        if (run.kd != "none" or run.rcka) and cache is None:
            raise GraceError("this recipe distils: give the teacher's cache (--cache)")
        if run.kd != "none" and cache.vocabulary != output_head(model).weight.shape[0]:
            raise GraceError(
                f"{cache.folder}: the teacher's vocabulary has {cache.vocabulary} entries, the student's "
                f"{output_head(model).weight.shape[0]}; distil between models of one tokenizer"
            )

    def totals(self, batches: Sequence[Batch], beta: float, omega: float) -> Totals:
        """The normalisers of a global batch, known before its first forward pass."""
        tokens = sum(int((batch.labels[:, 1:] != -100).sum()) for batch in batches)
        gates = float(tokens)
        if self.run.kd == "gated":
            gates = sum(self.cache.gate_sum(batch.keys) for batch in batches)
        images = sum(len(batch.keys) for batch in batches)
        return Totals(tokens, gates, images, beta, omega)

    def backward(self, batch: Batch, totals: Totals) -> dict[str, float]:
        """Forward and backward of one micro-batch; returns its share of each global loss (they add up)."""
        run, method = self.run, self.run.method
        device = output_head(self.model).weight.device
        rows, columns, labels = (part.to(device) for part in batch.supervised())
        input_ids = batch.input_ids.to(device)
        dtype = output_head(self.model).weight.dtype
        pixels = {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in batch.pixels.items()}
        outputs = self.model.model(
            input_ids=input_ids,
            attention_mask=batch.attention_mask.to(device),
            use_cache=False,
            output_hidden_states=run.rcka,
            **pixels,
        )
        states = outputs.last_hidden_state[rows, columns]  # [tokens, d]
        target = self.cache.batch(batch.keys) if self.cache is not None else None
        losses = distillation_loss_from_hidden(
            states,
            output_head(self.model).weight,
            target.hidden.to(device) if run.kd != "none" else None,
            self.cache.head.to(device) if run.kd != "none" else None,
            labels,
            temperature=method.temperature,
            alpha=method.alpha,
            beta_dkd=method.beta_dkd,
            mode=run.kd,
            ce_weight=1 / totals.tokens,
            kd_weight=totals.beta / totals.gates,
        )
        loss = losses["loss"]
        shares = {"ce": float(losses["ce_sum"]) / totals.tokens}
        if run.kd != "none":
            shares["kd"] = float(losses["kd_sum"]) / totals.gates
        if run.rcka:
            visual = outputs.hidden_states[-2][input_ids == image_token_id(self.model)]  # [images * n, d]
            counts = (input_ids == image_token_id(self.model)).sum(1).tolist()
            parts = [
                relational_cka_from_gram(tokens, gram.to(device))
                for tokens, gram in zip(visual.split(counts), target.grams, strict=True)
            ]
            rcka = torch.stack(parts).sum() / totals.images
            loss = loss + totals.omega * rcka
            shares["rcka"] = float(rcka.detach())
        loss.backward()
        shares["loss"] = float(loss.detach())
        return shares
