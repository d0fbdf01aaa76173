"""The command line: one subcommand per step of the pipeline. Each imports what it needs only when it runs."""

import errno
import gc
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from grace.arithmetic import settle
from grace.errors import GraceError

app = typer.Typer(
    help="GRACE: distil a vision-language model into INT4, measure it, and rebuild the paper's tables.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _group(name: str, text: str) -> typer.Typer:
    group = typer.Typer(help=text, no_args_is_help=True)
    app.add_typer(group, name=name)
    return group


records_commands = _group("records", "Snakemake's records of how each output was made, kept beside the results.")
cache_commands = _group("cache", "The teacher's cache: what training reads instead of the teacher.")
bench_commands = _group("bench", "Speed of the INT4 product and of decoding, side by side with bf16.")
report_commands = _group("report", "Tables, figures, metrics and the page.")
config_commands = _group("config", "The experiment's configuration.")


def _start(processes: int, nodes: int = 1, note: Path | None = None) -> None:
    """Become so many processes on each machine, one GPU each; nothing where it is one, or one of them already.

    Where a process leaves a new `note`, all of them are started again.
    """
    from grace.cluster.launch import become
    from grace.world import launched

    if (processes > 1 or nodes > 1) and not launched():
        become(nodes, processes, sys.argv[1:], note)


def _job(
    *outputs: Path | None,
    files: tuple[Path | None, ...] = (),
    folders: tuple[Path | None, ...] = (),
    subcommand: str,
    wait_s: float | None = None,
) -> AbstractContextManager[None]:
    """Write these outputs alone and from unchanged inputs (see `grace.cluster.job`); the first process does it for all."""
    from grace.cluster.job import job
    from grace.world import this_world

    if not this_world().first:
        return nullcontext()
    return job(*outputs, files=files, folders=folders, subcommand=subcommand, wait_s=wait_s)


def _read_by_reports(results: Path) -> tuple[Path, ...]:
    """What stands for everything that tables, figures and the page are made of."""
    folders = [path for part in ("data", "teacher", "students") for path in (results / part).rglob("manifest.json")]
    return (
        results / "config/experiment.json", results / "overlap.json", *folders, *(results / "bench").glob("*.*"),
    )  # fmt: skip


Run = Annotated[Path, typer.Option(help="frozen parameters of this job (JSON)")]
Data = Annotated[Path, typer.Option(help="the experiment's data folder")]
Out = Annotated[Path, typer.Option(help="what to make")]
Results = Annotated[Path, typer.Option(help="the experiment's results folder")]
Processes = Annotated[int, typer.Option(help="share the work between so many, one GPU each; 0 and 1: alone")]


@app.command()
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
    workers: Annotated[int, typer.Option(help="processes that read images (data of your own)")] = 1,
) -> None:
    """Make the training conversations and the benchmarks."""
    from grace.config.runs import DataRun, read_run
    from grace.files import MANIFEST

    parameters = read_run(run, DataRun)
    if parameters.data.source == "demo":
        from grace.demo.prepare import prepare as prepare_demo

        with _job(out, files=(run,), subcommand="prepare"):
            prepare_demo(parameters.data, parameters.benchmarks, out)
    else:
        from grace.data.prepare import prepare_files
        from grace.models.families import check_family
        from grace.models.pair import check_pair

        if processor is None:
            raise GraceError(f"{run}: data of your own needs --processor, the model folder whose processor to use")
        parts = parts or out.with_name(f".{out.name}-parts")
        with _job(parts, out, files=(run, processor / MANIFEST), subcommand="prepare"):
            if parameters.family:
                for folder in filter(None, (processor, teacher)):
                    check_family(folder, parameters.family)
            if teacher is not None:
                check_pair(teacher, processor)
            prepare_files(parameters.data, processor, benchmarks, out, parts, workers)


