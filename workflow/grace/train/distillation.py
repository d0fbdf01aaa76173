"""What a teacher adds to the loss: `CE + beta * KD + omega * RCKA`.

KD is divided by its sum of gates over the global batch where the objective is gated, else by its tokens, and RCKA by
its images. The controller may set beta, once per applied step.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grace.config.job_parameters import TrainRun
from grace.data import Batch, Example
from grace.data.prepared import keys_of
from grace.distill import (
    InformationBottleneckController,
    TokenLoss,
    distillation_loss_from_hidden,
    load_objective,
    relational_cka_sum,
)
from grace.distill.chunk_loss import Mode
from grace.distill.from_hidden import FUSED
from grace.errors import GraceError
from grace.models import head_weight, image_token_id
from grace.teacher.identity import expected
from grace.teacher.reader import CachedTargets, TeacherCache
from grace.teacher.sampled import distillation_loss_from_record
from grace.train.objective import Objective


def open_cache(folder: Path, run: TrainRun, data: Path, teacher: Path | None) -> TeacherCache:
    """The teacher's cache of this data; a `GraceError` says in what it is another one."""
    return TeacherCache.open(folder, expect=expected(data, run.method.temperature, teacher))


class Distillation(Objective):
    """The training loss of one recipe that learns from a teacher.

    Raises:
        GraceError: the cache's vocabulary is another, or its format lacks what the objective needs.
    """

    def __init__(self, model: nn.Module, run: TrainRun, vocabulary: int, cache: TeacherCache) -> None:
        super().__init__(model, run, vocabulary)
        self.cache = cache
        self.image_token = image_token_id(model)
        if run.kd != "none" and cache.vocabulary != vocabulary:
            raise GraceError(
                f"{cache.folder}: the teacher's vocabulary has {cache.vocabulary} entries, the student's "
                f"{vocabulary}; distil between models of one tokenizer"
            )
        fused = next((mode for mode in FUSED if mode == run.kd), None)
        self.mode: Mode | TokenLoss = fused or load_objective(run.kd, {**run.method.model_dump(), **run.constants})
        self.gated = self.mode.gated if isinstance(self.mode, TokenLoss) else self.mode == "gated"
        if fused is None and cache.format == "sampled":
            raise GraceError(f"{cache.folder}: `{run.kd}` needs the teacher's full logits; set cache.format to hidden")
        needs_head = run.kd != "none" and cache.format != "sampled"
        self.teacher_head = cache.head.to(self.device) if needs_head else None
        method = run.method
        self.controller = InformationBottleneckController(
            method.tau, method.eta, method.beta_init, method.beta_min, method.beta_max, method.ema_decay
        )

    def check(self, examples: Sequence[Example]) -> None:
        self.cache.check_keys(keys_of(examples))

    def targets(self, keys: Sequence[str]) -> CachedTargets:
        return self.cache.batch(keys)

    def totals(self, chosen: Sequence[Example], step: int) -> dict[str, float]:
        totals = super().totals(chosen, step)
        method, steps = self.run.method, self.run.optimisation.total
        warmed = min(1.0, (step + 1) / max(1, round(method.omega_warmup * steps)))
        return totals | {
            "gates": float(self.cache.gate_sum([e.key for e in chosen])) if self.gated else totals["tokens"],
            "images": float(max(1, sum(len(example.images) for example in chosen))),
            "beta": self.controller.beta,
            "omega": method.omega * warmed,
        }

    def _token_losses(
        self, states: torch.Tensor, labels: torch.Tensor, target: CachedTargets, totals: dict[str, float], share: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self.run.kd == "none":
            return super()._token_losses(states, labels, target, totals, share)
        method, head = self.run.method, head_weight(self.model, self.vocabulary)
        common: dict[str, Any] = dict(
            temperature=method.temperature,
            alpha=method.alpha,
            beta_dkd=method.beta_dkd,
            mode=self.mode,
            logits_dtype=self.logits_dtype,
            ce_weight=share / totals["tokens"],
            kd_weight=share * totals["beta"] / totals["gates"],
        )
        if target.sampled is not None:
            losses = distillation_loss_from_record(states, head, target.sampled, labels, **common)
        else:
            gates = target.gates if self.gated else None
            losses = distillation_loss_from_hidden(
                states, head, target.hidden, self.teacher_head, labels, gates=gates, **common
            )
        return losses["loss"], {
            "ce": losses["ce_sum"] * (share / totals["tokens"]),
            "kd": losses["kd_sum"] * (share / totals["gates"]),
        }

    def _image_losses(
        self, states: Any, batch: Batch, target: CachedTargets, totals: dict[str, float], share: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        at, place, sizes = batch.visual(self.image_token)  # asked of the host's copy: the device is not waited for
        at, place = map(self._here, batch.place(at, place))
        tokens = states[-2][at, place].split(sizes)  # per image [n, d]
        rcka = skipped = states[-2].new_zeros(())  # a micro-batch of text alone has no image to align
        if sizes:
            rcka, _, skipped = relational_cka_sum(tokens, teacher_grams=target.grams)
        rcka = rcka * (share / totals["images"])
        return totals["omega"] * rcka, {"rcka": rcka.detach(), "rcka_skipped": share * skipped}

    def logged(self, totals: dict[str, float]) -> dict[str, float]:
        beta = {"beta": totals["beta"]} if self.run.kd != "none" else {}
        return beta | ({"omega": totals["omega"]} if self.run.rcka else {})

    def applied(self, parts: dict[str, float]) -> None:
        if self.run.controller:
            self.controller.update(parts["kd"])

    def state_dict(self) -> dict[str, Any]:
        return {"controller": self.controller.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.controller.load_state_dict(state["controller"])
