"""Killed, on a full disk or short of memory: the run goes on and ends as if nothing had happened."""

import os
import re
import signal
import subprocess
import time

import pytest
import started
import torch
from safetensors.torch import load_file
from tiny_runs import GRACE, log, optimisation, run_file, student, weights

from grace.errors import GraceError
from grace.files import check_manifest
from grace.train import loop
from grace.train.commands import train


def test_a_killed_run_ends_with_the_same_bits(home, tmp_path):
    steps = optimisation(steps=60, checkpoint_every=3)
    whole = student(home, tmp_path, "whole", **GRACE, optimisation=steps)
    run = run_file(tmp_path, "killed", **GRACE, optimisation=steps)
    words = ["--run", run, "--data", home / "data", "--out", tmp_path / "killed", "--log", tmp_path / "killed.jsonl"]
    words += ["--checkpoints", tmp_path / ".killed", "--init", home / "baseline", "--cache", home / "cache"]
    job = subprocess.Popen(started.grace("train", *words))
    while not list((tmp_path / ".killed").glob("step-*/checkpoint.json")):
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (tmp_path / "killed").exists()
    train(
        run,
        home / "data",
        tmp_path / "killed",
        tmp_path / "killed.jsonl",
        tmp_path / ".killed",
        home / "baseline",
        home / "cache",
    )
    before, after = weights(whole), weights(tmp_path / "killed")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [e["loss"] for e in log(tmp_path, "whole")] == [e["loss"] for e in log(tmp_path, "killed")]


LITTLE_ROOM = """
import resource, sys
from grace.cli import main

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
main()
"""


@pytest.mark.parametrize("room, file", [(60_000, "step-0000002"), (2_000_000, "finished")])
def test_a_full_disk_stops_in_one_sentence_and_the_next_run_goes_on(home, tmp_path, room, file):
    """No file may grow beyond `room` bytes: first a checkpoint does not fit, then the model itself."""
    run = run_file(tmp_path, "disk", bits=4)
    paths = {name: tmp_path / end for name, end in dict(out="disk", log="disk.jsonl", checkpoints=".disk").items()}
    flags = [f"--{name}={path}" for name, path in paths.items()]
    flags += [f"--run={run}", f"--data={home / 'data'}", f"--init={home / 'baseline'}"]
    command = started.python("-c", LITTLE_ROOM, room, "train", *flags)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("grace: ")]
    assert f"/{file}: could not be written" in said and "free space and run again" in said
    assert "Traceback" not in done.stderr
    assert not paths["out"].exists() and not list(tmp_path.rglob("*.part"))
    train(run, home / "data", tmp_path / "disk", tmp_path / "disk.jsonl", tmp_path / ".disk", home / "baseline")
    train(run, home / "data", tmp_path / "easy", tmp_path / "easy.jsonl", tmp_path / ".easy", home / "baseline")
    disk, easy = (load_file(tmp_path / name / "model.safetensors") for name in ("disk", "easy"))
    assert all(torch.equal(disk[name], easy[name]) for name in easy)


def test_out_of_memory_cuts_smaller_parts_and_changes_no_result(home, tmp_path, monkeypatch, capsys):
    """The accelerator is played by a loss that refuses more than two conversations at once, from the third step on."""
    whole = student(home, tmp_path, "whole", **GRACE)
    asked = []

    def backward(self, batch, *rest, real=loop.Objective.backward):
        asked.append(len(batch.keys))
        if len(asked) > 2 and asked[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, *rest)

    monkeypatch.setattr(loop.Objective, "backward", backward)
    cut = student(home, tmp_path, "cut", **GRACE)
    assert asked[:2] == [6, 6] and max(asked[-6:]) == 1
    assert re.findall(r"out of memory; going on with micro_batch (\d)", capsys.readouterr().err) == ["3", "1"]
    for a, b in zip(log(tmp_path, whole.name), log(tmp_path, cut.name), strict=True):
        for part in ("loss", "ce", "kd", "rcka", "grad_norm"):
            assert a[part] == pytest.approx(b[part], rel=2e-3), part


SHORT_OF_MEMORY = """
# Read by every Python that starts: the second process plays a GPU that holds one conversation from its third pass on.
import os

if os.environ.get("RANK") == "1":
    import torch

    from grace.train.objective import Objective

    asked, real = [], Objective.backward

    def backward(self, batch, *rest):
        asked.append(len(batch.keys))
        if len(asked) > 2 and asked[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, *rest)

    Objective.backward = backward
"""


def test_out_of_memory_on_one_of_two_processes_starts_both_again_with_smaller_parts(home, tmp_path, monkeypatch):
    one = student(home, tmp_path, "one", **GRACE, optimisation=optimisation(micro_batch=3))
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SHORT_OF_MEMORY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    flags = {
        "run": tmp_path / "one.json",
        "data": home / "data",
        "out": tmp_path / "two",
        "log": tmp_path / "two.jsonl",
    }
    flags |= {"checkpoints": tmp_path / ".two", "init": home / "baseline", "cache": home / "cache", "processes": 2}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    done = subprocess.run(started.grace("train", *words), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 3: out of memory with micro_batch 3 (CUDA out of memory); all 2 processes have to start" in done.stderr
    assert done.stderr.count("all processes start again") == 1
    check_manifest(tmp_path / "two")
    assert not (tmp_path / ".two/smaller.json").exists(), "nothing of it is left for another run"
    for a, b in zip(log(tmp_path, one.name), log(tmp_path, "two"), strict=True):
        for part in ("step", "loss", "ce", "kd", "rcka", "beta", "grad_norm"):
            assert a[part] == pytest.approx(b[part], rel=2e-3), part


def test_out_of_memory_with_one_conversation_is_a_sentence(home, tmp_path, monkeypatch):
    def backward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop.Objective, "backward", backward)
    with pytest.raises(GraceError, match=r"step 1: out of memory with micro_batch 1 .* lower micro_batch"):
        student(home, tmp_path, "none")