@app.command()
def tower(
    out: Out,
    steps: Annotated[int, typer.Option(help="optimiser steps; the shipped tower's number by default")] = 0,
    seed: int = 0,
) -> None:
    """Pretrain the demo's vision tower again (it ships with the package; this is how it was made)."""
    from grace.demo.tower import tower as build

    build(out, steps, seed) if steps else build(out, seed=seed)


@app.command()
def fetch(
    model: str,
    out: Out,
    revision: Annotated[str | None, typer.Option(help="hub revision")] = None,
    source: Annotated[Path | None, typer.Option(help="frozen: what a local folder held when the run began")] = None,
) -> None:
    """Bring a pretrained model, from a folder or the hub, into the experiment."""
    from grace.files import read_json
    from grace.models.fetch import fetch as bring

    expected = read_json(source).get("files") if source else None
    with _job(out, files=(source,), subcommand="fetch"):
        bring(model, out, revision, expected)


@app.command()
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

    _start(processes, nodes, checkpoints / SMALLER)
    # Gradients of two precisions come and go in every step; fixed segments would leave holes between them.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed one
    from grace.files import MANIFEST
    from grace.train.commands import train as run_training

    pins = tuple(folder / MANIFEST if folder else None for folder in (cache, teacher))  # the cache checks its own parts
    with _job(checkpoints, out, log, files=(run, *pins), folders=(data, init), subcommand="train"):
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

    with _job(out / f"shard-{shard:05d}", files=(run,), folders=(teacher, data), subcommand="cache-write"):
        write(run, teacher, data, out, shard)


@cache_commands.command("finish")
def cache_finish(
    run: Run, teacher: Annotated[Path, typer.Option(help="the teacher's model folder")], data: Data, out: Out
) -> None:
    """Check that every part is there, audit the cache's error, and write its manifest."""
    from grace.teacher.commands import finish

    with _job(out, files=(run,), folders=(teacher, data), subcommand="cache-finish"):
        finish(run, teacher, data, out)


@cache_commands.command("info")
def cache_info(cache: Path) -> None:
    """Say what a cache holds and what it costs."""
    from grace.teacher.commands import info

    info(cache)


@cache_commands.command("verify")
def cache_verify(cache: Path) -> None:
    """Re-hash every part of a cache and name the bad ones."""
    from grace.teacher.commands import verify

    verify(cache)


@app.command()
def quantize(run: Run, init: Annotated[Path, typer.Option(help="model folder to round")], data: Data, out: Out) -> None:
    """Round a model without training it: RTN, AWQ or GPTQ."""
    from grace.quant.commands import quantize as round_model

    with _job(out, files=(run,), folders=(init, data), subcommand="quantize"):
        round_model(run, init, data, out)


@app.command()
def pack(model: Annotated[Path, typer.Option(help="quantised model folder")], out: Out) -> None:
    """Pack a quantised model so that transformers and vLLM load it with no code of ours."""
    from grace.quant.pack import pack as pack_model

    with _job(out, folders=(model,), subcommand="pack"):
        pack_model(model, out)


@app.command("import")
def import_(
    released: Annotated[Path, typer.Option(help="folder of a released GRACE checkpoint, with its codes")], out: Out
) -> None:
    """Pack a checkpoint that the authors of GRACE released, code by code."""
    from grace.quant.import_release import import_release

    with _job(out, folders=(released,), subcommand="import"):
        import_release(released, out)


@app.command()
def export(
    packed: Annotated[Path, typer.Option(help="packed folder")],
    format: Annotated[str, typer.Option(help="awq, gptq or gguf")],
    out: Out,
) -> None:
    """Write a packed model's codes in another format, bit for bit."""
    from grace.quant.export import export as convert

    with _job(out, folders=(packed,), subcommand="export"):
        convert(packed, format, out)


