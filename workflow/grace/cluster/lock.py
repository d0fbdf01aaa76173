"""One writer per output, also where an engine was killed and started the same job again.

Snakemake killed by SIGKILL leaves its cluster's jobs running; after `--unlock` the next run submits them once more, and
two processes write one output. Finished outputs are safe without a lock, for they are renamed into place; checkpoints
and predictions, which grow in place, are not. The lock is the operating system's (flock), so that it ends with its
holder, however that ends; network file systems of several machines need NFS 4 or Lustre mounted with `flock`.
"""

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from grace.errors import GraceError

SECONDS_BETWEEN_LINES = 300.0


def lock_path(target: str | Path) -> Path:
    """Where the lock of an output lies: hidden, beside it."""
    target = Path(target)
    return target.with_name(f".{target.name}.lock")


@contextmanager
def one_writer(target: str | Path, wait_s: float | None = None) -> Iterator[bool]:
    """Hold the right to write `target`, after whoever holds it now; yields whether there was anyone to wait for.

    While it waits, one line every five minutes on standard error says for whom.

    Args:
        target: the file or folder that is about to be written; the lock lies beside it while it is.
        wait_s: seconds to wait; None waits until the job's own time limit.

    Raises:
        GraceError: somebody else still writes `target` after `wait_s`.
    """
    path = lock_path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    waited, left = False, wait_s
    while not lock.is_locked:
        step = SECONDS_BETWEEN_LINES if left is None else min(left, SECONDS_BETWEEN_LINES)
        try:
            lock.acquire(timeout=step if waited else 0)
        except Timeout:
            if waited and left is not None:
                left -= step
            if left is not None and left <= 0:
                raise GraceError(
                    f"{target}: is being written by {_holder(path)}; wait for it, or end that process and run again"
                ) from None
            waited = True
            print(f"{target}: waiting for {_holder(path)}, which writes it", file=sys.stderr, flush=True)
    try:
        path.write_text(json.dumps(_this_process()))
        yield waited
    finally:
        path.unlink(missing_ok=True)  # before the release: a waiter that opened this file sees that it has no name left
        lock.release()


def _this_process() -> dict[str, str | int | None]:
    return {"host": platform.node(), "process": os.getpid(), "slurm job": os.environ.get("SLURM_JOB_ID")}


def _holder(path: Path) -> str:
    """Who holds a lock, in words."""
    try:
        about = json.loads(path.read_text())
        job = f" (Slurm job {about['slurm job']})" if about["slurm job"] else ""
        return f"process {about['process']} on {about['host']}{job}"
    except (OSError, ValueError, KeyError):
        return "another process"
