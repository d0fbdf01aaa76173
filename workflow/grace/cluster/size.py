"""`grace size`: memory, tokens, FLOPs, hours and bytes of an experiment's trainings and cache,
beside what runs have shown.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from grace.cluster.predict import GPUS, DataSize, Gpu, ModelSize, Need, cache_bytes, caching, training
from grace.config.job_parameters import TrainRun, student_run
from grace.config.load import load_experiment
from grace.config.plan import Plan
from grace.config.resources import Resources
from grace.config.schema import Experiment
from grace.errors import GraceError
from grace.files import TIMING


@dataclass(frozen=True)
class Line:
    """A kind of job.

    Attributes:
        name, jobs, gpus: what it is, how many there are, and GPUs of each.
        need: of one of them.
        logs: what their steps took, where it was kept.
        files: a folder of which the files' sizes are known, once it is there.
    """

    name: str
    jobs: int
    gpus: int
    need: Need
    logs: tuple[Path, ...] = ()
    files: Path | None = None

    def measured(self) -> dict[str, float]:
        """`gib`, `hours` of one job and `bytes` of all, as far as runs have shown them."""
        found: dict[str, float] = {}
        entries = [[json.loads(line) for line in log.read_text().splitlines()] for log in self.logs if log.is_file()]
        entries = [entry for entry in entries if entry]
        if entries:
            found["gib"] = max(step["memory_gib"] for run in entries for step in run)
            found["hours"] = sum(step["seconds"] for run in entries for step in run) / 3600 / len(entries)
        if self.files is not None and (self.files / "manifest.json").is_file():
            found["bytes"] = sum(path.stat().st_size for path in self.files.rglob("*") if path.is_file())
        return found


def size(configfile: Path, gpu: str, disk: float) -> list[Line]:
    """Print and return what the experiment's trainings and cache need on a GPU.

    Args:
        configfile: the experiment, or the one that was frozen in its results.
        gpu: one of `GPUS`.
        disk: GB/s that are written.

    Raises:
        GraceError: an unknown GPU, or models or data that nothing is known of yet.
    """
    if gpu not in GPUS:
        raise GraceError(f"--gpu {gpu}: not one of {', '.join(GPUS)}; give the one that comes nearest")
    from grace.cluster.counts import data_size, model_size

    experiment = load_experiment(configfile)
    plan = Plan(experiment)
    folders = {
        "teacher": Path(plan.folder) / "teacher/model",
        "student": Path(plan.student("baseline", "bf16", experiment.baseline_seeds[0])) / "model",
    }
    for who, built in folders.items():
        pretrained = getattr(experiment, who).pretrained
        there = [f for f in (built, Path(pretrained or built)) if (f / "config.json").is_file()]
        if not there:
            raise GraceError(f"{built}: the {who} is not here yet; build it first: `snakemake {built}/manifest.json`")
        folders[who] = there[0]
    teacher, student = (model_size(folder) for folder in folders.values())
    data = data_size(experiment.data, Path(plan.folder) / "data", folders["student"])
    lines = list(_lines(experiment, plan, teacher, student, data, GPUS[gpu], disk * 1e9))
    _show(experiment, lines, data, GPUS[gpu], disk)
    if lines and lines[0].name == "cache":
        forms = ((form, cache_bytes(data, teacher.hidden, form) / 1e9) for form in ("hidden", "hidden-int8", "sampled"))
        print("The cache by cache.format: " + ", ".join(f"{form} {room:,.1f} GB" for form, room in forms) + ".")
    return lines


def _lines(
    experiment: Experiment, plan: Plan, teacher: ModelSize, student: ModelSize, data: DataSize, gpu: Gpu, disk: float
) -> Iterator[Line]:
    cache = experiment.cache
    trained = {name: recipe for name, recipe in experiment.recipes.items() if recipe.trains}
    if any(name in trained and trained[name].distils for name, _, _ in experiment.students()):
        need = caching(teacher, data, gpu, cache.format, cache.shards, cache.pass_tokens or 8192, disk)
        yield Line("cache", cache.shards, 1, need, files=Path(plan.folder) / "teacher/cache")
    kinds: dict[tuple[str, str], list[Path]] = {}
    for recipe, precision, seed in experiment.students():
        if recipe in trained:
            kinds.setdefault((recipe, precision), []).append(Path(plan.student(recipe, precision, seed)))
    for (recipe, precision), folders in kinds.items():
        run = student_run(experiment, recipe, precision, 0)
        assert isinstance(run, TrainRun)
        kind = "distil" if trained[recipe].distils else "finetune"
        asked = experiment.resources.get(kind, Resources())
        gpus = max(1, asked.gpus * asked.nodes)
        head = teacher.head * teacher.hidden if run.kd != "none" and cache.format != "sampled" else 0
        need = training(student, run.optimisation, data, gpu, gpus, run.bits, experiment.quantization.group_size, head)
        yield Line(f"{recipe} {precision}", len(folders), gpus, need, tuple(f / "model" / TIMING for f in folders))


def _beside(predicted: float | None, measured: float | None, form: str) -> str:
    text = "-" if predicted is None else format(predicted, form)
    return text if measured is None else f"{text} ({format(measured, form)})"


def _show(experiment: Experiment, lines: list[Line], data: DataSize, gpu: Gpu, disk: float) -> None:
    table = Table(box=SIMPLE)
    table.add_column("job", no_wrap=True)
    for head in ("jobs", "GPUs", "tokens", "EFLOP", "GiB a GPU", "hours", "GPU hours", "GB left"):
        table.add_column(head, justify="right")
    for line in lines:
        need, seen = line.need, line.measured()
        left = seen.get("bytes")
        table.add_row(
            line.name, str(line.jobs), str(line.gpus), f"{need.tokens / 1e6:,.1f} M", f"{need.flops / 1e18:,.2f}",
            _beside(need.gib, seen.get("gib"), ",.1f"), _beside(need.hours, seen.get("hours"), ",.2f"),
            f"{need.hours * line.jobs * line.gpus:,.1f}",
            _beside(need.bytes * line.jobs / 1e9, None if left is None else left / 1e9, ",.1f"),
        )  # fmt: skip
    total = sum(line.need.hours * line.jobs * line.gpus for line in lines)
    left = sum(line.need.bytes * line.jobs for line in lines)
    passing = max((line.need.passing for line in lines), default=0.0)
    table.add_section()
    table.add_row("all", "", "", "", "", "", "", f"{total:,.1f}", f"{left / 1e9:,.1f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    known = "counted" if data.sampled is None else f"drawn from {data.sampled:,} of them"
    print(
        f"{experiment.experiment} on {gpu.name}, {disk:g} GB/s: {data.conversations:,} conversations, "
        f"{data.tokens / 1e6:,.1f} M tokens, {data.images:,} images ({known})."
    )
    print(f"While a job runs, up to {passing / 1e9:,.0f} GB more (checkpoints, a shard before it is whole).")
    for line in lines:
        if line.need.gib is not None and line.need.gib > gpu.memory:
            print(
                f"{line.name}: {line.need.gib:,.0f} GiB do not fit {gpu.name}'s {gpu.memory:g}; give it more GPUs, or "
                "lower pass_tokens or kept_activations"
            )
