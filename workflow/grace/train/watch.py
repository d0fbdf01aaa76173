"""Who else is told of every step: TensorBoard, Weights & Biases, torch's profiler.

Chosen by the environment and not by the configuration: no result depends on them, so they must train nothing again.
    GRACE_TENSORBOARD   folder for event files
    GRACE_WANDB         project; nothing is sent anywhere unless WANDB_MODE is `online`
    GRACE_PROFILE       steps to profile, behind three others; the trace lies beside the checkpoints
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from grace.errors import GraceError
from grace.world import World

NEEDS = {"GRACE_TENSORBOARD": "tensorboard", "GRACE_WANDB": "wandb"}
BEFORE = 2  # steps of a profile that are not looked at, and one of warm-up


def check_watchers() -> None:
    """Refuse what the environment asks for and cannot be had, before anything is loaded."""
    for variable, package in NEEDS.items():
        if os.environ.get(variable) and importlib.util.find_spec(package) is None:
            raise GraceError(f"{variable} is set and {package} is not installed; `pip install {package}`, or unset it")
    if not os.environ.get("GRACE_PROFILE", "1").isdigit():
        raise GraceError(f"GRACE_PROFILE is {os.environ['GRACE_PROFILE']}; give a number of steps, or unset it")


class Watchers:
    """The watchers of one run; of several processes the first tells of steps, and each has a profile of its own.

    Args:
        checkpoints: the run's folder, by which it is called.
        done: steps done before; what was told of later ones is forgotten.
        about: JSON-able facts of the run.
    """

    def __init__(self, checkpoints: Path, done: int, about: Mapping[str, Any], world: World) -> None:
        parts = checkpoints.absolute().parts
        name = "-".join(parts[parts.index(".checkpoints") + 1 :] if ".checkpoints" in parts else parts[-1:])
        self._board: Any = None
        self._run: Any = None
        self._profile: Any = None
        if world.first and (folder := os.environ.get("GRACE_TENSORBOARD")):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(Path(folder) / name), purge_step=done + 1)
        if world.first and (project := os.environ.get("GRACE_WANDB")):
            wandb: Any = importlib.import_module("wandb")
            mode: Any = os.environ.get("WANDB_MODE", "offline")
            folder = str(checkpoints)
            self._run = wandb.init(
                project=project, name=name, id=name, resume="allow", mode=mode, dir=folder, config=dict(about)
            )
        if steps := int(os.environ.get("GRACE_PROFILE", "0")):
            self._trace = checkpoints / f"profile-{world.rank}.json"
            self._profile = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=BEFORE, warmup=1, active=steps, repeat=1),
                on_trace_ready=self._write_trace,
            )
            self._profile.start()

    def _write_trace(self, profile: Any) -> None:
        profile.export_chrome_trace(str(self._trace))
        print(f"profile of {self._trace.parent}: {self._trace}", file=sys.stderr)

    def step(self, entry: Mapping[str, Any]) -> None:
        """Tell of a step's numbers, as the training log has them."""
        numbers = {f"train/{name}": value for name, value in entry.items() if isinstance(value, int | float)}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, entry["step"])
        if self._run is not None:
            self._run.log(numbers, step=entry["step"])
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        """Write what is left."""
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._run.finish()
        if self._profile is not None:
            self._profile.stop()
