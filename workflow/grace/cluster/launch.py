"""One training on several processes: torchrun on this machine, or on every machine of a Slurm job."""

import os
import shlex
import shutil
import socket
import sys

from grace.errors import GraceError


def launched() -> bool:
    """Whether torchrun started this process."""
    return "WORLD_SIZE" in os.environ


def launcher(nodes: int, processes: int) -> list[str]:
    """The command that starts `processes` (at least one) on each of `nodes` machines; what to run follows it.

    On one machine torchrun alone; on several one torchrun per machine through `srun`, which meet at a free port of this
    one, the first of the job. `--overlap` lets them use what the job's own step, in which this runs, already holds.

    Raises:
        GraceError: several machines, but not in a Slurm job of as many.
    """
    processes = max(1, processes)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    if nodes == 1:
        return [*torchrun, "--standalone"]
    given = os.environ.get("SLURM_JOB_NUM_NODES")
    if shutil.which("srun") is None or given is None:
        raise GraceError(
            f"--nodes {nodes}: several machines need a Slurm job; submit with `--workflow-profile "
            "workflow/profiles/slurm`, or set `nodes: 1` for this kind of job under `resources`"
        )
    if int(given) < nodes:
        raise GraceError(f"--nodes {nodes}: this Slurm job has {given}; ask for as many with `sbatch --nodes {nodes}`")
    srun = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        srun.append(f"--cpus-per-task={cpus}")
    meeting = f"{socket.gethostname()}:{_free_port()}"
    return [
        *srun, *torchrun, "--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", meeting,
        "--rdzv-id", os.environ["SLURM_JOB_ID"],
    ]  # fmt: skip


def become(nodes: int, processes: int, words: list[str]) -> None:
    """Replace this process by `grace {words}` on all of them."""
    command = [*launcher(nodes, processes), "-m", "--", "grace.cli", *words]
    print(shlex.join(command), file=sys.stderr, flush=True)
    os.execvp(command[0], command)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
