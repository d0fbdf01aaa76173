"""Commands whose process is forked from one that has imported what takes long; see warm.py."""

import atexit
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from grace.arithmetic import SETTINGS, THREADS

ROOT = Path(__file__).resolve().parents[2]
WARM = Path(__file__).with_name("warm.py")


def environment() -> dict[str, str]:
    """A user's: what the tests fix of the arithmetic, each subcommand fixes for itself, but for `grace bench`."""
    mine = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, THREADS)}
    return {**mine, "PYTHONPATH": os.pathsep.join([str(ROOT / "workflow"), os.environ.get("PYTHONPATH", "")])}


@cache
def _server() -> Path:
    """The socket of the process that this test process's commands are forked from; it ends with this one."""
    path = Path(tempfile.mkdtemp()) / "grace"
    command = [sys.executable, WARM, "serve", path]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())
    assert server.stdout.readline() == b"ready\n"
    program = path.with_name("python")
    program.write_text(f'#!/bin/sh\nexec {shlex.join(_asking(path, "python"))} "$@"\n')
    program.chmod(0o755)
    atexit.register(lambda: (server.stdin.close(), server.wait(), shutil.rmtree(path.parent)))
    return path


def _asking(path: Path, what: str) -> list[str]:
    return [sys.executable, "-S", "-E", str(WARM), what, str(path)]


def python(*arguments: object) -> list[str]:
    """The command `python ARGUMENTS`."""
    return [*_asking(_server(), "python"), *map(str, arguments)]


def grace(*words: object) -> list[str]:
    """The command `grace WORDS`."""
    return [*_asking(_server(), "grace"), *map(str, words)]


def snakemake(*arguments: object) -> list[str]:
    """The command `snakemake ARGUMENTS`, whose jobs are started so too."""
    return [*_asking(_server(), "snakemake"), *map(str, arguments)]
