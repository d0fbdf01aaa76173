"""Checkpoints of a running job: whole or absent, complete, checked when read, and outside the rule's outputs.

A run that is killed at any step and started again continues from its last checkpoint and ends with the same bits,
because the order of the data depends on the seed and the step alone and nothing else is random. Every process keeps
its own part; a checkpoint counts once its `checkpoint.json` is there, which is written after all parts are.
The two newest are kept: where one is damaged, the run goes on from the one before.

A finished model stays here too, as hard links that cost no room, until a later start of Snakemake has accepted the
output: Snakemake deletes outputs that it does not believe in, such as one that a clock set back makes older than its
inputs, and the training must not be lost with them.
"""

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from grace.errors import GraceError
from grace.files import MANIFEST, check_manifest, read_json, whole_file, whole_folder, write_json
from grace.hashes import sha256
from grace.world import SMALLER, World

COMPLETE = "checkpoint.json"
FINISHED = "finished"
KEPT = 2


def _steps(folder: Path) -> list[Path]:
    """The folders of checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def save_checkpoint(folder: Path, identity: str, step: int, state: dict[str, Any], log: Path, world: World) -> None:
    """Make `state` after `step` a checkpoint in `folder`.

    Args:
        folder: of this run's checkpoints.
        identity: which run it belongs to.
        step: optimiser steps done.
        state: what `torch.load` reads without running code: tensors and plain values; this process's own.
        log: the training curves up to here, kept with it.
        world: every process must call this.
    """
    here = folder / f"step-{step:07d}"
    part = here / f"rank{world.rank}.pt"
    with whole_file(part) as path:
        torch.save(state, path)
    files = {part.name: sha256(part)}
    if world.first:
        with whole_file(here / log.name) as path:
            shutil.copyfile(log, path)
        files[log.name] = sha256(here / log.name)
    files = dict(world.gather(list(files.items())))
    if world.first:
        about = {"step": step, "identity": identity, "processes": world.size, "files": files}
        write_json(here / COMPLETE, about)
        for old in _steps(folder)[KEPT:]:
            shutil.rmtree(old)
    world.barrier()


def load_checkpoint(folder: Path, identity: str, log: Path, world: World) -> tuple[int, dict[str, Any] | None]:
    """(steps done, state) of this run's last whole checkpoint, or (0, None); its curves are put back into `log`.

    A damaged one is named on standard error, and the one before it is taken, or none.
    """
    for here in _steps(folder):
        state, about, reason = None, {}, None
        try:
            about = read_json(here / COMPLETE)
            if (about["identity"], about["processes"]) != (identity, world.size):
                reason = ""  # of other parameters, data or code
            else:
                state = _read(here, about["files"], world)
        except (GraceError, KeyError, TypeError) as error:
            reason = str(error) if (here / COMPLETE).exists() else ""  # a kill came before it was complete
        if any(world.gather([state is None])):  # all processes go on from the same step
            if reason and world.first:
                print(f"{here}: damaged checkpoint ({reason}); going on from the one before", file=sys.stderr)
            continue
        if world.first:
            with whole_file(log) as part:
                shutil.copyfile(here / log.name, part)
        return about["step"], state
    if world.first:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        for old in _steps(folder):
            shutil.rmtree(old)
    return 0, None


def _read(here: Path, files: dict[str, str], world: World) -> dict[str, Any]:
    """This process's part; a `GraceError` where it, or for the first process the log, is not as it was written."""
    part = f"rank{world.rank}.pt"
    for name in [part, *(name for name in files if world.first and not name.endswith(".pt"))]:
        if not (here / name).is_file() or sha256(here / name) != files[name]:
            raise GraceError(f"{name} differs from what was written")
    try:
        return torch.load(here / part, map_location=world.device, weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise GraceError(f"{part}: {error}") from error


def note_part(folder: Path, identity: str, part: int) -> None:
    """Leave the size that this run's parts have from its next start on, whichever process finds it too large first."""
    write_json(folder / SMALLER, {"identity": identity, "part": part})


def noted_part(folder: Path, identity: str, part: int, world: World) -> int:
    """`part`, or the smaller size that was noted for this run; every process must call this and gets the same."""
    try:
        about = read_json(folder / SMALLER)
        noted = int(about["part"]) if about["identity"] == identity else part
    except (GraceError, KeyError, TypeError, ValueError):
        noted = part
    return world.agreed(max(1, min(part, noted)))


def finish(folder: Path, identity: str, log: Path, save: Callable[[Path], None]) -> None:
    """Keep a finished run in `folder`: the model folder that `save` writes and its curves; checkpoints are removed."""
    with whole_folder(folder / FINISHED, identity=identity) as kept:
        (kept / "model").mkdir()
        save(kept / "model")
        shutil.copyfile(log, kept / "log.jsonl")
    for old in _steps(folder):
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
    """Make the finished run the outputs `out`, a model folder with `about` in its manifest, and `log`."""
    kept = folder / FINISHED
    with whole_folder(out, **about) as part:
        for path in sorted((kept / "model").rglob("*")):
            target = part / path.relative_to(kept / "model")
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                _link_or_copy(path, target)
    with whole_file(log) as part:
        shutil.copyfile(kept / "log.jsonl", part)


def _link_or_copy(source: Path, target: Path) -> None:
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