@app.command()
def card(
    model: Annotated[Path, typer.Argument(help="packed folder or an export")],
    out: Annotated[Path, typer.Option(help="the README.md to write")],
    license: Annotated[str | None, typer.Option(help="a hub's identifier, such as apache-2.0")] = None,
    base_model: Annotated[str | None, typer.Option(help="hub id of the model that was quantised")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="hub id of training data; repeat for several")] = None,
    metrics: Annotated[Path | None, typer.Option(help="an experiment's metrics.json")] = None,
    row: Annotated[str, typer.Option(help="whose scores to show")] = "grace.int4",
) -> None:
    """Write a model card with what its folder does not know: licence, base model, data and scores."""
    from grace.files import read_json
    from grace.quant.card import Origin, scores_of, write_card

    scores = scores_of(read_json(metrics), row) if metrics else {}
    write_card(model, Origin(license, base_model, tuple(dataset or ()), scores), out)


@app.command()
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
    _start(processes)
    from grace.config.runs import EvaluateRun, read_run
    from grace.evaluate.commands import evaluate as ask
    from grace.evaluate.waiting import ask_waiting
    from grace.world import this_world

    failed, since = [], time.monotonic()
    for one, predictions in zip(model, out, strict=True):
        try:
            with _job(predictions, files=(run,), folders=(one, data), subcommand="evaluate"):
                ask(run, one, data, predictions)
        except GraceError as error:
            failed.append(str(error))
    if failed:
        raise GraceError("; ".join(failed))

    def ask_too(one: Path, predictions: Path) -> None:
        with _job(predictions, files=(run,), folders=(one, data), subcommand="evaluate", wait_s=0):
            ask(run, one, data, predictions, manifest=False)

    own_engine = read_run(run, EvaluateRun).evaluation.engine == "grace"  # vLLM starts for each anew
    if others is not None and own_engine and this_world().size == 1:
        ask_waiting(others, since, ask_too)


@app.command()
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
    """Count the benchmarks' questions whose images are in the training data: the same bytes, or nearly the same look."""
    from grace.benchmarks.protocols import protocols_of
    from grace.config.runs import EvaluateRun, read_run
    from grace.evaluate.overlap import write_overlap

    if (run is None) == (not benchmark):
        raise GraceError("grace overlap: give either --benchmark, once or more, or --run")
    asked, limit = {name: protocols_of(name)[0] for name in benchmark or ()}, None
    if run is not None:
        settings = read_run(run, EvaluateRun).evaluation
        asked, limit = {name: settings.protocols(name)[0] for name in settings.benchmarks}, settings.limit
    with _job(out, files=(run,), folders=(data,), subcommand="overlap"):
        found = write_overlap(data, out, asked, predictions or [], limit, workers)
    for name, entry in found.items():
        typer.echo(
            f"{name}: {entry['exact_count']} exact, {entry['near_count']} near of {entry['questions']} questions"
        )


@bench_commands.command("kernel")
def bench_kernel(
    run: Run, model: Annotated[Path, typer.Option(help="packed folder whose shapes to time")], out: Out
) -> None:
    """Time the INT4 product against the dense one, after checking that it is right."""
    from grace.bench.commands import kernel

    with _job(out, files=(run,), folders=(model,), subcommand="bench-kernel"):
        kernel(run, model, out)


@bench_commands.command("decode")
def bench_decode(
    run: Run, model: Annotated[list[Path], typer.Option(help="model folder; repeat the flag to compare")], out: Out
) -> None:
    """Time prefill and decoding of several models in one run."""
    from grace.bench.commands import decode

    with _job(out, files=(run,), folders=tuple(model), subcommand="bench-decode"):
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
    """Measure tiles of the INT4 product on this machine's GPU and add the best to the table."""
    if dtype not in ("bfloat16", "float16"):
        raise GraceError(f"--dtype {dtype}: give bfloat16 or float16")
    try:
        sizes = [(int(height), int(width)) for height, width in (text.split("x") for text in shapes.split(","))]
        numbers = [int(text) for text in rows.split(",")]
    except ValueError:
        raise GraceError(f"--shapes {shapes} --rows {rows}: give them like 4096x4096,22016x4096 and 1,2,4") from None
    from grace.bench.tune import tune

    tune(sizes, numbers, out, group, dtype, workers or os.cpu_count() or 1)


