"""The loop: from a starting model to a trained one, resumable at every checkpoint."""

import hashlib
import io
import json
import math
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from grace.config.code import CodeIndex
from grace.config.job_modules import modules_of
from grace.config.job_parameters import TrainRun
from grace.config.sections import Optimisation
from grace.data import Batch, Example, collate, plan_batches
from grace.data.packed import packed_row, prepare_packed
from grace.data.packing import fill_rows
from grace.data.prepared import captions_of, lengths_of
from grace.distributed import Sharding, keep_gathered, shard
from grace.errors import GraceError
from grace.files import contents_hash, write_json
from grace.models import freeze_vision
from grace.progress import progress
from grace.teacher.prefetch import ahead, spare_threads
from grace.train.checkpoint import Checkpoints, note_part, noted_part
from grace.train.meter import Meter
from grace.train.objective import Objective, Targets
from grace.train.optimizer import MasterAdamW
from grace.train.watch import Watchers
from grace.world import World

_KEYS = "under teacher.train, student.train, finetune or the recipe's train, whichever is trained here"
MICRO_BATCHES_AHEAD = 2  # prepared while the present one is computed
SKIPPED_IN_A_ROW = 20  # steps that may be skipped one after the other: a run of which nothing is finite has diverged


class MicroBatch(NamedTuple):
    """Conversations of one forward pass; `share` is 0 where a process only keeps step with the others."""

    examples: list[Example]
    share: float


def run_identity(run: TrainRun, *manifests: Path | None) -> str:
    """What a checkpoint must agree with: the frozen parameters, the code, and the folders that the run starts from."""
    digest = hashlib.sha256(run.model_dump_json().encode())
    digest.update(json.dumps(CodeIndex().fingerprint("train", *modules_of(run)), sort_keys=True).encode())
    for path in manifests:
        digest.update(contents_hash(path).encode() if path is not None else b"-")
    return digest.hexdigest()


def counted(optimisation: Optimisation, conversations: int) -> Optimisation:
    """The same in steps, of an epoch of so many conversations; an epoch's last step may be a smaller batch."""
    if optimisation.epochs is None:
        return optimisation
    steps = math.ceil(optimisation.epochs * math.ceil(conversations / optimisation.batch))
    return optimisation.model_copy(update={"steps": steps, "epochs": None})


