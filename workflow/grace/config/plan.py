"""What the rules ask of an experiment: frozen parameters, which file feeds which job, and what a job may use."""

import json
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
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
    split_precision,
    student_run,
    teacher_run,
)  # fmt: skip
from grace.config.pretrained import source_hashes
from grace.config.resources import TRAININGS, Job
from grace.config.schema import Experiment, Model, Resources
from grace.config.sections import DEMO_BENCHMARKS, Release, Section
from grace.config.tuning import Trial
from grace.errors import GraceError
from grace.files import read_json

COMPUTED: tuple[Job, ...] = (*TRAININGS, "cache", "quantize", "evaluate")  # kinds of jobs that compute with floats
NOTHING = "(?!)"  # a pattern that no text matches: a rule that this experiment has no use for


class Plan:
    """An experiment as the rules see it. Paths start from the repository's root."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.folder = f"results/{experiment.experiment}"
        self.index = CodeIndex()

    def where(self, condition: Any) -> str:
        """Constraint of the wildcard `experiment`: this one where a rule is of use to it, else nothing."""
        return re.escape(self.experiment.experiment) if condition else NOTHING

    # The code of a job: one small file per subcommand, compared by content.

    def code(self, subcommand: str) -> str:
        """The frozen code of a subcommand, `cache-write` for `grace cache write`."""
        return f"results/{{experiment}}/config/code/{subcommand}.json"

    def frozen_code(self, wildcards: Any) -> str:
        """What that file holds: the code as it is now, or the code that it was accepted as equal to."""
        return json.dumps(resolved(self.folder, self.fingerprint(wildcards.subcommand)), sort_keys=True)

    def distil_code(self, wildcards: Any) -> str:
        """The frozen code of a training with a teacher, by its loss: `train+gated`."""
        return self.code(f"train+{self.experiment.recipes[wildcards.recipe].kd}").format(**dict(wildcards.items()))

    def trial_code(self, wildcards: Any) -> str:
        """The frozen code of a trial's training, with a teacher or without."""
        if self._learns(wildcards):
            return self.distil_code(wildcards)
        return self.code("train").format(**dict(wildcards.items()))

    def fingerprint(self, name: str) -> dict[str, Any]:
        """The code that `config/code/{name}.json` freezes, as it is now; see `CodeIndex.fingerprint`."""
        subcommand, _, kd = name.partition("+")
        if kd:
            return self.index.fingerprint(subcommand, *distillation_modules(kd))
        run = {"prepare": self._data, "evaluate": self._evaluation}.get(subcommand)
        return self.index.fingerprint(subcommand, *(modules_of(run) if run else ()))

    # Frozen parameters: one JSON string each, because Snakemake compares parameters as a nameless set of `repr()`.

    def frozen(self, job: str) -> str:
        """The parameters of the job that `config/{job}.json` belongs to."""
        e = self.experiment
        if job == "experiment":
            return _json(e, exclude={"resources", "tuning"})
        if job == "data":
            return _json(self._data, exclude={"family"} if e.data.source == "demo" else None)
        if job == "teacher":
            return _json(teacher_run(e))
        if job in ("teacher-source", "student-source"):
            return self._source(job.removesuffix("-source"))
        if job == "cache":
            return _json(
                CacheRun(
                    family=e.family, compute_dtype=e.compute_dtype, cache=e.cache, temperature=e.method.temperature
                )
            )
        if job == "evaluation":
            return _json(self._evaluation)
        if job == "tuning":
            if e.tuning is None:
                raise GraceError("tuning: is not set; say which trials each recipe has (see docs/tuning.md)")
            return _json(TuneRun(tuning=e.tuning, benchmarks=e.evaluation.benchmarks))
        return _json(BenchRun(family=e.family, bench=e.bench, group_size=e.quantization.group_size))

    def _source(self, who: str) -> str:
        """Which pretrained model is fetched, of a local folder also what is in it: an exchanged file fetches it again.

        Where the folder is not here, as in a clone that pulled the results, what was frozen of it stands.
        """
        return self._about(getattr(self.experiment, who), Path(self.folder, "config", f"{who}-source.json"))

    @staticmethod
    def _about(model: Model | Release, frozen: Path) -> str:
        assert model.pretrained is not None
        about: dict[str, Any] = {"model": model.pretrained, "revision": model.revision}
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

    def frozen_student(self, wildcards: Any) -> str:
        """The parameters of one student, and nothing that it does not depend on; of a released one where it is from."""
        if release := self._release(wildcards):
            below = self._below(wildcards.recipe, wildcards.precision, wildcards.seed)
            return self._about(release, Path(self.folder, "config", f"{below}.json"))
        return _json(student_run(self.experiment, wildcards.recipe, wildcards.precision, int(wildcards.seed)))

    # Trials of `tuning`, each a student in a folder of its own that nothing else of the experiment reads.

    @property
    def tuned(self) -> str:
        """Recipes that have trials, as a wildcard constraint."""
        return "|".join(map(re.escape, self._trials)) or NOTHING

    @property
    def _trials(self) -> dict[str, list[Trial]]:
        return self.experiment.tuning.trials if self.experiment.tuning else {}

    def frozen_trial(self, wildcards: Any) -> str:
        """The parameters of a trial's training."""
        assert self.experiment.tuning is not None
        tried = self.experiment.tried(wildcards.recipe, int(wildcards.trial) - 1)
        return _json(student_run(tried, wildcards.recipe, self.experiment.tuning.precision, int(wildcards.seed)))

    @property
    def tried(self) -> list[str]:
        """What every trial answered on the development split."""
        return [
            f"{self.folder}/.trials/{recipe}/trial{number}/seed{seed}/predictions/manifest.json"
            for recipe, trials in self._trials.items()
            for number in range(1, len(trials) + 1)
            for seed in (self.experiment.tuning.seeds if self.experiment.tuning else ())
        ]

    def _learns(self, wildcards: Any) -> bool:
        return bool(re.fullmatch(self.distilled, wildcards.recipe))

    def trial_cache(self, wildcards: Any) -> list[str]:
        """The teacher's cache, where a trial's recipe learns from it."""
        return [f"{self.folder}/teacher/cache/manifest.json"] if self._learns(wildcards) else []

    def trial_cache_flag(self, wildcards: Any) -> str:
        """The folder of that cache."""
        return " ".join(f"--cache {shlex.quote(os.path.dirname(path))}" for path in self.trial_cache(wildcards))

    # Which recipe is made by which rule, as wildcard constraints.

    @property
    def trained(self) -> str:
        """Recipes that train without a teacher."""
        return self._recipes(lambda r: not (r.post_training or r.released) and r.kd == "none" and not r.rcka)

    @property
    def distilled(self) -> str:
        """Recipes that learn from the teacher's cache."""
        return self._recipes(lambda r: not (r.post_training or r.released) and (r.kd != "none" or r.rcka))

    @property
    def rounded(self) -> str:
        """Recipes that round without training."""
        return self._recipes(lambda r: r.post_training)

    @property
    def released(self) -> str:
        """Recipes whose students are fetched."""
        return self._recipes(lambda r: r.released)

    @property
    def made(self) -> str:
        """Recipes whose students are made here."""
        return self._recipes(lambda r: not r.released)

    def _release(self, wildcards: Any) -> Release | None:
        recipe = self.experiment.recipes.get(wildcards.recipe)  # the baseline is none
        return recipe.released.get(wildcards.precision) if recipe else None

    def released_model(self, wildcards: Any) -> str:
        """The folder or hub id of a released student."""
        return self._release(wildcards).pretrained  # type: ignore[union-attr]  # its rule is constrained to them

    def released_revision(self, wildcards: Any) -> str:
        """Which revision of it is fetched."""
        return self.revision_flag(self._release(wildcards))  # type: ignore[arg-type]

    def _recipes(self, wanted: Any) -> str:
        names = [re.escape(name) for name, recipe in self.experiment.recipes.items() if wanted(recipe)]
        return "|".join(names) or NOTHING

    # Which file feeds which job.

    def student(self, recipe: str, precision: str, seed: int | str) -> str:
        """A student's folder."""
        return f"{self.folder}/{self._below(recipe, precision, seed)}"

    @staticmethod
    def _below(recipe: str, precision: str, seed: int | str) -> str:
        return f"students/{recipe}/{precision}/seed{seed}"

    def cache_part(self, ending: str) -> str:
        """A part of the teacher's cache, with its number as the wildcard `shard`."""
        return f"results/{{experiment}}/teacher/cache/shard-{{shard}}-of-{self.experiment.cache.shards:05d}.{ending}"

    def cache_parts(self, ending: str) -> list[str]:
        """Every part of the teacher's cache."""
        numbers = [f"{number:05d}" for number in range(self.experiment.cache.shards)]
        name = self.experiment.experiment
        return [self.cache_part(ending).format(experiment=name, shard=number) for number in numbers]

    @property
    def pretraining(self) -> str:
        """The data folder that the models made here are trained on."""
        own = getattr(self.experiment.data, "finetune_images", None)
        return f"{self.folder}/data/pretraining" if own else f"{self.folder}/data"

    def start(self, wildcards: Any) -> str:
        """What a student starts from: another recipe's bf16 student, the baseline of its seed, or the one that was fetched."""
        start = self.experiment.recipes[wildcards.recipe].start
        if start:
            recipe, precision = start.split("/")
            return f"{self.student(recipe, precision, wildcards.seed)}/model/manifest.json"
        fetched = self.experiment.student.pretrained is not None
        seed = self.experiment.baseline_seeds[0] if fetched else wildcards.seed
        return f"{self.student('baseline', 'bf16', seed)}/model/manifest.json"

    def _shipped(self, recipe: str, precision: str, seed: int | str) -> str:
        bits, _ = split_precision(precision)
        return f"{self.student(recipe, precision, seed)}/{'packed' if bits else 'model'}/manifest.json"

    @property
    def packed(self) -> list[str]:
        """Every packed student."""
        return [self._shipped(*s) for s in self.experiment.students() if split_precision(s[1])[0]]

    @property
    def timed(self) -> list[str]:
        """Packed students that the benchmarks time."""
        return [self._shipped(*s) for s in self.experiment.timed()]

    @property
    def baseline(self) -> str:
        """The bf16 model that speed is compared with."""
        return self._shipped("baseline", "bf16", self.experiment.baseline_seeds[0])

    @property
    def _own_teacher(self) -> bool:
        """Whether a fetched teacher and data of the user's own meet, so that `prepare` compares the two models."""
        return self.experiment.data.source != "demo" and self.experiment.teacher.pretrained is not None

    def fetched_teacher(self, wildcards: Any) -> list[str]:
        """The teacher that is fetched, with which `prepare` compares the student; none where it is trained on the data."""
        return [f"{self.folder}/teacher/model/manifest.json"] if self._own_teacher else []

    @property
    def teacher_flag(self) -> str:
        """Where the fetched teacher lies."""
        return f"--teacher {shlex.quote(f'{self.folder}/teacher/model')}" if self._own_teacher else ""

    @property
    def asked(self) -> str:
        """Folders of the models that are evaluated, as a wildcard constraint."""
        return "|".join(map(re.escape, ["teacher", *(self._below(*s) for s in self.experiment.students())]))

    def shipped(self, wildcards: Any) -> str:
        """What is evaluated of a model: the packed folder where weights are integers, its bf16 folder otherwise."""
        _, _, student = wildcards.model.partition("students/")
        if not student:
            return f"{self.folder}/{wildcards.model}/model/manifest.json"
        recipe, precision, seed = student.split("/")
        return self._shipped(recipe, precision, seed.removeprefix("seed"))

    @property
    def language(self) -> list[str]:
        """Files of the user's own that say what language tasks ask."""
        return [task for task in self.experiment.evaluation.language if task.endswith((".yaml", ".yml"))]

    @property
    def predictions(self) -> list[str]:
        """Predictions of the teacher and of every student."""
        folders = ["teacher", *(self._below(*student) for student in self.experiment.students())]
        return [f"{self.folder}/{folder}/predictions/manifest.json" for folder in folders]

    @property
    def overlap(self) -> list[str]:
        """Which questions show training images; of data of the user's own, for the demo draws both apart."""
        data = self.experiment.data
        return [f"{self.folder}/overlap.json"] if data.source != "demo" and data.sources else []

    @property
    def curves(self) -> list[str]:
        """Training logs of every model that is trained here."""
        e = self.experiment
        logs = [f"{self.folder}/teacher/train.jsonl"] if e.teacher.train else []
        for recipe, precision, seed in e.students():
            chosen = e.recipes.get(recipe)
            if not (chosen.post_training or chosen.released) if chosen else e.student.train:
                logs.append(f"{self.student(recipe, precision, seed)}/train.jsonl")
        return logs

    def data_files(self) -> list[str]:
        """The files of the user's own that training data is read from, where they are in place; `prepare` names others.

        Images are left out, for there may be hundreds of thousands; each is held against its hash when it is used.
        """
        if self.experiment.data.source == "demo":
            return []
        paths = [Path(source.path) for source in self.experiment.data.sources]
        found = [
            file
            for path in paths
            for file in (path.rglob("*") if path.is_dir() else [path])
            if file.is_file() and (file == path or file.suffix in (".parquet", ".arrow"))
        ]
        return sorted(map(str, found))

    # What only some experiments need.

    def processor(self, wildcards: Any) -> list[str]:
        """The student whose processor reads data of the user's own; the demo's data comes before any model."""
        return [] if self.experiment.data.source == "demo" else [self.baseline]

    def processor_flag(self, wildcards: Any) -> str:
        """The folder of that processor."""
        return " ".join(f"--processor {shlex.quote(os.path.dirname(path))}" for path in self.processor(wildcards))

    @property
    def benchmarks_flag(self) -> str:
        """Where benchmark files of the user's own lie."""
        folder = getattr(self.experiment.data, "benchmarks", None)
        return f"--benchmarks {shlex.quote(folder)}" if folder else ""

    def revision_flag(self, model: Model | Release) -> str:
        """Which revision of a pretrained model is fetched."""
        return f"--revision {shlex.quote(model.revision)}" if model.revision else ""

    # What a job may use.

    def threads(self, job: Job) -> int:
        """Processor cores of one such job."""
        return self._request(job).cpus

    def short_of_cores(self, jobs: Iterable[str], cores: int) -> list[str]:
        """A sentence for each of these kinds of jobs whose numbers fewer threads would change; GPUs do not ask for threads."""
        return [
            f"resources.{job}.cpus is {asked.cpus} and --cores {cores}: on fewer threads a CPU's results differ in their last "
            "digits; give --cores at least that, or lower cpus, which makes it another result"
            for job in COMPUTED
            if job in jobs and not (asked := self._request(job)).gpus and asked.cpus > cores
        ]

    def resources(self, job: Job) -> dict[str, Any]:
        """Kind, memory, GPUs and time of one such job, under the names that Snakemake and its Slurm plugin know.

        What a job that is sent again (`retries` in the Slurm profile) asks for, `retry_request` says.
        The plugin counts `gpu` over all machines of a job and `gres` on each. Without GPUs it asks for `tasks`, one if
        nothing is said. `grace train` starts a process for each `gpu`, which a machine limits to those it has, or on each
        machine `processes`, which is ours.
        """
        asked = self._request(job)
        named: dict[str, Any] = {
            "kind": job,
            "mem_mb": lambda wildcards, attempt: self.retry_request(asked, attempt, job, wildcards).mem_mb,
            "runtime": lambda wildcards, attempt: self.retry_request(asked, attempt, job, wildcards).runtime,
            "gpu": asked.gpus,
            "nodes": asked.nodes,
            "processes": 0,
        }
        if asked.nodes > 1 and asked.gpus:
            named |= {"gpu": 0, "gres": f"gpu:{asked.gpus}", "processes": asked.gpus}
        elif asked.nodes > 1:
            named["tasks"] = asked.nodes
        if asked.partition:
            named["slurm_partition"] = asked.partition
        if asked.account:
            named["slurm_account"] = asked.account
        return named

    @staticmethod
    def retry_request(asked: Resources, attempt: int, kind: str, wildcards: Iterable[str]) -> Resources:
        """What the `attempt`-th try of such a job asks for; on a cluster the Snakefile puts one here that asks it."""
        return asked.model_copy(update={"mem_mb": attempt * asked.mem_mb, "runtime": attempt * asked.runtime})

    def _request(self, job: Job) -> Resources:
        return self.experiment.resources.get(job, Resources())


def _json(run: Section, exclude: set[str] | None = None) -> str:
    return json.dumps(run.model_dump(mode="json", exclude=exclude), sort_keys=True)
