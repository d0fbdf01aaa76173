"""The loop: from a starting model to a trained one, resumable at every checkpoint."""

import hashlib
import json
import time
from itertools import islice
from pathlib import Path

import torch

from grace.config.runs import TrainRun
from grace.data import Example, collate, plan_batches
from grace.distill import InformationBottleneckController
from grace.errors import GraceError
from grace.files import write_json
from grace.models import freeze_vision
from grace.progress import progress
from grace.teacher.reader import TeacherCache
from grace.train.checkpoint import cut_log, load_checkpoint, save_checkpoint
from grace.train.objective import Objective
from grace.train.optimizer import MasterAdamW


def run_identity(run: TrainRun, *manifests: Path | None) -> str:
    """What a checkpoint must agree with: the frozen parameters and the folders that the run starts from."""
    digest = hashlib.sha256(run.model_dump_json().encode())
    for path in manifests:
        digest.update(path.read_bytes() if path is not None else b"-")
    return digest.hexdigest()


def train_model(
    model,
    processor,
    examples: list[Example],
    run: TrainRun,
    cache: TeacherCache | None,
    log: Path,
    checkpoints: Path,
    identity: str,
) -> MasterAdamW:
    """Train `model` in place and return its optimiser, which knows the codes and scales that ship.

    Appends one JSON line per optimiser step to `log`. A non-finite loss stops the run before the weights are
    touched, with the conversations' ids in `checkpoints/nonfinite.json`.
    """
    steps, micro = run.optimisation.steps, run.optimisation.micro_batch
    freeze_vision(model)
    model.train()
    if run.optimisation.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = MasterAdamW(model, run.optimisation, run.bits, run.quantization)
    objective = Objective(model, run, cache)
    method = run.method
    controller = InformationBottleneckController(
        method.tau, method.eta, method.beta_init, method.beta_min, method.beta_max, method.ema_decay
    )
    checkpoints.mkdir(parents=True, exist_ok=True)
    state = load_checkpoint(checkpoints, identity)
    done = 0
    if state is not None:
        done = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        controller.load_state_dict(state["controller"])
    log.parent.mkdir(parents=True, exist_ok=True)
    if done:
        cut_log(log, done)
    else:
        log.unlink(missing_ok=True)

    lengths = [len(example.input_ids) for example in examples]
    plan = plan_batches(lengths, run.optimisation.batch, run.seed)
    omega_steps = max(1, round(method.omega_warmup * steps))
    with progress("training", steps) as advance, log.open("a") as lines:
        advance(done)
        for step, indices in enumerate(islice(plan, done, steps), start=done):
            start = time.monotonic()
            captions = step < run.optimisation.caption_steps
            chosen = [examples[index] for index in indices]
            batches = [collate(chosen[i : i + micro], processor, captions) for i in range(0, len(chosen), micro)]
            omega = method.omega * min(1.0, (step + 1) / omega_steps)
            totals = objective.totals(batches, controller.beta, omega)
            shares: dict[str, float] = {}
            for batch in batches:
                for name, value in objective.backward(batch, totals).items():
                    shares[name] = shares.get(name, 0.0) + value
            if not all(map(torch.isfinite, map(torch.tensor, shares.values()))):
                write_json(checkpoints / "nonfinite.json", {"step": step + 1, "ids": [e.id for e in chosen]})
                raise GraceError(
                    f"step {step + 1}: the loss is not finite ({shares}); the conversations are listed in "
                    f"{checkpoints / 'nonfinite.json'}; lower learning_rate or leave them out"
                )
            norm = optimizer.step(step)
            beta = controller.beta
            if run.controller:
                controller.update(shares["kd"])
            seconds = time.monotonic() - start
            tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
            entry = {
                "step": step + 1,
                **{name: round(value, 6) for name, value in shares.items()},
                **({"beta": round(beta, 6)} if run.kd != "none" else {}),
                **({"omega": round(omega, 6)} if run.rcka else {}),
                "learning_rate": run.optimisation.learning_rate * optimizer.learning_rate(step),
                "grad_norm": round(norm, 6),
                "tokens": tokens,
                "seconds": round(seconds, 4),
            }
            lines.write(json.dumps(entry) + "\n")
            advance(1, f"loss {shares['loss']:.3f}, {tokens / seconds:,.0f} tokens/s")
            if (step + 1) % run.optimisation.checkpoint_every == 0 and step + 1 < steps:
                lines.flush()
                save_checkpoint(
                    checkpoints,
                    identity,
                    {"step": step + 1, "optimizer": optimizer.state_dict(), "controller": controller.state_dict()},
                )
    return optimizer
