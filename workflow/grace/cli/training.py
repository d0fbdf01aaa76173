"""From data to a trained model: data, models to start from, the teacher's cache, training."""

import os
from pathlib import Path
from typing import Annotated

import typer

from grace.cli.common import Data, Out, Processes, Run, group, job, start
from grace.errors import GraceError

commands = typer.Typer()
cache_commands = group("The teacher's cache: what training reads instead of the teacher.")


@commands.command()
def prepare(
    run: Run,
    out: Out,
    processor: Annotated[
        Path | None, typer.Option(help="model folder whose processor to use (data of your own)")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="model folder of the teacher, to compare with the student (data of your own)")
    ] = None,
    benchmarks: Annotated[Path | None, typer.Option(help="folder of benchmark files (data of your own)")] = None,
    parts: Annotated[
        Path | None, typer.Option(help="folder for finished parts, from which a killed run goes on (data of your own)")
    ] = None,
    workers: Annotated[int, typer.Option(help="processes that read or draw images; no result depends on it")] = 1,
) -> None:
    """Make the training conversations and the benchmarks."""
    from grace.config.job_parameters import DataRun, read_run
    from grace.files import MANIFEST

    parameters = read_run(run, DataRun)
    if parameters.data.source == "demo":
        from grace.demo.prepare import prepare as prepare_demo

        with job(out, files=(run,), subcommand="prepare"):
            prepare_demo(parameters.data, parameters.benchmarks, out, workers)
    else:
        from grace.data.prepare import prepare_files
        from grace.families import check_family
        from grace.models.pair import check_pair

        if processor is None:
            raise GraceError(f"{run}: data of your own needs --processor, the model folder whose processor to use")
        parts = parts or out.with_name(f".{out.name}-parts")
        with job(parts, out, files=(run, processor / MANIFEST), subcommand="prepare"):
            if parameters.family:
                for folder in filter(None, (processor, teacher)):
                    check_family(folder, parameters.family)
            if teacher is not None:
                check_pair(teacher, processor)
            prepare_files(parameters.data, processor, benchmarks, out, parts, workers)


@commands.command()
def tower(
    out: Out,
    steps: Annotated[int, typer.Option(help="optimiser steps; the shipped tower's number by default")] = 0,
    seed: Annotated[int, typer.Option(help="of weights and images")] = 0,
) -> None:
    """Pretrain the demo's vision tower again (it ships with the package; this is how it was made)."""
    from grace.demo.tower import tower as build

    build(out, steps, seed) if steps else build(out, seed=seed)


@commands.command()
def fetch(
    model: Annotated[str, typer.Argument(help="folder or hub id")],
    out: Out,
    revision: Annotated[str | None, typer.Option(help="hub revision")] = None,
    source: Annotated[Path | None, typer.Option(help="frozen: what a local folder held when the run began")] = None,
) -> None:
    """Bring a pretrained model, from a folder or the hub, into the experiment."""
    from grace.files import read_json
    from grace.models.fetch import fetch as bring

    expected = read_json(source).get("files") if source else None
    with job(out, files=(source,), subcommand="fetch"):
        bring(model, out, revision, expected)


@commands.command()
def train(
    run: Run,
    data: Data,
    out: Out,
    log: Annotated[Path, typer.Option(help="training curves, JSON lines")],
    checkpoints: Annotated[Path, typer.Option(help="folder for resumable checkpoints")],
    init: Annotated[Path | None, typer.Option(help="model folder to start from")] = None,
    cache: Annotated[Path | None, typer.Option(help="the teacher's cache")] = None,
    teacher: Annotated[Path | None, typer.Option(help="its model folder, to refuse a cache of another")] = None,
    processes: Processes = 1,
    nodes: Annotated[int, typer.Option(help="on each of so many machines of this Slurm job")] = 1,
) -> None:
    """Train a teacher, a baseline or a student."""
    from grace.world import SMALLER

    start(processes, nodes, checkpoints / SMALLER)
    # Gradients of two precisions come and go in every step; fixed segments would leave holes between them.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed one
    from grace.files import MANIFEST
    from grace.train.commands import train as run_training

    pins = tuple(folder / MANIFEST if folder else None for folder in (cache, teacher))  # the cache checks its own parts
    with job(checkpoints, out, log, files=(run, *pins), folders=(data, init), subcommand="train"):
        run_training(run, data, out, log, checkpoints, init, cache, teacher)


@cache_commands.command("write")
def cache_write(
    run: Run,
    teacher: Annotated[Path, typer.Option(help="the teacher's model folder")],
    data: Data,
    out: Out,
    shard: Annotated[int, typer.Option(help="which part to write, from 0")],
) -> None:
    """Run the teacher over one part of the conversations and keep what training needs."""
    from grace.teacher.commands import write

    with job(out / f"shard-{shard:05d}", files=(run,), folders=(teacher, data), subcommand="cache-write"):
        write(run, teacher, data, out, shard)


@cache_commands.command("finish")
def cache_finish(
    run: Run, teacher: Annotated[Path, typer.Option(help="the teacher's model folder")], data: Data, out: Out
) -> None:
    """Check that every part is there, audit the cache's error, and write its manifest."""
    from grace.teacher.commands import finish

    with job(out, files=(run,), folders=(teacher, data), subcommand="cache-finish"):
        finish(run, teacher, data, out)


@cache_commands.command("info")
def cache_info(cache: Annotated[Path, typer.Argument(help="a cache folder")]) -> None:
    """Say what a cache holds and what it costs."""
    from grace.teacher.commands import info

    info(cache)


@cache_commands.command("verify")
def cache_verify(cache: Annotated[Path, typer.Argument(help="a cache folder")]) -> None:
    """Re-hash every part of a cache and name the bad ones."""
    from grace.teacher.commands import verify

    verify(cache)
