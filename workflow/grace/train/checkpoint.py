"""Checkpoints of a running job: whole or absent, complete, and outside the rule's outputs.

A run that is killed at any step and started again continues from its last checkpoint and ends with the same bits,
because the order of the data depends on the seed and the step alone and nothing else is random. Every process keeps
its own part; a checkpoint counts once `latest.json` names it, which is written after all parts are there.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from grace.distributed import World
from grace.errors import GraceError
from grace.files import read_json, whole_file, write_json

LATEST = "latest.json"


def save_checkpoint(folder: Path, identity: str, step: int, state: dict[str, Any], world: World) -> None:
    """Make `state` after `step` the checkpoint in `folder`; `identity` says which run it belongs to."""
    part = folder / f"step-{step:07d}" / f"rank{world.rank}.pt"
    with whole_file(part) as path:
        torch.save(state, path)
    world.barrier()
    if world.first:
        write_json(folder / LATEST, {"step": step, "identity": identity, "processes": world.size})
        for old in folder.glob("step-*"):
            if old != part.parent:
                shutil.rmtree(old)


def load_checkpoint(folder: Path, identity: str, world: World) -> tuple[int, dict[str, Any] | None]:
    """(steps done, state) of this run's last checkpoint, or (0, None); a damaged one is a `GraceError`."""
    if not (folder / LATEST).exists():
        return 0, None
    latest = read_json(folder / LATEST)
    if latest["identity"] != identity or latest["processes"] != world.size:
        return 0, None
    path = folder / f"step-{latest['step']:07d}" / f"rank{world.rank}.pt"
    try:
        return latest["step"], torch.load(path, map_location=world.device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise GraceError(f"{path}: damaged checkpoint ({error}); delete {folder} to start this run again") from error


def cut_log(path: Path, steps: int) -> None:
    """Drop the log's lines of steps that a resumed run will do again."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break  # the line that the kill cut through
        if entry["step"] <= steps:
            kept.append(line)
    with whole_file(path) as part:
        part.write_text("".join(f"{line}\n" for line in kept))
