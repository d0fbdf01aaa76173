"""Checkpoints of a running job: whole or absent, complete, checked when read, and outside the rule's outputs.

A run that is killed at any step and started again continues from its last checkpoint and ends with the same bits on as
many processes, because the order of the data depends on the seed and the step alone and nothing else is random; on
another number of processes sums come in another order, and nothing else differs. torch.distributed.checkpoint writes
tensors: every process its rows of what is sharded, one of them what all have in full. They are written in the
background, from a copy, while training goes on. A checkpoint counts once its `checkpoint.json` is there, which is
written after all files are. The two newest are kept: where one is damaged, the run goes on from the one before.
"""

import hashlib
import json
import pickle
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from grace.errors import GraceError
from grace.files import read_json, whole_file, write_failure, write_json
from grace.hashes import sha256
from grace.world import SMALLER, World

COMPLETE = "checkpoint.json"
KEPT = 2
_LONGEST = timedelta(hours=6)  # that one process may wait for the others' disks


class Part(NamedTuple):
    """A tensor of the training's state.

    Attributes:
        local: what this process holds, changed in place when a checkpoint is loaded.
        rows: of the whole tensor, of which every process holds some, one after the other; None: each holds all of it.
    """

    local: torch.Tensor
    rows: int | None = None


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are.
        identity: which run they belong to.
        log: the training curves, kept with each.
        world: every process must make one and call its methods together.
        background: write a copy of the state while training goes on.
    """

    def __init__(self, folder: Path, identity: str, log: Path, world: World, background: bool = True) -> None:
        self.folder, self.identity, self.log, self.world = folder, identity, log, world
        self.background = background
        self.seconds = 0.0  # that training waited
        self._group: Any = None
        self._mesh: DeviceMesh | None = None
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._copies: dict[str, torch.Tensor] = {}

    def _join(self) -> None:
        """Make the processes' own group, over which the background exchanges what training does not wait for."""
        if self.world.size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=_LONGEST)
            self._mesh = DeviceMesh.from_group(self._group, "cpu")

    def save(self, step: int, parts: Mapping[str, Part], facts: Mapping[str, Any]) -> None:
        """Begin a checkpoint after `step`, behind the one before; a `GraceError` where that could not be written.

        Args:
            step: optimiser steps done.
            parts: tensors, the same names on every process.
            facts: JSON-able values, the same on every process.
        """
        start = time.monotonic()
        self._join()
        self.wait()
        curves = self.log.read_bytes() if self.world.first else b""
        copied = {name: (self._copied(name, part.local), part.rows) for name, part in parts.items()}
        state = {name: self._whole(local, rows) for name, (local, rows) in copied.items()}
        self._writing = self._thread.submit(self._write, step, state, dict(facts), curves)
        if not self.background:
            self.wait()
            self._copies.clear()
        self.seconds += time.monotonic() - start

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is whole."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def raise_failure(self) -> None:
        """Raise what the background failed with, if it has; do not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def _copied(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the host's memory, where the copies of the checkpoint before are written over."""
        kept = self._copies.get(name)
        if kept is None:
            kept = self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return kept.copy_(tensor)

    def _whole(self, local: torch.Tensor, rows: int | None) -> torch.Tensor:
        """A tensor as torch.distributed.checkpoint takes it, sharing the memory of this process's part."""
        if rows is None or self._mesh is None:
            return local
        shape = torch.Size((rows, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def _write(self, step: int, state: dict[str, Any], facts: dict[str, Any], curves: bytes) -> None:
        here = self.folder / f"step-{step:07d}"
        with _named(here):
            (here / COMPLETE).unlink(missing_ok=True)
            with _quiet():
                dcp.save(state, storage_writer=dcp.FileSystemWriter(here), **self._among())
            written = [path.name for path in here.glob(f"__{self.world.rank}_*")]
            if self.world.first:
                with whole_file(here / self.log.name) as path:
                    path.write_bytes(curves)
                written += [".metadata", self.log.name]
            files = {name: sha256(here / name) for name in written}
            if self._group is not None:
                gathered: list[Any] = [None] * self.world.size
                dist.all_gather_object(gathered, files, group=self._group)
                files = {name: value for part in gathered for name, value in part.items()}
            if self.world.first:
                about = {"step": step, "identity": self.identity, "processes": self.world.size, "files": files}
                about["facts"] = facts
                write_json(here / COMPLETE, {**about, "own_sha256": _own_hash(about)})
                for old in steps(self.folder)[KEPT:]:
                    shutil.rmtree(old)

    def _among(self) -> dict[str, Any]:
        return {"no_dist": True} if self._group is None else {"process_group": self._group}

    def load(self, parts: Mapping[str, Part]) -> tuple[int, dict[str, Any] | None]:
        """(steps done, facts) of this run's last whole checkpoint, or (0, None).

        Its tensors are put into `parts` and its curves back into the log. A damaged one is named on standard error, and
        the one before it is taken, or none.
        """
        world = self.world
        other = False
        for here in steps(self.folder):
            about, reason = self._checked(here)
            problems = world.gather([] if reason is None else [reason])
            if not problems:
                try:
                    self._read(here, parts)
                except (Exception, CheckpointException) as error:  # torch raises many kinds, not all of them Exceptions
                    problems = [str(error).strip().splitlines()[-1]]
                problems = world.gather(problems)
            if problems:
                other = other or any(problem == _OTHER for problem in problems)
                if world.first and any(problem not in (_OTHER, _UNFINISHED) for problem in problems):
                    print(f"{here}: damaged checkpoint ({problems[0]}); going on from the one before", file=sys.stderr)
                continue
            if world.first:
                if about["processes"] != world.size:
                    print(
                        f"{here}: written by {about['processes']} processes; going on with {world.size} from step "
                        f"{about['step']}, which changes the order of sums alone",
                        file=sys.stderr,
                    )
                with whole_file(self.log) as part:
                    shutil.copyfile(here / self.log.name, part)
            return about["step"], about["facts"]
        if world.first:
            if other:
                print(
                    f"{self.folder}: its checkpoints are of other parameters, data or code; starting at step 0",
                    file=sys.stderr,
                )
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.unlink(missing_ok=True)
            for old in steps(self.folder):
                shutil.rmtree(old)
        world.barrier()
        return 0, None

    def _checked(self, here: Path) -> tuple[dict[str, Any], str | None]:
        """What a checkpoint says of itself, and why it is not taken; every process hashes some of the files."""
        if not (here / COMPLETE).exists():
            return {}, _UNFINISHED  # a kill came before
        try:
            about = read_json(here / COMPLETE)
            if about.pop("own_sha256", None) != _own_hash(about):
                return about, f"{COMPLETE} differs from what was written"
            if about["identity"] != self.identity:
                return about, _OTHER
            for name in sorted(about["files"])[self.world.rank :: self.world.size]:
                if not (here / name).is_file() or sha256(here / name) != about["files"][name]:
                    return about, f"{name} differs from what was written"
        except (GraceError, KeyError, TypeError, AttributeError) as error:
            return {}, str(error)
        return about, None

    def _read(self, here: Path, parts: Mapping[str, Part]) -> None:
        self._join()
        kept = {name: self._copied(name, part.local) for name, part in parts.items()}
        with _quiet():
            dcp.load({name: self._whole(kept[name], part.rows) for name, part in parts.items()},
                     storage_reader=_Reader(here), **self._among())  # fmt: skip
        for name, part in parts.items():
            part.local.copy_(kept[name])


_OTHER, _UNFINISHED = "of another run", "not complete"


def _own_hash(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


class _Reader(dcp.FileSystemReader):
    """Reads without running code: a checkpoint's list of tensors is a pickle, of which only what it needs is taken."""

    def read_metadata(self, *arguments: Any, **keywords: Any) -> Any:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Plain(file).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        plain = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        plain = plain and name.lstrip("_")[:1].isupper()
        if plain or (module, name) in _PLAIN or (module == "torch" and isinstance(getattr(torch, name), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


_PLAIN = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("pathlib", "PosixPath"),
}  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of single processes, which is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _named(here: Path) -> Iterator[None]:
    """Say which checkpoint could not be written, and what to do; what there is of it is removed."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        inside = [failure for failure, *_ in getattr(error, "failures", {}).values()]
        reason = next(filter(None, map(write_failure, [error, *inside])), None)
        shutil.rmtree(here, ignore_errors=True)
        if reason is None or isinstance(error, GraceError):
            raise
        raise GraceError(f"{here}: could not be written ({reason}); free space and run again") from error


def steps(folder: Path) -> list[Path]:
    """The folders of checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


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
