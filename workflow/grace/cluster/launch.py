"""One training on several processes: torchrun on this machine, or on every machine of a Slurm job."""

import os
import shlex
import shutil
import socket
import sys

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


def become(nodes: int, processes: int, words: list[str]) -> None:
    """Replace this process by `grace {words}` on all of them."""
    command = [*launcher(nodes, processes), "-m", "--", "grace.cli", *words]
    print(shlex.join(command), file=sys.stderr, flush=True)
    # a step's own list of machines would hide the job's others from srun
    inherited = {name: value for name, value in os.environ.items() if name == _JOB or not name.startswith("SLURM_")}
    os.execvpe(command[0], command, inherited if nodes > 1 else os.environ)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