@report_commands.command("tables")
def report_tables(results: Results, out: Out) -> None:
    """Write the tables as Markdown, CSV and LaTeX, with the paper's values beside."""
    from grace.report.commands import tables

    with _job(out, files=_read_by_reports(results), subcommand="report-tables"):
        tables(results, out)


@report_commands.command("figures")
def report_figures(results: Results, out: Out) -> None:
    """Draw the figures as SVG and PNG."""
    from grace.report.commands import figures

    with _job(out, files=_read_by_reports(results), subcommand="report-figures"):
        figures(results, out)


@report_commands.command("metrics")
def report_metrics(results: Results, out: Out) -> None:
    """Write the numbers that versions are compared by."""
    from grace.report.commands import metrics

    with _job(out, files=_read_by_reports(results), subcommand="report-metrics"):
        metrics(results, out)


@report_commands.command("page")
def report_page(results: Results, out: Out) -> None:
    """Build the self-contained HTML page."""
    from grace.report.commands import page

    with _job(out, files=_read_by_reports(results), subcommand="report-page"):
        page(results, out)


@app.command()
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


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="the older version: a git revision or a results folder")],
    b: Annotated[str, typer.Argument(help="the newer version")],
    experiment: Annotated[str, typer.Option(help="which folder of results/ to take from a revision")] = "demo",
    repository: Annotated[Path, typer.Option(help="the repository that the revisions are of")] = Path("."),
    markdown: Annotated[Path | None, typer.Option(help="write it for a pull request")] = None,
    page: Annotated[Path | None, typer.Option(help="write it for a browser")] = None,
    fail_on_regression: Annotated[bool, typer.Option(help="exit 1 when a drop is significant")] = False,
    json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Say what changed between two versions of the results, with a paired test for every change."""
    from grace.diff.compare import diff as compare

    compare(a, b, experiment, repository, markdown, page, fail_on_regression, json)


@app.command()
def merge(
    branch: Annotated[str, typer.Argument(help="the branch to merge into the one that is checked out")],
    repository: Annotated[Path, typer.Option(help="where Snakemake runs")] = Path("."),
) -> None:
    """Merge a branch that built results too, so that nothing is built twice; `dvc repro` and a commit follow."""
    from grace.provenance.merge import merge as unite

    for experiment, taken in unite(branch, repository).items():
        print(f"{experiment}: {len(taken)} outputs taken from {branch}")
    print("now `dvc repro`, `git add -A` and `git commit`")


@app.command()
def provenance(
    path: Annotated[Path, typer.Argument(help="an output file or folder of results/")],
    cell: Annotated[
        tuple[str, str] | None,
        typer.Option(help="row and column of a table: the predictions, models and parameters behind that number"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON instead of a tree")] = False,
    everything: Annotated[bool, typer.Option("--all", help="do not shorten long lists")] = False,
) -> None:
    """Tell what made an output, or one number of a table, back to the data."""
    if cell is not None:
        from grace.provenance.cell import cell as tell_cell

        tell_cell(path, *cell, json)
        return
    from grace.provenance.tree import provenance as tell

    tell(path, json, everything)


@records_commands.command("save")
def records_save(results: Annotated[Path, typer.Argument(help="a results folder")]) -> None:
    """Copy Snakemake's records into the folder's provenance.jsonl, which travels with git."""
    from grace.provenance.snakemake_records import save

    print(f"{results}: {save(results)} records saved")


@records_commands.command("restore")
def records_restore(results: Annotated[Path, typer.Argument(help="a results folder")]) -> None:
    """Give Snakemake back the records of outputs that are here unchanged; the Snakefile does so by itself."""
    from grace.provenance.snakemake_records import restore

    print(f"{results}: {restore(results)} records restored")


@app.command()
def accept(
    reason: Annotated[str, typer.Option(help="why the change leaves every result as it is; kept in the provenance")],
    subcommand: Annotated[
        list[str] | None, typer.Option(help="accept for these alone, such as `train`; repeat the flag")
    ] = None,
    configfile: Annotated[Path, typer.Option(help="the experiment")] = Path("config.yaml"),
) -> None:
    """Accept a change of code that is known to be harmless, so that it re-runs nothing."""
    from grace.provenance.accept import accept_code

    for change in accept_code(configfile, reason, subcommand):
        print(f"{change['subcommand']}: accepted {', '.join(change['changed'])}")


@app.command()
def verify(results: Annotated[Path, typer.Argument(help="a results folder")]) -> None:
    """Re-hash a results tree and name every file that differs, is missing or is not listed."""
    from grace.provenance.verify import verify as check

    check(results)


@app.command()
def plan(
    configfile: Annotated[Path, typer.Option(help="the experiment")] = Path("config.yaml"),
    price: Annotated[float | None, typer.Option(help="of one GPU hour, in any currency")] = None,
    slurm: Annotated[bool, typer.Option(help="also ask this machine's cluster whether it would take the jobs")] = False,
) -> None:
    """Say which jobs a run would start and the most that they can cost."""
    from grace.cluster.estimate import plan as estimate

    estimate(configfile, price, slurm)


@app.command()
def size(
    configfile: Annotated[Path, typer.Argument(help="the experiment")] = Path("config.yaml"),
    gpu: Annotated[str, typer.Option(help="kind of GPU: H200, H100, A100, L40S or B200")] = "H200",
    disk: Annotated[float, typer.Option(min=0.001, help="GB/s that the disk takes")] = 1.0,
) -> None:
    """Say what trainings and the teacher's cache need: memory of a GPU, tokens, FLOPs, hours, bytes; and what runs took."""
    from grace.cluster.size import size as estimate

    estimate(configfile, gpu, disk)


