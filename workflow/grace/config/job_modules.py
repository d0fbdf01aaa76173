"""Which of the modules that only some jobs use (`grace.config.code.CHOSEN`) a job's frozen parameters choose."""

from pathlib import Path

from grace.benchmarks.registry import ADAPTERS
from grace.config.job_parameters import DataRun, EvaluateRun, TrainRun
from grace.config.sections import Section
from grace.files import read_json


def modules_of(run: Section) -> list[str]:
    """Dotted names of the modules that a job with these parameters uses besides what every such job does."""
    if isinstance(run, DataRun):
        return ["grace.demo.prepare"] if run.data.source == "demo" else ["grace.data.prepare", "grace.models.pair"]
    if isinstance(run, EvaluateRun):
        return [ADAPTERS[run.evaluation.harness]]
    if isinstance(run, TrainRun) and (run.kd != "none" or run.rcka):
        return distillation_modules(run.kd)
    return []


def distillation_modules(kd: str) -> list[str]:
    """What a training that learns from the teacher's cache uses besides any training, by its loss."""
    return ["grace.train.distillation", *([f"grace.distill.objectives.{kd}"] if kd != "none" else [])]


def modules_of_file(path: Path) -> list[str]:
    """`modules_of` a file of frozen parameters; nothing where it holds no such job's."""
    values = read_json(path) if path.suffix == ".json" else None
    kinds: dict[str, type[Section]] = {"data": DataRun, "evaluation": EvaluateRun, "optimisation": TrainRun}
    kind = next((kind for key, kind in kinds.items() if isinstance(values, dict) and key in values), None)
    return modules_of(kind.model_validate(values)) if kind and "experiment" not in values else []  # pyright: ignore[reportOperatorIssue]
