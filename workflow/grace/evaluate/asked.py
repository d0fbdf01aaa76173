"""What an evaluation asks of a model, and what its predictions depend on. A job that finds them all in place needs no
more, and so neither pandas nor torch is imported here.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grace.arithmetic import settled
from grace.benchmarks.files import questions_file
from grace.benchmarks.protocols import Spec, spec
from grace.benchmarks.registry import GRACE, INSTALL, PACKAGES, VLMEVAL, Benchmark, benchmark, task_id
from grace.config.accepted import resolved
from grace.config.code import CodeIndex
from grace.config.evaluation import Evaluation
from grace.config.job_modules import modules_of
from grace.config.job_parameters import EvaluateRun, read_run
from grace.config.preflight import VLLM
from grace.errors import GraceError
from grace.evaluate.language_tasks import text_key
from grace.families import check_family
from grace.files import sha256
from grace.git import git_or_none
from grace.results.keys import answers_key, model_hash, prediction_key

PROTOCOL_CODE = "2"  # changes when this package asks equal questions otherwise
PROTOCOLS = "protocols"  # predictions under protocols other than the first of a benchmark


@dataclass(frozen=True)
class Task:
    """A benchmark under one protocol, and the file that its predictions go to."""

    entry: Benchmark
    protocol: str
    spec: Spec
    file: str

    @property
    def title(self) -> str:
        return f"{self.entry.name} ({self.protocol})"


def tasks_of(settings: Evaluation) -> list[Task]:
    """What an experiment asks; under the first protocol of a benchmark its predictions are `{benchmark}.parquet`."""
    tasks = []
    for name in settings.benchmarks:
        entry = benchmark(name)
        task_id(name, settings.harness)
        for place, protocol in enumerate(settings.protocols(name)):
            file = f"{PROTOCOLS}/{protocol}/{name}.parquet" if place else f"{name}.parquet"
            tasks.append(Task(entry, protocol, spec(protocol, name), file))
    return tasks


class Asked:
    """What the frozen parameters `run` (`EvaluateRun`) ask of one model about the benchmarks of one data folder.

    Attributes:
        parameters: the run's.
        tasks: benchmarks under their protocols.
        model: the model's hash.
        harness: name and version of what asks.
        answers: the `answers_key`.
    """

    def __init__(self, run: Path, model: Path, data: Path) -> None:
        """A `GraceError` where the model is of another family, or a benchmark or the harness is not to be had."""
        self.parameters, self.data = read_run(run, EvaluateRun), data
        settings = self.parameters.evaluation
        check_family(model, self.parameters.family)
        self.tasks = tasks_of(settings)
        self.harness = _harness(settings)
        self.model = model_hash(model)
        how = settings.model_dump(include={"batch", "harness"})  # the engine stands in `harness`
        self._made_with = {"code": _code(run, self.parameters), "arithmetic": settled()}
        self.answers = answers_key(self.model, how, self.harness, self._made_with)

    def questions(self, task: Task) -> Path:
        """The file of a task's benchmark; a `GraceError` where there is none."""
        return questions_file(self.data, task.entry.name, task.protocol)

    def key(self, task: Task) -> str:
        """The `prediction_key` of a task; a `GraceError` where its benchmark has no file."""
        settings = self.parameters.evaluation
        longest = settings.longest(task.entry.name)
        how = replace(task.spec, new_tokens=longest, new_tokens_open=None) if longest else task.spec
        return prediction_key(self.answers, _hash(self.questions(task)), settings.limit, task.protocol, how)

    def text_key(self, task: str) -> str:
        """The `text_key` of a task of the language side; a `GraceError` where its files are not in order."""
        return text_key(self.model, task, self.parameters.evaluation.limit, self._made_with)

    def key_of_all(self) -> str:
        """All that the predictions depend on, and which they are, as one SHA-256 (hex). Raises as the keys do."""
        keys: dict[str, str] = {task.title: self.key(task) for task in self.tasks}
        keys |= {task: self.text_key(task) for task in self.parameters.evaluation.language}
        return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()


def _code(run: Path, parameters: EvaluateRun) -> dict[str, Any]:
    """The code that asks and scores, or the code that `grace accept` took it as equal to in the results that
    `run` is of.
    """
    return resolved(run.parent.parent, CodeIndex().fingerprint("evaluate", *modules_of(parameters)))


def _hash(path: Path) -> str:
    """SHA-256 (hex) of a benchmark's file, or over those of its shards."""
    if path.is_file():
        return sha256(path)
    return hashlib.sha256("".join(sha256(shard) for shard in sorted(path.glob("*.parquet"))).encode()).hexdigest()


def _harness(settings) -> dict[str, str]:
    """Name and version of the harness; a `GraceError` says how to install a missing one."""
    name = settings.harness
    if name == GRACE:
        return {"name": name, "version": PROTOCOL_CODE, **_engine(settings)}
    if name == VLMEVAL:
        if settings.vlmeval_checkout is None:
            raise GraceError("evaluation.vlmeval_checkout: is not set; give the folder of a VLMEvalKit checkout")
        revision = git_or_none(settings.vlmeval_checkout, "rev-parse", "HEAD")
        if revision is None or not (Path(settings.vlmeval_checkout) / "vlmeval").is_dir():
            raise GraceError(
                f"evaluation.vlmeval_checkout: {settings.vlmeval_checkout} is no checkout of VLMEvalKit; clone it there"
            )
        return {"name": name, "version": revision}
    try:
        return {"name": name, "version": importlib.metadata.version(PACKAGES[name])}
    except importlib.metadata.PackageNotFoundError:
        raise GraceError(f"evaluation.harness: {name} is not installed in this environment; {INSTALL[name]}") from None


def _engine(settings) -> dict[str, str]:
    """What else than this package computes the answers, with its version."""
    if settings.engine == GRACE:
        return {}
    if importlib.util.find_spec("vllm") is None:
        raise GraceError(VLLM)
    name, *_ = importlib.metadata.packages_distributions().get("vllm", ["vllm"])  # a CPU build has a name of its own
    try:
        return {"engine": f"{name} {importlib.metadata.version(name)}"}
    except importlib.metadata.PackageNotFoundError:
        return {"engine": "vllm, of no known version"}
