"""`grace plan`: which jobs a run would start, and at most how many hours of cores and GPUs they would take."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from grace.cluster.kinds import kinds
from grace.cluster.slurm import check_slurm
from grace.config.load import load_experiment
from grace.config.resources import Job, Resources
from grace.errors import GraceError


@dataclass(frozen=True)
class Request:
    """Jobs of one kind: how many are left to run, and what each asks for."""

    kind: str
    jobs: int
    asked: Resources

    @property
    def core_hours(self) -> float:
        """If every job takes all of its time."""
        return self.jobs * self.asked.nodes * self.asked.cpus * self.asked.runtime / 60

    @property
    def gpu_hours(self) -> float:
        """If every job takes all of its time."""
        return self.jobs * self.asked.nodes * self.asked.gpus * self.asked.runtime / 60


def plan(
    configfile: Path = Path("config.yaml"),
    price: float | None = None,
    slurm: bool = False,
    snakefile: Path | None = None,
) -> list[Request]:
    """Print what `snakemake --configfile {configfile}` has left to do and the most that it can cost; return it.

    Args:
        configfile: the experiment.
        price: of one GPU hour, in any currency.
        slurm: also ask the cluster of this machine whether it would take each kind of job.
        snakefile: another than the working directory's.

    Raises:
        GraceError: a wrong configuration, Snakemake's own refusal, or what Slurm would refuse.
    """
    resources = load_experiment(configfile).resources
    kind_of = kinds((snakefile or Path("Snakefile")).parent / "rules")
    counts: dict[str, int] = {}
    for rule, jobs in left_to_do(configfile, snakefile).items():
        if kind := kind_of.get(rule):
            counts[kind] = counts.get(kind, 0) + jobs
    requests = [
        Request(kind, counts[kind], resources.get(kind, Resources())) for kind in get_args(Job) if kind in counts
    ]
    _show(requests, configfile, price)
    if slurm:
        check_slurm({request.kind: request.asked for request in requests})
        print("Slurm would take every kind of job.")
    return requests


def left_to_do(configfile: Path, snakefile: Path | None = None) -> dict[str, int]:
    """How many jobs of each rule a dry run of Snakemake lists."""
    command = [str(Path(sys.executable).with_name("snakemake")), "--dry-run", "--quiet", "host", "reason"]
    command += ["--configfile", str(configfile), *(["--snakefile", str(snakefile)] if snakefile else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        raise GraceError(f"{configfile}: Snakemake makes no plan of it:\n{said.strip()[-2000:]}")
    return {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", said, re.MULTILINE)}


def _show(requests: list[Request], configfile: Path, price: float | None) -> None:
    if not requests:
        print(f"{configfile}: nothing to be done")
        return
    table = Table(box=SIMPLE)
    table.add_column("job", no_wrap=True)
    for head in ("jobs", "cores", "memory", "GPUs", "longest run", "core hours", "GPU hours"):
        table.add_column(head, justify="right")
    for request in requests:
        asked = request.asked
        table.add_row(
            request.kind, str(request.jobs), str(asked.cpus), f"{asked.mem_mb / 1000:g} GB", str(asked.gpus or ""),
            f"{asked.runtime} min", f"{request.core_hours:,.1f}", f"{request.gpu_hours:,.1f}" if asked.gpus else "",
        )  # fmt: skip
    jobs, cores = sum(r.jobs for r in requests), sum(r.core_hours for r in requests)
    gpus = sum(r.gpu_hours for r in requests)
    table.add_section()
    table.add_row("all", str(jobs), "", "", "", "", f"{cores:,.1f}", f"{gpus:,.1f}" if gpus else "")
    Console().print(table)
    cost = f", {gpus * price:,.2f} at {price:g} per GPU hour" if price is not None else ""
    print(f"At most {gpus:,.1f} GPU hours{cost}: as if every job took all of the time that it asks for, once.")
