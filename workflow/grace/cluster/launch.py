"""One training on several processes: torchrun on this machine, or on every machine of a Slurm job."""

import ctypes
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from grace.errors import GraceError

_JOB = "SLURM_JOB_ID"


def launcher(nodes: int, processes: int) -> list[str]:
    """The command that starts `processes` (at least one) on each of `nodes` machines; what to run follows it.

    On one machine torchrun alone; on several one torchrun per machine through `srun`, which meet at a free port of this
    one, the first of the job. `--overlap` lets them use what the job's own step, in which this runs, already holds.

    Raises:
        GraceError: several machines, but not in a Slurm job.
    """
    processes = max(1, processes)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    if nodes == 1:
        return [*torchrun, "--standalone"]
    job = os.environ.get(_JOB)
    if shutil.which("srun") is None or job is None:
        raise GraceError(
            f"--nodes {nodes}: several machines need a Slurm job; submit with `--workflow-profile "
            "workflow/profiles/slurm`, or set `nodes: 1` for this kind of job under `resources`"
        )
    srun = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        srun.append(f"--cpus-per-task={cpus}")
    meeting = f"{socket.gethostname()}:{_free_port()}"
    return [
        *srun, *torchrun, "--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", meeting,
        "--rdzv-id", job,
    ]  # fmt: skip


def become(nodes: int, processes: int, words: list[str], note: Path | None = None) -> None:
    """Replace this process by `grace {words}` on all of them.

    Args:
        note: a file that changes where one of the processes asks for a new start of all; they are then started again.
    """
    command = [*launcher(nodes, processes), "-m", "--", "grace.cli", *words]
    print(shlex.join(command), file=sys.stderr, flush=True)
    # a step's own list of machines would hide the job's others from srun
    inherited = {name: value for name, value in os.environ.items() if name == _JOB or not name.startswith("SLURM_")}
    environment = inherited if nodes > 1 else dict(os.environ)
    if note is None:
        os.execvpe(command[0], command, environment)
    sys.exit(repeated(command, environment, note))


def repeated(command: list[str], environment: dict[str, str], note: Path) -> int:
    """Run a command, and again as often as it fails with `note` changed; its last exit status.

    Signals that ask this process to end are the command's, and it ends with this process however that ends.
    """
    before = _content(note)
    while True:
        child = subprocess.Popen(command, env=environment, preexec_fn=_end_with_parent)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _, child=child: child.send_signal(number))
        code = child.wait()
        after = _content(note)
        if code == 0 or after in (None, before):
            return code if code >= 0 else 128 - code
        before = after
        print("all processes start again", file=sys.stderr, flush=True)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
