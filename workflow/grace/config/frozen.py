"""What is frozen for the jobs before they run: the content of each file below results/{experiment}/config/.

Parameters are one JSON string per job, because Snakemake compares a rule's parameters as a nameless set of `repr()`.
The code of a job is one small file per subcommand, compared by content.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from grace.config.accepted import resolved
from grace.config.code import CodeIndex
from grace.config.job_modules import distillation_modules, modules_of
from grace.config.job_parameters import (
    BenchRun,
    CacheRun,
    DataRun,
    EvaluateRun,
    TuneRun,
    student_run,
    teacher_run,
)  # fmt: skip
from grace.config.plan import Plan, student_folder
from grace.config.pretrained import source_hashes
from grace.config.schema import Model
from grace.config.sections import DEMO_BENCHMARKS, Release, Section
from grace.errors import GraceError
from grace.files import read_json


class Frozen:
    """Parameters and code of an experiment's jobs, as JSON."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.experiment = plan.experiment
        self.index = CodeIndex()

    def job(self, name: str) -> str:
        """The parameters of the job that `config/{name}.json` belongs to."""
        e = self.experiment
        if name == "experiment":
            return _json(e, exclude={"resources", "tuning"})
        if name == "data":
            return _json(self._data, exclude={"family"} if e.data.source == "demo" else None)
        if name == "teacher":
            return _json(teacher_run(e))
        if name in ("teacher-source", "student-source"):
            return self._source(getattr(e, name.removesuffix("-source")), f"{name}.json")
        if name == "cache":
            return _json(
                CacheRun(
                    family=e.family, compute_dtype=e.compute_dtype, cache=e.cache, temperature=e.method.temperature
                )
            )
        if name == "evaluation":
            return _json(self._evaluation)
        if name == "tuning":
            if e.tuning is None:
                raise GraceError("tuning: is not set; say which trials each recipe has (see docs/tuning.md)")
            return _json(TuneRun(tuning=e.tuning, benchmarks=e.evaluation.benchmarks))
        return _json(BenchRun(family=e.family, bench=e.bench, group_size=e.quantization.group_size))

    def content(self, name: str) -> str | None:
        """What `config/{name}.json` is to hold; None where the experiment has no such job any more."""
        try:
            match name.split("/"):
                case ["code", subcommand]:
                    return self.code(SimpleNamespace(subcommand=subcommand))
                case ["students", recipe, precision, seed]:
                    student = SimpleNamespace(recipe=recipe, precision=precision, seed=seed.removeprefix("seed"))
                    return self.student(student)
                case _:
                    return self.job(name)
        except (GraceError, KeyError, ValueError, AssertionError):
            return None

    def student(self, wildcards: Any) -> str:
        """The parameters of one student, and nothing that it does not depend on; of a released one where it is from."""
        recipe, precision, seed = wildcards.recipe, wildcards.precision, wildcards.seed
        if release := self.experiment.release(recipe, precision):
            return self._source(release, f"{student_folder(recipe, precision, seed)}.json")
        return _json(student_run(self.experiment, recipe, precision, int(seed)))

    def trial(self, wildcards: Any) -> str:
        """The parameters of a trial's training."""
        assert self.experiment.tuning is not None
        tried = self.experiment.tried(wildcards.recipe, int(wildcards.trial) - 1)
        return _json(student_run(tried, wildcards.recipe, self.experiment.tuning.precision, int(wildcards.seed)))

    def code(self, wildcards: Any) -> str:
        """The code of `config/code/{subcommand}.json` as it is now, or the code that it was accepted as equal to."""
        return json.dumps(resolved(self.plan.folder, self.fingerprint(wildcards.subcommand)), sort_keys=True)

    def fingerprint(self, name: str) -> dict[str, Any]:
        """The code of `config/code/{name}.json` as it is now; see `CodeIndex.fingerprint`."""
        subcommand, _, kd = name.partition("+")
        if kd:
            return self.index.fingerprint(subcommand, *distillation_modules(kd))
        run = {"prepare": self._data, "evaluate": self._evaluation}.get(subcommand)
        return self.index.fingerprint(subcommand, *(modules_of(run) if run else ()))

    def _source(self, model: Model | Release, file: str) -> str:
        """Which pretrained model is fetched, of a local folder also what is in it: an exchanged file fetches it again.

        Where the folder is not here, as in a clone that pulled the results, what `config/{file}` froze of it stands.
        """
        assert model.pretrained is not None
        about: dict[str, Any] = {"model": model.pretrained, "revision": model.revision}
        frozen = Path(self.plan.folder, "config", file)
        if Path(model.pretrained).is_dir():
            about["files"] = source_hashes(model.pretrained)
        elif frozen.is_file():
            before = read_json(frozen)
            if {key: before.get(key) for key in about} == about:
                about = before
        return json.dumps(about, sort_keys=True)

    @property
    def _data(self) -> DataRun:
        e = self.experiment
        if e.data.source == "demo":
            return DataRun(data=e.data, benchmarks=list(DEMO_BENCHMARKS))
        return DataRun(data=e.data, benchmarks=[], family=e.family)

    @property
    def _evaluation(self) -> EvaluateRun:
        return EvaluateRun(family=self.experiment.family, evaluation=self.experiment.evaluation)


def _json(run: Section, exclude: set[str] | None = None) -> str:
    return json.dumps(run.model_dump(mode="json", exclude=exclude), sort_keys=True)
