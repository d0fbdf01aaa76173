"""A finished training beside its checkpoints, from which its outputs are made as often as they are needed.

The model stays there, as hard links that cost no room, until a later start of Snakemake has accepted the output:
Snakemake deletes outputs that it does not believe in, such as one that a clock set back makes older than its inputs,
and the training must not be lost with them.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from grace.errors import GraceError
from grace.files import MANIFEST, TIMING, check_manifest, whole_file, whole_folder
from grace.train.checkpoint import steps
from grace.train.meter import TIMED
from grace.world import SMALLER

FINISHED = "finished"


def finish(folder: Path, identity: str, log: Path, save: Callable[[Path], None]) -> None:
    """Keep a finished run in `folder`: the model folder that `save` writes and its curves; checkpoints are removed."""
    with whole_folder(folder / FINISHED, identity=identity) as kept:
        (kept / "model").mkdir()
        save(kept / "model")
        shutil.copyfile(log, kept / "log.jsonl")
    for old in steps(folder):
        shutil.rmtree(old)
    log.unlink(missing_ok=True)
    (folder / SMALLER).unlink(missing_ok=True)


def finished(folder: Path, identity: str) -> bool:
    """Whether this very run was finished before and is kept whole; a damaged one is removed with a sentence."""
    kept = folder / FINISHED
    if not (kept / MANIFEST).is_file():
        return False
    try:
        return check_manifest(kept)["identity"] == identity
    except (GraceError, KeyError, TypeError):
        print(f"{kept}: damaged; training again", file=sys.stderr)
        shutil.rmtree(kept)
        return False


def publish(folder: Path, out: Path, log: Path, **about: Any) -> None:
    """Make the finished run the outputs `out`, a model folder with `about` in its manifest, and `log`.

    `log` has what the same run gives again on another machine, bit for bit; the rest of each step (`TIMED`) is in the
    folder's `timing.jsonl`, which the manifest does not list.
    """
    kept = folder / FINISHED
    entries = [json.loads(line) for line in (kept / "log.jsonl").read_text().splitlines()]
    with whole_folder(out, **about) as part:
        for path in sorted((kept / "model").rglob("*")):
            target = part / path.relative_to(kept / "model")
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                _link_or_copy(path, target)
        names = ("step", *TIMED)
        (part / TIMING).write_text(_lines({name: entry[name] for name in names if name in entry} for entry in entries))
    with whole_file(log) as part:
        part.write_text(
            _lines({name: value for name, value in entry.items() if name not in TIMED} for entry in entries)
        )


def _lines(entries: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def _link_or_copy(source: Path, target: Path) -> None:
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
