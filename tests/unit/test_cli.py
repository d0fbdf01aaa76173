"""What the command line says of errors that a user can do something about, and what it leaves to be a traceback."""

import errno

import pytest
import torch

from grace import cli
from grace.errors import GraceError
from grace.provenance.snakemake_records import save


@pytest.mark.parametrize(
    "error, wanted",
    [
        (GraceError("a: b; c"), "grace: a: b; c\n"),
        (OSError(errno.ENOSPC, "No space left", "x.json"), "grace: x.json: could not be written (No space left); free"),
        (
            PermissionError(errno.EACCES, "Permission denied", "x"),
            "grace: x: Permission denied; correct the path, or its",
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), "grace: x: Is a directory; correct the path"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            "(OutOfMemoryError: CUDA out of memory. Tried); lower",
        ),
        (MemoryError(), "grace: out of memory (MemoryError); lower the batch of this job, or give it more memory\n"),
    ],
)
def test_a_sentence_and_exit_status_1(monkeypatch, capsys, error, wanted):
    def app():
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    said = capsys.readouterr().err
    assert wanted in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a bug"), OSError(errno.ENOENT, "No such file"), OSError(errno.EACCES, "of no file"), KeyError("x")],
)
def test_anything_else_is_a_bug_and_keeps_its_traceback(monkeypatch, error):
    def app():
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(type(error)):
        cli.main()


JUNK = ("nowhere", "folder", "empty", "binary", "list.json", "/dev/null", "loop", "a" * 300)
COMMANDS = (
    "prepare --run {0} --out out", "train --run {0} --data {0} --out out --log out.jsonl --checkpoints c --init {0}",
    "cache write --run {0} --teacher {0} --data {0} --out out --shard 0", "cache info {0}", "cache verify {0}",
    "pack --model {0} --out out", "export --packed {0} --format awq --out out", "card {0} --out out",
    "evaluate --run {0} --data {0} --model {0} --out out", "report tables --results {0} --out out", "diff {0} {0}",
    "provenance {0}", "provenance {0} --cell a b", "verify {0}", "check {0}", "config default {0}", "merge {0}",
    "accept --reason x --configfile {0}", "card folder --out out --metrics {0}",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_paths_that_are_something_else_are_one_sentence(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "loop").symlink_to("loop")
    before = set(tmp_path.rglob("*"))
    for junk in JUNK:
        monkeypatch.setattr("sys.argv", ["grace", *command.format(junk).split()])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        assert ended.value.code == 1 and "grace: " in said and "Traceback" not in said, (junk, said)
        assert not [path for path in set(tmp_path.rglob("*")) - before if not path.is_dir()], junk


def test_records_of_no_folder_make_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GraceError, match="nowhere: no such folder; give the experiment's"):
        save("nowhere")
    assert not list(tmp_path.iterdir())