@config_commands.command("schema")
def config_schema() -> None:
    """Print the JSON schema of the configuration."""
    from grace.config.generate import schema

    print(schema(), end="")


@config_commands.command("default")
def config_default(file: Annotated[Path, typer.Argument()] = Path("config.yaml")) -> None:
    """Print a configuration file with every key, its value and its explanation."""
    from grace.config.generate import explain_file

    print(explain_file(file), end="")


@app.command()
def check(files: Annotated[list[Path], typer.Argument(help="config file, and files that change keys of it")]) -> None:
    """Say what a configuration would run, and everything that it names and that is not in place."""
    from grace.config.load import load_files
    from grace.config.plan import Plan
    from grace.config.preflight import missing

    experiment = load_files(files)
    print(f"{files[0]}: experiment {experiment.experiment}, {len(experiment.students())} students")
    lacking = missing(experiment, Path(Plan(experiment).folder))
    if lacking:
        raise GraceError("\n".join(problem.sentence for problem in lacking))
    print("everything that it names is in place")


_PATHS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EEXIST,
)  # fmt: skip
"""What the operating system says of paths that a user named, or may not touch."""


def main() -> None:
    """Entry point: a `GraceError` is one sentence on standard error and exit status 1."""
    gc.set_threshold(
        200_000
    )  # at Python's 700, importing torch and transformers spends a quarter of its time collecting
    if sys.argv[1:2] != ["bench"]:  # which measures what the machine can do
        settle()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # loading is quick here; a bar in a log says nothing
    try:
        app()
    except GraceError as error:
        print(f"grace: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            print(f"grace: {where}could not be written ({error.strerror}); free space and run again", file=sys.stderr)
        elif where and error.errno in _PATHS:
            print(f"grace: {where}{error.strerror}; correct the path, or its permissions", file=sys.stderr)
        else:
            raise
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if (
            not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError"
        ):  # torch's, not imported here
            raise
        short = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        print(f"grace: out of memory ({short}); lower the batch of this job, or give it more memory", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
