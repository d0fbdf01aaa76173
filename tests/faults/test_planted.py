"""Planted faults: each is caught by the subcommand that would read it, in one sentence, before there is a result.

The files are those of a small experiment that the pipeline's own subcommands made; a fault keeps size and times where
it can, as a bad disk or a careless copy would.
"""

import json
import os
import shutil

import pytest
from small_experiment import build
from typer.testing import CliRunner

from grace.cli import app
from grace.errors import GraceError
from grace.files import write_json
from grace.train import checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return build(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def home(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "home")
    return tmp_path / "home"


def flip(path):
    """One bit in the middle; size and time as before."""
    state, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def remove(path):
    path.unlink()


COMMANDS = {
    "train": "train --run student.json --data data --out new --log new.jsonl --checkpoints .new"
    " --init baseline --cache cache",
    "evaluate": "evaluate --run evaluation.json --data data --model packed --out new",
    "evaluate plain": "evaluate --run evaluation.json --data data --model student --out new",
    "pack": "pack --model student --out new",
    "export": "export --packed packed --format awq --out new",
    "cache write": "cache write --run cache.json --teacher teacher --data data --out new --shard 0",
    "cache finish": "cache finish --run cache.json --teacher teacher --data data --out cache",
}  # fmt: skip

FAULTS = [
    ("train", "baseline/model.safetensors", flip), ("train", "baseline/model.safetensors", cut),
    ("train", "baseline/model.safetensors", remove), ("train", "baseline/config.json", flip),
    ("train", "data/train.parquet", flip), ("train", "data/train.parquet", cut),
    ("train", "data/train.parquet", remove),
    ("train", "data/processor/tokenizer.json", flip), ("train", "data/vision_tower/model.safetensors", flip),
    ("train", "cache/*.safetensors", flip), ("train", "cache/*.safetensors", cut),
    ("train", "cache/*.safetensors", remove),
    ("train", "cache/teacher_head.safetensors", flip), ("train", "student.json", halve),
    ("evaluate", "packed/model.safetensors", flip), ("evaluate", "packed/model.safetensors", cut),
    ("evaluate", "packed/model.safetensors", remove), ("evaluate", "packed/config.json", flip),
    ("evaluate", "packed/tokenizer.json", flip), ("evaluate", "packed/chat_template.jinja", flip),
    ("evaluate", "data/benchmarks/colour.parquet", flip), ("evaluate", "data/benchmarks/colour.parquet", remove),
    ("evaluate", "packed/manifest.json", halve), ("evaluate plain", "student/model.safetensors", flip),
    ("pack", "student/quantization.safetensors", flip), ("pack", "student/model.safetensors", flip),
    ("pack", "student/quantization.safetensors", remove), ("export", "packed/model.safetensors", flip),
    ("cache write", "teacher/model.safetensors", flip), ("cache write", "data/train.parquet", flip),
    ("cache finish", "teacher/model.safetensors", flip), ("cache finish", "cache/*.safetensors", flip),
]  # fmt: skip


@pytest.mark.parametrize("command, file, fault", FAULTS, ids=[f"{c}-{f}-{k.__name__}" for c, f, k in FAULTS])
def test_a_planted_fault_is_one_sentence_and_no_result(home, monkeypatch, command, file, fault):
    monkeypatch.chdir(home)
    paths = [path for path in sorted(home.glob(file)) if "*" not in file or path.name.startswith(("shard", "part"))]
    assert paths, file
    fault(paths[0])
    if command == "cache finish":
        (home / "cache/manifest.json").unlink()
    done = CliRunner().invoke(app, COMMANDS[command].split())
    assert isinstance(done.exception, GraceError), done.exception
    said = str(done.exception)
    assert "\n" not in said and len(said) < 600
    assert not (home / "new/manifest.json").exists() and not (home / "new.jsonl").exists()
    assert command != "cache finish" or not (home / "cache/manifest.json").exists()


def test_untouched_it_all_works(home, monkeypatch):
    """So that a refusal above is the fault's."""
    monkeypatch.chdir(home)
    for command in ("train", "pack", "export", "cache write"):
        done = CliRunner().invoke(app, COMMANDS[command].split())
        assert done.exception is None, (command, done.exception)
        shutil.rmtree(home / "new", ignore_errors=True)


def test_code_in_a_checkpoint_is_not_run(home, monkeypatch):
    """A pickle that would write a file, with the right hash beside it."""
    import pickle

    from grace.hashes import sha256

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(home / "owned"),)

    monkeypatch.chdir(home)
    folder = home / ".new/step-0000001"
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(pickle.dumps(Attack()))
    (folder / "train.jsonl").write_text("")
    made = home / ".s/finished/manifest.json"
    identity = json.loads(made.read_text())["identity"]  # the same run as `student`
    files = {name: sha256(folder / name) for name in (".metadata", "train.jsonl")}
    about = {"step": 1, "identity": identity, "processes": 1, "files": files, "facts": {}}
    write_json(folder / "checkpoint.json", about | {"own_sha256": checkpoint._own_hash(about)})
    done = CliRunner().invoke(app, COMMANDS["train"].split())
    assert done.exception is None, done.exception
    assert not (home / "owned").exists() and (home / "new/manifest.json").is_file()
