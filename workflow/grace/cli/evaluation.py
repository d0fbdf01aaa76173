"""Models at work: benchmarks, overlap with the training data, speed, and answers to a user's own questions."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from grace.cli.common import Data, Out, Processes, Run, group, job, start
from grace.errors import GraceError

commands = typer.Typer()
bench_commands = group("Speed of the INT4 GEMM and of decoding, side by side with bf16.")


@commands.command()
def evaluate(
    run: Run,
    data: Data,
    model: Annotated[list[Path], typer.Option(help="model folder, plain or packed; repeat for several")],
    out: Annotated[list[Path], typer.Option(help="where its predictions go; once for each --model, in order")],
    others: Annotated[
        Path | None, typer.Option(help="results folder whose waiting models are asked too, while that is quick")
    ] = None,
    processes: Processes = 1,
) -> None:
    """Ask models every question of every benchmark and keep each prediction."""
    if len(model) != len(out):
        raise GraceError(
            f"--model is given {len(model)} times and --out {len(out)} times; give one --out for each --model"
        )
    start(processes)
    from grace.cluster.ahead import while_quick
    from grace.config.job_parameters import EvaluateRun, read_run
    from grace.evaluate.pending_models import pending
    from grace.evaluate.summed_up import take_over
    from grace.world import this_world

    alone = this_world().size == 1

    def ask(one: Path, predictions: Path, manifest: bool = True) -> None:
        from grace.evaluate import commands  # pandas and more, which a job that takes answers over does without

        commands.evaluate(run, one, data, predictions, manifest)

    failed, since = [], time.monotonic()
    for one, predictions in zip(model, out, strict=True):
        try:
            with job(predictions, files=(run,), folders=(one, data), subcommand="evaluate"):
                if not (alone and take_over(run, one, data, predictions)):
                    ask(one, predictions)
        except GraceError as error:
            failed.append(str(error))
    if failed:
        raise GraceError("; ".join(failed))

    def ask_too(one: Path, predictions: Path) -> None:
        with job(predictions, files=(run,), folders=(one, data), subcommand="evaluate", wait_s=0):
            ask(one, predictions, manifest=False)

    own_engine = read_run(run, EvaluateRun).evaluation.engine == "grace"  # vLLM starts for each anew
    if others is not None and own_engine and alone:
        while_quick(pending(others), since, ask_too)


@commands.command()
def tune(
    run: Run,
    trials: Annotated[Path, typer.Option(help="folder with a folder for each recipe, trial and seed")],
    out: Out,
) -> None:
    """Compare the trials of recipes' constants on the development split, and choose the best of each recipe."""
    from grace.files import MANIFEST
    from grace.results.tuning import tune as choose

    with job(out, files=(run, *trials.glob(f"*/*/*/predictions/{MANIFEST}")), subcommand="tune"):
        choose(run, trials, out)


@commands.command()
def overlap(
    data: Data,
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    benchmark: Annotated[list[str] | None, typer.Option(help="benchmark of the registry; repeat for several")] = None,
    run: Annotated[
        Path | None, typer.Option(help="frozen parameters of the evaluation, for its benchmarks and protocols")
    ] = None,
    predictions: Annotated[
        list[Path] | None, typer.Option(help="predictions folder to score without them; repeat")
    ] = None,
    workers: Annotated[int, typer.Option(help="processes that open the training images")] = 1,
) -> None:
    """Count benchmarks' questions whose images are in the training data: the same bytes, or nearly the same look."""
    from grace.benchmarks.protocols import protocols_of
    from grace.config.job_parameters import EvaluateRun, read_run
    from grace.evaluate.overlap import write_overlap

    if (run is None) == (not benchmark):
        raise GraceError("grace overlap: give either --benchmark, once or more, or --run")
    asked, limit = {name: protocols_of(name)[0] for name in benchmark or ()}, None
    if run is not None:
        settings = read_run(run, EvaluateRun).evaluation
        asked, limit = {name: settings.protocols(name)[0] for name in settings.benchmarks}, settings.limit
    with job(out, files=(run,), folders=(data,), subcommand="overlap"):
        found = write_overlap(data, out, asked, predictions or [], limit, workers)
    for name, entry in found.items():
        typer.echo(
            f"{name}: {entry['exact_count']} exact, {entry['near_count']} near of {entry['questions']} questions"
        )


@bench_commands.command("kernel")
def bench_kernel(
    run: Run, model: Annotated[Path, typer.Option(help="packed folder whose shapes to time")], out: Out
) -> None:
    """Time the INT4 GEMM against the dense one, after checking that it is right."""
    from grace.bench.commands import kernel

    with job(out, files=(run,), folders=(model,), subcommand="bench-kernel"):
        kernel(run, model, out)


@bench_commands.command("decode")
def bench_decode(
    run: Run, model: Annotated[list[Path], typer.Option(help="model folder; repeat the flag to compare")], out: Out
) -> None:
    """Time prefill and decoding of several models in one run."""
    from grace.bench.commands import decode

    with job(out, files=(run,), folders=tuple(model), subcommand="bench-decode"):
        decode(run, model, out)


@bench_commands.command("tune")
def bench_tune(
    shapes: Annotated[str, typer.Option(help="weights, out x in, comma-separated: 4096x4096,22016x4096")],
    out: Annotated[Path, typer.Option(help="the table to extend; starts from the shipped one")],
    rows: Annotated[str, typer.Option(help="M, comma-separated powers of two")] = "1,2,4,8,16,32,64,128,256",
    group: Annotated[int, typer.Option(help="weights that share a scale")] = 128,
    dtype: Annotated[str, typer.Option(help="of the activations: bfloat16 or float16")] = "bfloat16",
    workers: Annotated[int, typer.Option(help="processes that compile; 0: one per core")] = 0,
) -> None:
    """Measure tiles of the INT4 GEMM on this machine's GPU and add the best to the table."""
    if dtype not in ("bfloat16", "float16"):
        raise GraceError(f"--dtype {dtype}: give bfloat16 or float16")
    try:
        sizes = [(int(height), int(width)) for height, width in (text.split("x") for text in shapes.split(","))]
        numbers = [int(text) for text in rows.split(",")]
    except ValueError:
        raise GraceError(f"--shapes {shapes} --rows {rows}: give them like 4096x4096,22016x4096 and 1,2,4") from None
    from grace.bench.tune import tune

    tune(sizes, numbers, out, group, dtype, workers or os.cpu_count() or 1)


@commands.command()
def chat(
    image: Annotated[str, typer.Argument(help="an image file")],
    question: Annotated[str | None, typer.Argument(help="without one, questions are read until an empty line")] = None,
    *,
    model: Annotated[Path, typer.Option(help="packed folder or plain checkpoint")],
    more: Annotated[list[str] | None, typer.Option("--image", help="a further image; repeat for several")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU where there is one by default")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 128,
    json: Annotated[bool, typer.Option("--json", help="one JSON object per answer")] = False,
) -> None:
    """Ask a model about an image; the answer streams."""
    from grace.infer.chat import chat as answer

    answer(model, [image, *(more or [])], question, device, new_tokens, json)
