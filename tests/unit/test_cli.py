"""What the command line says of errors that a user can do something about, and what it leaves to be a traceback."""

import errno

import pytest
import torch

from grace import cli
from grace.errors import GraceError


@pytest.mark.parametrize(
    "error, wanted",
    [
        (GraceError("a: b; c"), "grace: a: b; c\n"),
        (OSError(errno.ENOSPC, "No space left", "x.json"), "grace: x.json: could not be written (No space left); free"),
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


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.ENOENT, "No such file"), KeyError("x")])
def test_anything_else_is_a_bug_and_keeps_its_traceback(monkeypatch, error):
    def app():
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(type(error)):
        cli.main()