class Trainer:
    """One run of one recipe.

    Args:
        model: trained in place; its vision tower stays frozen.
        objective: the loss, of this very model.
        log: gets one JSON line per optimiser step.
        checkpoints: folder for resumable checkpoints, outside the rule's outputs.
        identity: what a checkpoint must agree with (`run_identity`).
        sharding: of the decoder over several processes.
        development: what the loss is also measured on, where `validate_every` asks for it.
    """

    def __init__(
        self,
        model,
        processor,
        examples: Sequence[Example],
        run: TrainRun,
        objective: Objective,
        log: Path,
        checkpoints: Path,
        identity: str,
        world: World,
        sharding: Sharding = Sharding(),  # noqa: B008  (it is frozen)
        development: Sequence[Example] = (),
    ) -> None:
        self.development = list(development)
        self.model, self.processor, self.examples, self.run, self.world = model, processor, examples, run, world
        self.log, self.checkpoints, self.identity = log, checkpoints, identity
        self.lengths, self.captions = lengths_of(examples), captions_of(examples)
        if run.optimisation.caption_steps and not self.captions.any():
            raise GraceError(
                f"caption_steps is {run.optimisation.caption_steps} and the data has no captions; set it to 0"
            )
        freeze_vision(model)
        self.packed = run.optimisation.pass_tokens is not None
        # of one forward pass: tokens where it is packed, else conversations; fewer once the GPU's memory was too small
        self.part = run.optimisation.pass_tokens or run.optimisation.micro_batch
        if self.packed:
            prepare_packed(model, run.optimisation.kept_activations, world.device)
        elif run.optimisation.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        matrices = sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim > 1)
        self.meter = Meter(matrices, world.device, world.size)
        shard(model, world, sharding)
        self.kept_gathered = world.size > 1 and sharding.gathered == "step"
        self.optimizer = MasterAdamW(model, run.optimisation, run.bits, run.quantization, world)
        self.objective = objective
        self.skipped = self.in_a_row = 0  # steps that were not applied, as their loss was not finite

    def train(self) -> None:
        """Run every step that is left.

        Raises:
            GraceError: a loss or a gradient is not finite, and the config does not say to skip such steps (or many
                came in a row). The weights are then as before that step, and the conversations and records at fault
                are listed in `nonfinite.json` in the checkpoint folder.
        """
        run, steps = self.run, self.run.optimisation.total
        saver = self.saver = Checkpoints(
            self.checkpoints, self.identity, self.log, self.world, run.optimisation.checkpoint_in_background
        )
        done, facts = saver.load(self.optimizer.parts())
        if facts is not None:
            self.optimizer.resume(facts["applied"])
            self.objective.load_state_dict(facts["objective"])
            self.skipped, self.part = facts["skipped"], facts["part"]
        self.part = noted_part(self.checkpoints, self.identity, self.part, self.world)
        self.model.train()
        kept = self.log.open("a") if self.world.first else io.StringIO()  # the others write nothing
        watchers = Watchers(self.checkpoints, done, run.model_dump(), self.world)
        with (
            progress("training", steps) as advance,
            kept as lines,
            closing(watchers),
            ExitStack() as feeds,
        ):
            feed = feeds.enter_context(closing(self._feed(done)))
            advance(done)
            for step, chosen in zip(range(done, steps), self._plan(done), strict=False):
                while (entry := self._step(step, chosen, feed)) is None:  # out of memory: smaller parts
                    feeds.close()
                    feed = feeds.enter_context(closing(self._feed(step)))
                saver.raise_failure()
                if run.optimisation.validate_every and (step + 1) % run.optimisation.validate_every == 0:
                    entry["development_ce"] = float(f"{self._validate():.7g}")
                watchers.step(entry)
                if self.world.first:
                    lines.write(json.dumps(entry) + "\n")
                shown = {name: entry[name] for name in ("loss", "ce", "kd", "rcka", "beta", "mfu") if name in entry}
                note = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
                note += f", {self.skipped} skipped" if self.skipped else ""
                advance(1, f"{note}, {entry['tokens_per_second']:,.0f} tokens/s, {entry['memory_gib']:.1f} GiB")
                if (step + 1) % run.optimisation.checkpoint_every == 0 and step + 1 < steps:
                    if self.world.first:
                        lines.flush()
                    facts = {"applied": self.optimizer.applied, "objective": self.objective.state_dict(),
                             "skipped": self.skipped, "part": self.part}  # fmt: skip
                    saver.save(step + 1, self.optimizer.parts(), facts)
            saver.wait()

    def _validate(self) -> float:
        """The mean cross-entropy over the development split's labels; changes nothing."""
        self.model.eval()
        sums = {"ce": 0.0, "tokens": 0.0}
        for micro in self._cuts(self.development):
            ce, tokens = self.objective.cross_entropy(self._batch(micro.examples))
            sums = {"ce": sums["ce"] + micro.share * float(ce), "tokens": sums["tokens"] + micro.share * tokens}
        sums = self.world.add(sums)
        self.model.train()
        return sums["ce"] / max(sums["tokens"], 1.0)

    def _plan(self, done: int) -> Iterator[list[Example]]:
        """The conversations of every optimiser step after `done`."""
        return ([self.examples[index] for index in indices] for indices in islice(self._numbers(), done, None))

    def _numbers(self) -> Iterator[list[int]]:
        """The numbers of each step's conversations, for ever: captions in the first steps,
        then those with questions.
        """
        captions, asked = np.flatnonzero(self.captions), np.flatnonzero(~self.captions)
        for numbers, steps in ((captions, self.run.optimisation.caption_steps), (asked, None)):
            lengths = self.lengths[numbers]
            plan = plan_batches(lengths, self.run.optimisation.batch, self.run.seed, alike=not self.packed)
            yield from (numbers[indices].tolist() for indices in islice(plan, steps))

    def _cuts(self, chosen: list[Example]) -> Iterator[MicroBatch]:
        """This process's micro-batches of a step."""
        size, world = self.part, self.world
        if self.packed:
            rows = fill_rows([len(example.input_ids) for example in chosen], size)
            cuts = [[chosen[index] for index in row] for row in rows]
        else:
            cuts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        for first in range(0, len(cuts), world.size):
            # FSDP's collectives need every process in every round: one without a micro-batch left repeats the first.
            mine, share = (cuts[first + world.rank], 1.0) if first + world.rank < len(cuts) else (cuts[0], 0.0)
            yield MicroBatch(mine, share)

    def _feed(self, done: int) -> Generator[tuple[Batch, Targets | None]]:
        """The prepared micro-batches of all steps after `done`, one after the other."""
        chosen = islice(self._plan(done), self.run.optimisation.total - done)
        threads = spare_threads(self.world.size) if self.world.device.type == "cuda" else 1
        cuts = chain.from_iterable(map(self._cuts, chosen))
        return ahead(self._prepare, cuts, max(MICRO_BATCHES_AHEAD, threads), threads)

    def _batch(self, examples: list[Example]) -> Batch:
        batch = collate(examples, self.processor)
        if self.packed:
            batch.packed = packed_row(self.model, batch, self.part)
        return batch

    def _prepare(self, micro: MicroBatch) -> tuple[Batch, Targets | None]:
        """The tensors of a micro-batch and the teacher's record of it; runs in the background."""
        batch = self._batch(micro.examples)
        targets = self.objective.targets(batch.keys)
        if self.world.device.type == "cuda":
            return batch.pin_memory(), targets and targets.pin_memory()
        return batch, targets

    def _step(
        self, step: int, chosen: list[Example], feed: Iterator[tuple[Batch, Targets | None]]
    ) -> dict[str, Any] | None:
        """The log's entry of one optimiser step; None where memory did not suffice and `micro_batch` is smaller now."""
        start = time.monotonic()
        totals = self.objective.totals(chosen, step)
        cuts = list(self._cuts(chosen))
        try:
            each = []
            for left, micro in zip(reversed(range(len(cuts))), cuts, strict=True):
                if self.kept_gathered:
                    keep_gathered(self.model, left > 0)
                each.append(self.objective.backward(*next(feed), totals, micro.share))
        except torch.OutOfMemoryError as error:
            short = str(error).splitlines()[0]
        else:
            short = ""
        if short:  # after the handler, whose traceback holds the tensors
            self._halve(step, short)
            return None
        names = list(each[0])
        rows = torch.stack([torch.stack([parts[name].double() for name in names]) for parts in each]).tolist()
        parts = self.world.add({name: sum(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})
        wrong = [name for name, value in parts.items() if not math.isfinite(value)]
        if wrong:
            self.optimizer.drop_gradients()
        else:
            norm = self.optimizer.step(step)
            wrong = [] if math.isfinite(norm) else ["gradient"]
        entry: dict[str, Any] = {"step": step + 1}
        if wrong:
            bad = [micro.examples for micro, row in zip(cuts, rows, strict=True) if not all(map(math.isfinite, row))]
            suspects = list(dict.fromkeys(self.world.gather([(e.id, e.key) for examples in bad for e in examples])))
            entry |= self._nonfinite(step, wrong, suspects or [(e.id, e.key) for e in chosen])
        else:
            self.in_a_row = 0
            entry |= {
                **{name: float(f"{value:.7g}") for name, value in parts.items()},
                **self.objective.logged(totals),
                "learning_rate": self.run.optimisation.learning_rate * self.optimizer.learning_rate(step),
                "grad_norm": float(f"{norm:.7g}"),
            }
            self.objective.applied(parts)
        tokens = sum(len(example.input_ids) for example in chosen)
        seconds = time.monotonic() - start
        return {**entry, "tokens": tokens, "seconds": round(seconds, 4), **self.meter.measure(tokens, seconds)}

    def _halve(self, step: int, short: str) -> None:
        """Cut batches smaller from now on; the step's sums, and with them its result, do not depend on the cuts."""
        key, least = ("pass_tokens", 256) if self.packed else ("micro_batch", 1)
        if self.part <= least:
            save = "kept_activations" if self.packed else "micro_batch, set gradient_checkpointing"
            raise GraceError(
                f"step {step + 1}: out of memory with {key} {self.part} ({short}); lower {save}, or use a larger GPU"
            )
        if (
            self.world.size > 1
        ):  # the others wait in a collective that this one left, and none can take part in it again
            note_part(self.checkpoints, self.identity, self.part // 2)
            raise GraceError(
                f"step {step + 1}: out of memory with {key} {self.part} ({short}); all {self.world.size} processes "
                f"have to start again, from the last checkpoint and with {key} {self.part // 2}, which changes no "
                "result"
            )
        self.optimizer.drop_gradients()
        torch.cuda.empty_cache()
        self.part //= 2
        print(
            f"step {step + 1}: out of memory; going on with {key} {self.part}, which changes no result",
            file=sys.stderr,
            flush=True,
        )

    def _nonfinite(self, step: int, wrong: list[str], suspects: list[tuple[str, str]]) -> dict[str, Any]:
        """Count a step that was not applied, or stop the run with the conversations at fault on disk."""
        found = {"nonfinite": wrong, "ids": [i for i, _ in suspects], "keys": [key for _, key in suspects]}
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.run.optimisation.nonfinite == "skip" and self.in_a_row < SKIPPED_IN_A_ROW:
            return {"skipped": self.skipped, **found}
        where = self.checkpoints / "nonfinite.json"
        if self.world.first:
            write_json(where, {"step": step + 1, **found})
        row = f" for {self.in_a_row} steps in a row" if self.in_a_row > 1 else ""
        raise GraceError(
            f"step {step + 1}: {', '.join(wrong)} is not finite{row}; the conversations at fault are listed in "
            f"{where}; lower the learning rate, leave them out of the data, or set nonfinite: skip ({_KEYS})"
        )
