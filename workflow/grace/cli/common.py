"""What several subcommands have: the same flags, processes to share the work, and outputs that they alone write."""

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Option(help="frozen parameters of this job (JSON)")]
Data = Annotated[Path, typer.Option(help="the experiment's data folder")]
Out = Annotated[Path, typer.Option(help="what to make")]
Processes = Annotated[int, typer.Option(help="share the work between so many, one GPU each; 0 and 1: alone")]


def group(text: str) -> typer.Typer:
    """Subcommands below one word, such as `grace cache`."""
    return typer.Typer(help=text, no_args_is_help=True)


def start(processes: int, nodes: int = 1, note: Path | None = None) -> None:
    """Become so many processes on each machine, one GPU each; nothing where it is one, or one of them already.

    Where a process leaves a new `note`, all of them are started again.
    """
    from grace.cluster.launch import become
    from grace.world import launched

    if (processes > 1 or nodes > 1) and not launched():
        become(nodes, processes, sys.argv[1:], note)


def job(
    *outputs: Path | None,
    files: tuple[Path | None, ...] = (),
    folders: tuple[Path | None, ...] = (),
    subcommand: str,
    wait_s: float | None = None,
) -> AbstractContextManager[None]:
    """Write these outputs alone and from unchanged inputs (`grace.cluster.job`); the first process does it for all."""
    from grace.cluster.job import job
    from grace.world import this_world

    if not this_world().first:
        return nullcontext()
    return job(*outputs, files=files, folders=folders, subcommand=subcommand, wait_s=wait_s)
