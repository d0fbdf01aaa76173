"""The loop: from a starting model to a trained one, resumable at every checkpoint."""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from grace.config.runs import TrainRun
from grace.data import Example, collate, plan_batches
from grace.distill import InformationBottleneckController
from grace.errors import GraceError
from grace.files import write_json
from grace.models import freeze_vision
from grace.progress import progress
from grace.teacher.reader import TeacherCache
from grace.train.checkpoint import cut_log, load_checkpoint, save_checkpoint
from grace.train.distributed import World, shard
from grace.train.meter import Meter
from grace.train.objective import Objective
from grace.train.optimizer import MasterAdamW


def run_identity(run: TrainRun, *manifests: Path | None) -> str:
    """What a checkpoint must agree with: the frozen parameters and the folders that the run starts from."""
    digest = hashlib.sha256(run.model_dump_json().encode())
    for path in manifests:
        digest.update(path.read_bytes() if path is not None else b"-")
    return digest.hexdigest()


class Trainer:
    """One run of one recipe.

    Args:
        model: trained in place; its vision tower stays frozen.
        log: gets one JSON line per optimiser step.
        checkpoints: folder for resumable checkpoints, outside the rule's outputs.
        identity: what a checkpoint must agree with (`run_identity`).
    """

    def __init__(
        self,
        model,
        processor,
        examples: list[Example],
        run: TrainRun,
        cache: TeacherCache | None,
        log: Path,
        checkpoints: Path,
        identity: str,
        world: World,
    ) -> None:
        self.model, self.processor, self.examples, self.run, self.world = model, processor, examples, run, world
        self.log, self.checkpoints, self.identity = log, checkpoints, identity
        freeze_vision(model)
        if run.optimisation.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        matrices = sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim > 1)
        self.meter = Meter(matrices, world.device, world.size)
        shard(model, world)
        self.optimizer = MasterAdamW(model, run.optimisation, run.bits, run.quantization, world)
        self.objective = Objective(model, run, cache)
        method = run.method
        self.controller = InformationBottleneckController(
            method.tau, method.eta, method.beta_init, method.beta_min, method.beta_max, method.ema_decay
        )

    def train(self) -> None:
        """Run every step that is left.

        Raises:
            GraceError: a loss is not finite. The weights are then as before that step, and the step's conversations
                are listed in `nonfinite.json` in the checkpoint folder.
        """
        run, steps = self.run, self.run.optimisation.steps
        done, state = load_checkpoint(self.checkpoints, self.identity, self.world)
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.controller.load_state_dict(state["controller"])
        if self.world.first:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            cut_log(self.log, done)
        plan = islice(self._plan(), done, steps)
        self.model.train()
        with progress("training", steps) as advance, self.log.open("a") as lines:
            advance(done)
            for step, chosen in enumerate(plan, start=done):
                entry = self._step(step, chosen)
                if self.world.first:
                    lines.write(json.dumps(entry) + "\n")
                shown = {name: entry[name] for name in ("loss", "ce", "kd", "rcka", "beta", "mfu") if name in entry}
                note = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
                advance(1, f"{note}, {entry['tokens_per_second']:,.0f} tokens/s, {entry['memory_gib']:.1f} GiB")
                if (step + 1) % run.optimisation.checkpoint_every == 0 and step + 1 < steps:
                    lines.flush()
                    self._save(step + 1)

    def _plan(self) -> Iterator[list[Example]]:
        """Each optimiser step's conversations, for ever: all of them in the first steps, then those with questions."""
        asked = [example for example in self.examples if not example.caption]
        for examples, steps in ((self.examples, self.run.optimisation.first_turn_steps), (asked, None)):
            lengths = [len(example.input_ids) for example in examples]
            plan = plan_batches(lengths, self.run.optimisation.batch, self.run.seed)
            yield from ([examples[index] for index in indices] for indices in islice(plan, steps))

    def _step(self, step: int, chosen: list[Example]) -> dict[str, float]:
        start = time.monotonic()
        run, world, method = self.run, self.world, self.run.method
        first_turn = step < run.optimisation.first_turn_steps
        omega_steps = max(1, round(method.omega_warmup * run.optimisation.steps))
        omega = method.omega * min(1.0, (step + 1) / omega_steps)
        totals = self.objective.totals(chosen, first_turn, self.controller.beta, omega)
        size = run.optimisation.micro_batch
        cuts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        parts: dict[str, float] = {}
        for first in range(0, len(cuts), world.size):
            # FSDP's collectives need every process in every round: one without a micro-batch left repeats the first.
            mine, share = (cuts[first + world.rank], 1.0) if first + world.rank < len(cuts) else (cuts[0], 0.0)
            batch = collate(mine, self.processor, first_turn)
            for name, value in self.objective.backward(batch, totals, share).items():
                parts[name] = parts.get(name, 0.0) + value
        parts = world.add(parts)
        if not all(map(math.isfinite, parts.values())):
            self._stop(step, chosen, parts)
        norm = self.optimizer.step(step)
        entry = {
            "step": step + 1,
            **{name: float(f"{value:.7g}") for name, value in parts.items()},
            **({"beta": self.controller.beta} if run.kd != "none" else {}),
            **({"omega": omega} if run.rcka else {}),
            "learning_rate": run.optimisation.learning_rate * self.optimizer.learning_rate(step),
            "grad_norm": float(f"{norm:.7g}"),
        }
        if run.controller:
            self.controller.update(parts["kd"])
        ends = [e.first_turn if first_turn else len(e.input_ids) for e in chosen]
        seconds = time.monotonic() - start
        return {**entry, "tokens": sum(ends), "seconds": round(seconds, 4), **self.meter.measure(sum(ends), seconds)}

    def _stop(self, step: int, chosen: list[Example], parts: dict[str, float]) -> None:
        if self.world.first:
            write_json(self.checkpoints / "nonfinite.json", {"step": step + 1, "ids": [e.id for e in chosen]})
        wrong = ", ".join(name for name, value in parts.items() if not math.isfinite(value))
        raise GraceError(
            f"step {step + 1}: {wrong} is not finite; the step's conversations are listed in "
            f"{self.checkpoints / 'nonfinite.json'}; lower learning_rate, or leave them out of the data"
        )

    def _save(self, step: int) -> None:
        state = {"optimizer": self.optimizer.state_dict(), "controller": self.controller.state_dict()}
        save_checkpoint(self.checkpoints, self.identity, step, state, self.world)
