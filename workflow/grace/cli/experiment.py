"""An experiment before it runs: its configuration, its jobs, what they need."""

from pathlib import Path
from typing import Annotated

import typer

from grace.cli.common import group
from grace.errors import GraceError

commands = typer.Typer()
config_commands = group("The experiment's configuration.")


@commands.command()
def plan(
    configfile: Annotated[Path, typer.Option(help="the experiment")] = Path("config.yaml"),
    price: Annotated[float | None, typer.Option(help="of one GPU hour, in any currency")] = None,
    slurm: Annotated[bool, typer.Option(help="also ask this machine's cluster whether it would take the jobs")] = False,
) -> None:
    """Say which jobs a run would start and the most that they can cost."""
    from grace.cluster.estimate import plan as estimate

    estimate(configfile, price, slurm)


@commands.command()
def size(
    configfile: Annotated[Path, typer.Argument(help="the experiment")] = Path("config.yaml"),
    gpu: Annotated[str, typer.Option(help="kind of GPU: H200, H100, A100, L40S or B200")] = "H200",
    disk: Annotated[float, typer.Option(min=0.001, help="GB/s that the disk takes")] = 1.0,
) -> None:
    """Say what trainings and the teacher's cache need (GPU memory, tokens, FLOPs, hours, bytes) and what runs took."""
    from grace.cluster.size import size as estimate

    estimate(configfile, gpu, disk)


@config_commands.command("schema")
def config_schema() -> None:
    """Print the JSON schema of the configuration."""
    from grace.config.generate import schema

    print(schema(), end="")


@config_commands.command("default")
def config_default(file: Annotated[Path, typer.Argument(help="the experiment")] = Path("config.yaml")) -> None:
    """Print a configuration file with every key, its value and its explanation."""
    from grace.config.generate import explain_file

    print(explain_file(file), end="")


@commands.command()
def check(files: Annotated[list[Path], typer.Argument(help="config file, and files that change keys of it")]) -> None:
    """Say what a configuration would run, and everything that it names and that is not in place."""
    from grace.config.load import load_files
    from grace.config.plan import Plan
    from grace.config.preflight import missing
    from grace.config.unapplied_trials import unapplied

    experiment = load_files(files)
    print(f"{files[0]}: experiment {experiment.experiment}, {len(experiment.students())} students")
    for sentence in unapplied(experiment):
        print(f"note: {sentence}")
    lacking = missing(experiment, Path(Plan(experiment).folder))
    if lacking:
        raise GraceError("\n".join(problem.sentence for problem in lacking))
    print("everything that it names is in place")
