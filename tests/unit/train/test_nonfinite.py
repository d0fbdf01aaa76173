"""Losses and gradients that are not finite stop a run, or their steps are left out without a trace."""

import signal
import subprocess
from dataclasses import replace

import pytest
import started
import torch
from safetensors.torch import load_file
from tiny_runs import GRACE, RECIPES, log, optimisation, run_file, student, weights

from grace.config.schema import Method
from grace.data import load_prepared
from grace.errors import GraceError
from grace.files import read_json
from grace.train.commands import train
from grace.train.optimizer import MasterAdamW


def test_a_non_finite_loss_stops_the_run_and_names_the_conversations(home, tmp_path):
    run = run_file(tmp_path, "wild", optimisation=optimisation(learning_rate=1e30, clip=1e30, warmup=0.0, steps=20))
    with pytest.raises(GraceError, match="ce, loss is not finite"):
        train(run, home / "data", tmp_path / "wild", tmp_path / "wild.jsonl", tmp_path / ".wild", home / "baseline")
    saved = read_json(tmp_path / ".wild/nonfinite.json")
    assert len(saved["ids"]) == len(saved["keys"]) == 6 and saved["step"] > 1
    assert not (tmp_path / "wild").exists()


@pytest.fixture
def poisoned(monkeypatch):
    """One conversation whose image gives NaN: the model's loss of its micro-batch is then not finite."""
    ids = []

    def load(data, tower):
        examples = list(load_prepared(data, tower))
        at = next(i for i, example in enumerate(examples) if not example.caption)
        examples[at] = replace(examples[at], features=examples[at].features * torch.nan)
        ids.append(examples[at].id)
        return examples

    monkeypatch.setattr("grace.train.commands.load_prepared", load)
    return ids


@pytest.mark.parametrize("name", ["bf16", "grace"])
def test_the_micro_batch_that_is_not_finite_is_named(home, tmp_path, poisoned, name):
    with pytest.raises(GraceError, match="not finite; the conversations at fault are listed in"):
        student(home, tmp_path, "run", **RECIPES[name], optimisation=optimisation(micro_batch=2, steps=20))
    saved = read_json(tmp_path / ".run/nonfinite.json")
    assert poisoned[0] in saved["ids"] and len(saved["ids"]) == len(saved["keys"]) == 2
    assert {"ce", "loss"} <= set(saved["nonfinite"])


def test_steps_that_are_not_finite_are_skipped_and_counted(home, tmp_path, poisoned):
    steps = optimisation(micro_batch=2, steps=20, nonfinite="skip", checkpoint_every=3)
    folder = student(home, tmp_path, "run", **GRACE, optimisation=steps)
    entries = log(tmp_path, "run")
    assert [entry["step"] for entry in entries] == list(range(1, 21))
    skipped = [entry for entry in entries if "skipped" in entry]
    assert [entry["skipped"] for entry in skipped] == list(range(1, len(skipped) + 1)) and skipped
    assert all(poisoned[0] in entry["ids"] and "loss" not in entry for entry in skipped)
    assert all(torch.isfinite(weight).all() for weight in load_file(folder / "model.safetensors").values())
    # the controller stands still where nothing was applied
    betas = [entry.get("beta") for entry in entries]
    average, beta, method = None, Method().beta_init, Method(tau=0.1)
    for entry, seen in zip(entries, betas, strict=True):
        if seen is None:
            continue
        assert seen == pytest.approx(beta, abs=2e-6)
        average = entry["kd"] if average is None else method.ema_decay * average + (1 - method.ema_decay) * entry["kd"]
        beta = min(max(beta + method.eta * (average - method.tau), method.beta_min), method.beta_max)


KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
import grace.train.commands as commands
from grace.data import load_prepared
from grace.train.loop import Trainer

def load(data, tower):
    examples = list(load_prepared(data, tower))
    at = next(i for i, example in enumerate(examples) if not example.caption)
    examples[at] = replace(examples[at], features=examples[at].features * torch.nan)
    return examples

def killed(self, number, *rest):
    if number == int(sys.argv[-1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number, *rest)

commands.load_prepared, step, Trainer._step = load, Trainer._step, killed
commands.train(*map(Path, sys.argv[1:-1]))
"""


def test_a_run_that_skips_ends_with_the_same_bits_however_often_it_is_killed(home, tmp_path, poisoned):
    steps = optimisation(micro_batch=2, steps=16, nonfinite="skip", checkpoint_every=3)
    whole = student(home, tmp_path, "whole", **GRACE, optimisation=steps)
    run = run_file(tmp_path, "killed", **GRACE, optimisation=steps)
    paths = [run, home / "data", tmp_path / "killed", tmp_path / "killed.jsonl", tmp_path / ".killed"]
    paths += [home / "baseline", home / "cache"]
    for at, status in ((4, -signal.SIGKILL), (11, -signal.SIGKILL), (-1, 0)):
        assert subprocess.run(started.python("-c", KILLED, *paths, at)).returncode == status
    before, after = weights(whole), weights(tmp_path / "killed")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    kept = ("step", "loss", "beta", "skipped", "ids")
    logs = [[{k: e[k] for k in kept if k in e} for e in log(tmp_path, name)] for name in ("whole", "killed")]
    assert logs[0] == logs[1] and any("skipped" in entry for entry in logs[0])


def test_a_step_that_is_skipped_leaves_no_trace(home, tmp_path, monkeypatch):
    """A gradient that overflows in step 3 is dropped: what comes before and after is a run without that step's data."""
    take = MasterAdamW._take_gradients
    calls = []

    def overflow(self):
        norm = take(self)
        calls.append(norm)
        return norm * torch.inf if len(calls) == 3 else norm

    before = student(home, tmp_path, "two", optimisation=optimisation(steps=2, warmup=0.0))
    monkeypatch.setattr(MasterAdamW, "_take_gradients", overflow)
    monkeypatch.setattr(MasterAdamW, "learning_rate", lambda self, step: 1.0)
    student(home, tmp_path, "three", optimisation=optimisation(steps=3, warmup=0.0, nonfinite="skip"))
    monkeypatch.setattr(MasterAdamW, "_take_gradients", take)
    student(home, tmp_path, "two", optimisation=optimisation(steps=2, warmup=0.0))
    assert log(tmp_path, "three")[2]["nonfinite"] == ["gradient"]
    after = load_file(tmp_path / "three/model.safetensors")
    assert all(torch.equal(weight, after[name]) for name, weight in load_file(before / "model.safetensors").items())


def test_a_run_of_which_nothing_is_finite_stops_all_the_same(home, tmp_path):
    wild = optimisation(learning_rate=1e30, clip=1e30, warmup=0.0, steps=60, nonfinite="skip")
    with pytest.raises(GraceError, match="not finite for 20 steps in a row"):
        student(home, tmp_path, "wild", optimisation=wild)
