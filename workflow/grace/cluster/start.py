"""Before a run: what a killed Snakemake left is put in order, so that nobody has to.

A lock of Snakemake's is a file and outlives its owner. Beside it each run holds one of the operating system, which ends
with its process however that ends: who gets it knows that no other run of this folder on this machine lives, and that
Snakemake's locks here are left-overs. A run of another machine, on a shared file system without working locks, can't be
seen in this way; its locks are left alone, and `snakemake --unlock` is the user's decision.
"""

import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from grace.cluster.lock import lock_path
from grace.cluster.undone_edits import put_back
from grace.errors import GraceError
from grace.files import MANIFEST
from grace.provenance.snakemake_records import METADATA, STATE, record_path, recorded_output, restore

UNFINISHED = '{"external_jobid": null}'  # Snakemake's mark of an unfinished output, which it makes again
DOUBTED = '{"external_jobid": null, "doubted": true}'  # the same to Snakemake, and ours
_held: list[int] = []  # open for as long as this process lives


def recover(results: str | Path, wanted: Callable[[str], str | None] = lambda name: None) -> None:
    """All of it, before the DAG is made; and the records of results that came by git and DVC are put back.

    Args:
        results: the folder of the experiment.
        wanted: what is to be frozen now, as `put_back` takes it.

    Raises:
        GraceError: this folder can't be written, or its records are damaged.
    """
    try:
        alone = take_over()
        if alone:
            mend_records()
            drop_accepted(results)
        restore(results)
        if alone:
            for frozen in put_back(results, wanted):
                _mark(record_path(frozen)).unlink(missing_ok=True)
            doubt_frozen(results)
    except OSError as error:
        raise GraceError(
            f"{error.filename or results}: {error.strerror}; Snakemake has to write here, in .snakemake and results: "
            "run it in a folder of yours, or ask the owner of this one for the right to write"
        ) from None


def take_over(wait_s: float = 3.0) -> bool:
    """Join the runs of this folder until the process ends; alone among them, first remove Snakemake's left-over locks.

    Args:
        wait_s: how long to wait, where there are locks of Snakemake's, for runs to end that look for a moment only, as
            dry runs do.

    Returns:
        Whether no other run of this folder lives. Where one does, Snakemake itself compares what both would write.
    """
    path = STATE / "grace" / "run.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # a group that shares the folder has its umask say so
    _held.append(descriptor)
    end = time.monotonic() + wait_s
    while not (alone := _locked(descriptor, fcntl.LOCK_EX)) and _left() and time.monotonic() < end:
        time.sleep(0.1)
    if alone:
        here, before = platform.node(), os.pread(descriptor, 1000, 0).decode(errors="replace")
        if before in ("", here):
            for lock in _left():
                lock.unlink(missing_ok=True)
        if not _left():
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, here.encode(), 0)
        alone = before in ("", here)
    _locked(descriptor, fcntl.LOCK_SH)
    return alone


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:  # held by a living run, or a file system without locks
        return False
    return True


def _left() -> list[Path]:
    return sorted((STATE / "locks").glob("*.lock"))


def mend_records() -> None:
    """Remove records that a kill or a full disk cut, and have their outputs built again."""
    for path in sorted(METADATA.rglob("*")):
        if path.is_dir() or _readable(path):
            continue
        path.unlink()
        with suppress(ValueError):  # no name of a record: somebody else's file
            recorded_output(path)
            _put(_mark(path), UNFINISHED)
    for path in (STATE / "incomplete").rglob("*"):
        if path.is_file() and not _readable(path):
            path.write_text(UNFINISHED)


def doubt_frozen(results: str | Path) -> None:
    """Mark frozen parameters and code that came without Snakemake's record of them to be frozen again.

    In a clone they are those of the commit's results. Without a record Snakemake takes them as they are, also where the
    configuration or the code has changed since. The mark goes when the record comes, by `dvc pull`.
    """
    for path in sorted((Path(results) / "config").rglob("*.json")):
        record = record_path(path.as_posix())
        mark = _mark(record)
        if record.is_file() and mark.is_file() and mark.read_text() == DOUBTED:
            mark.unlink()
        elif not record.is_file() and not mark.exists():
            _put(mark, DOUBTED)


def _mark(record: Path) -> Path:
    """Where Snakemake marks an output as unfinished, by where it keeps the output's record."""
    return STATE / "incomplete" / record.relative_to(METADATA)


def _put(mark: Path, text: str) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(text)


def _readable(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except ValueError:
        return False


def drop_accepted(results: str | Path) -> None:
    """Remove finished trainings that are kept beside their checkpoints and whose outputs Snakemake has accepted.

    It accepts an output at the end of its job, when it records it and takes the mark of an unfinished job away.

    Args:
        results: the folder of the experiment; `.checkpoints/X/finished` belongs to `X/model`.
    """
    results = Path(results)
    home = results / ".checkpoints"
    for kept in sorted(home.rglob("finished")) if home.is_dir() else []:
        run = kept.parent.relative_to(home)
        output = results / run / "model" / MANIFEST
        record = record_path(output.as_posix())
        busy = _mark(record).exists() or lock_path(kept.parent).exists()
        if output.is_file() and record.is_file() and not busy:
            shutil.rmtree(kept.parent)
