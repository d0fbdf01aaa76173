"""What each kind of job asks of the machine or the cluster. No torch, as in `grace.config.sections`."""

from typing import Literal

from pydantic import Field

from grace.config.sections import PositiveInt, Section

Job = Literal[
    "fetch", "prepare", "train_teacher", "cache", "train_baseline", "finetune", "distil", "quantize", "pack",
    "evaluate", "bench", "report",
]  # fmt: skip
"""Kinds of jobs that `resources` can speak of."""

TRAININGS = ("train_teacher", "train_baseline", "finetune", "distil")  # kinds of job that several machines can share

SLURM_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.,:@+-]*$"
"""Snakemake's Slurm plugin puts these into a shell's command line."""


class Resources(Section):
    """What one job asks of the machine or the cluster."""

    cpus: PositiveInt = Field(default=1, description="processor cores, and threads of its arithmetic")
    mem_mb: PositiveInt = Field(default=3000, description="memory in MB")
    gpus: int = Field(default=0, ge=0, description="GPUs of each machine")
    nodes: PositiveInt = Field(default=1, description="machines that share one training, on a cluster")
    runtime: PositiveInt = Field(default=60, description="longest run in minutes, on a cluster")
    partition: str | None = Field(
        default=None, pattern=SLURM_NAME, description="Slurm partition; null: the profile's or the cluster's default"
    )
    account: str | None = Field(
        default=None, pattern=SLURM_NAME, description="Slurm account; null: the profile's or the cluster's default"
    )
