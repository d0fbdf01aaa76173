"""A run that is killed goes on with another number of processes, from the step where it was and not from the first."""

import subprocess
from pathlib import Path

import pytest
import started
import torch
from tiny_runs import GRACE, log, optimisation, run_file, weights

HELPER = Path(__file__).parents[2] / "helpers" / "killed_train.py"
STEPS = optimisation(steps=9, checkpoint_every=2, micro_batch=2)


def train(home, folder, name, processes, at):
    """A torchrun that is killed in step `at`, if that is not negative; what it said on standard error."""
    run = run_file(folder, "run", **GRACE, optimisation=STEPS)
    paths = [run, home / "data", folder / name, folder / f"{name}.jsonl", folder / f".{name}"]
    paths += [home / "baseline", home / "cache"]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = started.python(*launch, HELPER, at, *paths)
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == (at < 0), done.stderr[-3000:]
    return done.stderr


def test_two_then_one_then_three_processes_end_like_one(home, tmp_path):
    train(home, tmp_path, "whole", 1, -1)
    train(home, tmp_path, "moved", 2, 3)
    assert "written by 2 processes; going on with 1 from step 2" in train(home, tmp_path, "moved", 1, 7)
    assert "written by 1 processes; going on with 3 from step 6" in train(home, tmp_path, "moved", 3, -1)
    assert [entry["step"] for entry in log(tmp_path, "moved")] == list(range(1, 10))
    for a, b in zip(log(tmp_path, "whole"), log(tmp_path, "moved"), strict=True):
        for part in ("loss", "ce", "kd", "rcka", "beta", "grad_norm"):
            assert a[part] == pytest.approx(b[part], rel=2e-3), (a["step"], part)
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "moved")
    for name in before:
        if name.endswith(".codes"):
            assert (before[name] != after[name]).float().mean() < 0.01, name


def test_on_as_many_processes_it_ends_with_the_same_bits(home, tmp_path):
    train(home, tmp_path, "whole", 2, -1)
    train(home, tmp_path, "killed", 2, 5)
    said = train(home, tmp_path, "killed", 2, -1)
    assert "going on" not in said and "starting at step 0" not in said
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [e["loss"] for e in log(tmp_path, "whole")] == [e["loss"] for e in log(tmp_path, "killed")]
