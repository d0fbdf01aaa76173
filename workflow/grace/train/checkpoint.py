"""Checkpoints of a running job: whole or absent, complete, and outside the rule's outputs.

A run that is killed at any step and started again continues from its last checkpoint and ends with the same bits,
because the order of the data depends on the seed and the step alone and nothing else is random.
"""

import json
from pathlib import Path
from typing import Any

import torch

from grace.errors import GraceError
from grace.files import whole_file

FILE = "checkpoint.pt"


def save_checkpoint(folder: Path, identity: str, state: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder`; `identity` says which run it belongs to."""
    with whole_file(folder / FILE) as part:
        torch.save({"identity": identity, **state}, part)


def load_checkpoint(folder: Path, identity: str) -> dict[str, Any] | None:
    """The checkpoint in `folder`, or None where there is none of this run; a damaged one is a `GraceError`."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise GraceError(f"{path}: damaged checkpoint ({error}); delete it to start this run again") from error
    return state if state.pop("identity") == identity else None


def cut_log(path: Path, steps: int) -> None:
    """Drop the log's lines of steps that a resumed run will do again."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                break  # the line that the kill cut through
            if entry["step"] <= steps:
                kept.append(line)
        with whole_file(path) as part:
            part.write_text("".join(f"{line}\n" for line in kept))
