"""A checkpoint is whole or it is not used, and a finished run is not lost with its output."""

import os
import pickle
import shutil

import pytest
import torch

from grace.errors import GraceError
from grace.files import check_manifest, read_json, sha256, write_json
from grace.train import checkpoint
from grace.train.checkpoint import Checkpoints, Part
from grace.train.finished_run import finish, finished, publish
from grace.world import World

ONE = World()


@pytest.fixture
def folder(tmp_path):
    """Checkpoints after steps 2, 4 and 6, of which the newest two are kept."""
    log = tmp_path / "train.jsonl"
    saver = Checkpoints(tmp_path, "mine", log, ONE)
    weight = torch.zeros(1000)
    for step in (2, 4, 6):
        with log.open("a") as file:
            file.write(f'{{"step": {step}}}\n')
        weight.fill_(step)
        saver.save(step, {"weight": Part(weight)}, {"beta": step / 3})
        weight.fill_(-1)  # training goes on while it is written
    saver.wait()
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-0000004", "step-0000006"]
    with log.open("a") as file:
        file.write('{"step": 7}\n{"st')  # what a kill leaves
    return tmp_path


def load(folder, identity="mine"):
    weight = torch.zeros(1000)
    step, facts = Checkpoints(folder, identity, folder / "train.jsonl", ONE).load({"weight": Part(weight)})
    assert torch.equal(weight, torch.full((1000,), float(step))) and (facts or {}).get("beta", 0.0) == step / 3
    return step


def test_the_newest_is_taken_with_its_curves(folder):
    assert load(folder) == 6
    assert (folder / "train.jsonl").read_text() == '{"step": 2}\n{"step": 4}\n{"step": 6}\n'


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name, place", [("__0_0.distcp", 0.5), ("__0_0.distcp", 0.01), (".metadata", 0.5),
    ("train.jsonl", 0.5),
                                         ("checkpoint.json", 0.9), ("checkpoint.json", 0.0)])  # fmt: skip
def test_a_flipped_bit_falls_back_to_the_one_before(folder, capsys, name, place):
    path = folder / "step-0000006" / name
    flip(path, int(place * path.stat().st_size))
    assert load(folder) == 4
    assert (folder / "train.jsonl").read_text() == '{"step": 2}\n{"step": 4}\n'
    assert "damaged checkpoint" in capsys.readouterr().err


def test_every_bit_of_a_checkpoint_counts(folder):
    path = folder / "step-0000006/__0_0.distcp"
    whole = path.read_bytes()
    for at in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        assert load(folder) == 4
    path.write_bytes(whole)
    assert load(folder) == 6


def test_all_damaged_starts_again(folder):
    for path in folder.glob("step-*/__0_0.distcp"):
        path.write_bytes(b"")
    assert load(folder) == 0
    assert not list(folder.glob("step-*")) and not (folder / "train.jsonl").exists()


def test_one_that_was_not_completed_and_another_run_s_do_not_count(folder, capsys):
    (folder / "step-0000006/checkpoint.json").unlink()
    assert load(folder) == 4
    assert not capsys.readouterr().err
    assert load(folder, "other parameters, data or code") == 0
    assert "its checkpoints are of other parameters, data or code; starting at step 0" in capsys.readouterr().err


def test_a_checkpoint_that_runs_code_is_not_taken(folder, capsys):
    """Its list of tensors is a pickle."""

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(folder / "owned"),)

    here = folder / "step-0000006"
    (here / ".metadata").write_bytes(pickle.dumps(Attack()))
    about = read_json(here / "checkpoint.json")
    del about["own_sha256"]
    about["files"][".metadata"] = sha256(here / ".metadata")
    write_json(here / "checkpoint.json", about | {"own_sha256": checkpoint._own_hash(about)})
    assert load(folder) == 4
    assert "asks for posix.mkdir" in capsys.readouterr().err and not (folder / "owned").exists()


def test_what_fails_in_the_background_is_said(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text("")
    saver = Checkpoints(tmp_path, "mine", tmp_path / "train.jsonl", ONE)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.save", full)
    saver.save(2, {"weight": Part(torch.zeros(3))}, {})
    with pytest.raises(GraceError, match=r"step-0000002: could not be written \(No space left on device\)"):
        saver.wait()
    assert not list(tmp_path.glob("step-*"))
    saver.raise_failure()  # once is enough


def test_a_finished_run_outlives_its_output(tmp_path):
    checkpoints, out, log = tmp_path / ".checkpoints", tmp_path / "model", tmp_path / "train.jsonl"
    checkpoints.mkdir()
    (checkpoints / "train.jsonl").write_text('{"step": 1, "loss": 2.5, "seconds": 0.25, "memory_gib": 1.5}\n')
    finish(
        checkpoints, "mine", checkpoints / "train.jsonl", lambda folder: (folder / "w").write_bytes(b"weights") and None
    )
    for _ in range(2):  # the second time after Snakemake has deleted what it does not believe in
        assert finished(checkpoints, "mine") and not finished(checkpoints, "other")
        publish(checkpoints, out, log, kind="model")
        assert (out / "w").read_bytes() == b"weights" and check_manifest(out)["kind"] == "model"
        assert list(check_manifest(out)["files"]) == ["w"], "no times"
        assert (out / "w").stat().st_ino == (checkpoints / "finished/model/w").stat().st_ino, "shares its bytes"
        assert log.read_text() == '{"step": 1, "loss": 2.5}\n', "what another machine gives too"
        assert (out / "timing.jsonl").read_text() == '{"step": 1, "seconds": 0.25, "memory_gib": 1.5}\n'
        shutil.rmtree(out)
        log.unlink()


def test_a_damaged_finished_run_is_trained_again(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("")
    finish(tmp_path, "mine", tmp_path / "train.jsonl", lambda folder: (folder / "w").write_bytes(b"weights") and None)
    flip(tmp_path / "finished/model/w", 3)
    assert not finished(tmp_path, "mine")
    assert "damaged; training again" in capsys.readouterr().err
    assert not (tmp_path / "finished").exists()
