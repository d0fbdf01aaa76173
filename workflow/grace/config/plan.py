"""What the rules ask of an experiment: frozen parameters, which file feeds which job, and what a job may use."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace.benchmarks.registry import ADAPTERS
from grace.config.code import code_files
from grace.config.objectives import training_modules
from grace.config.runs import (
    BenchRun,
    CacheRun,
    DataRun,
    EvaluateRun,
    split_precision,
    student_run,
    teacher_run,
)  # fmt: skip
from grace.config.schema import Experiment, Model, Resources
from grace.config.sections import DEMO_BENCHMARKS, Section

NOTHING = "(?!)"  # a pattern that no text matches: a rule that this experiment has no use for


@dataclass(frozen=True)
class Asking:
    """One evaluation job: models that one process asks, one after the other.

    Attributes:
        name: of its rule and, below `logs/`, of its log.
        title: in messages.
        models: manifests of the models.
        predictions: manifests of their predictions, in the same order.
    """

    name: str
    title: str
    models: list[str]
    predictions: list[str]

    @property
    def rule(self) -> str:
        return "evaluate_" + re.sub(r"\W", "_", self.name)

    @property
    def pairs(self) -> list[str]:
        """The flags that say which model is asked and where its predictions go."""
        folders = [[path.removesuffix("/manifest.json") for path in paths] for paths in (self.models, self.predictions)]
        return [word for model, out in zip(*folders, strict=True) for word in ("--model", model, "--out", out)]


class Plan:
    """An experiment as the rules see it. Paths start from the repository's root."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.folder = f"results/{experiment.experiment}"
        self.code = code_files

    @property
    def adapter(self) -> str:
        """The module that asks benchmarks through the experiment's harness; `grace evaluate` imports it by name."""
        return ADAPTERS[self.experiment.evaluation.harness]

    # Frozen parameters: one JSON string each, because Snakemake compares parameters as a nameless set of `repr()`.

    def frozen(self, job: str) -> str:
        """The parameters of the job that `config/{job}.json` belongs to."""
        e = self.experiment
        if job == "experiment":
            return _json(e, exclude={"resources"})
        if job == "data":
            if e.data.source == "demo":
                return _json(DataRun(data=e.data, benchmarks=list(DEMO_BENCHMARKS)), exclude={"family"})
            return _json(DataRun(data=e.data, benchmarks=[], family=e.family))
        if job == "teacher":
            return _json(teacher_run(e))
        if job == "cache":
            return _json(
                CacheRun(
                    family=e.family, compute_dtype=e.compute_dtype, cache=e.cache, temperature=e.method.temperature
                )
            )
        if job == "evaluation":
            return _json(EvaluateRun(family=e.family, evaluation=e.evaluation))
        return _json(BenchRun(family=e.family, bench=e.bench, group_size=e.quantization.group_size))

    def frozen_student(self, wildcards: Any) -> str:
        """The parameters of one student, and nothing that it does not depend on."""
        return _json(student_run(self.experiment, wildcards.recipe, wildcards.precision, int(wildcards.seed)))

    def distil_code(self, wildcards: Any) -> list[str]:
        """What distilling a recipe depends on: the trainer, and its objective's file, which is imported by name."""
        return self.code(*training_modules(self.experiment.recipes[wildcards.recipe].kd))

    # Which recipe is made by which rule, as wildcard constraints.

    @property
    def trained(self) -> str:
        """Recipes that train without a teacher."""
        return self._recipes(lambda r: not r.post_training and r.kd == "none" and not r.rcka)

    @property
    def distilled(self) -> str:
        """Recipes that learn from the teacher's cache."""
        return self._recipes(lambda r: not r.post_training and (r.kd != "none" or r.rcka))

    @property
    def rounded(self) -> str:
        """Recipes that round without training."""
        return self._recipes(lambda r: r.post_training)

    def _recipes(self, wanted: Any) -> str:
        names = [re.escape(name) for name, recipe in self.experiment.recipes.items() if wanted(recipe)]
        return "|".join(names) or NOTHING

    # Which file feeds which job.

    def student(self, recipe: str, precision: str, seed: int | str) -> str:
        """A student's folder."""
        return f"{self.folder}/students/{recipe}/{precision}/seed{seed}"

    def cache_part(self, ending: str) -> str:
        """A part of the teacher's cache, with its number as the wildcard `shard`."""
        return f"results/{{experiment}}/teacher/cache/shard-{{shard}}-of-{self.experiment.cache.shards:05d}.{ending}"

    def cache_parts(self, ending: str) -> list[str]:
        """Every part of the teacher's cache."""
        numbers = [f"{number:05d}" for number in range(self.experiment.cache.shards)]
        name = self.experiment.experiment
        return [self.cache_part(ending).format(experiment=name, shard=number) for number in numbers]

    def start(self, wildcards: Any) -> str:
        """The baseline that a student starts from: that of its seed, or the one that was fetched."""
        fetched = self.experiment.student.pretrained is not None
        seed = self.experiment.baseline_seeds[0] if fetched else wildcards.seed
        return f"{self.student('baseline', 'bf16', seed)}/model/manifest.json"

    def _shipped(self, recipe: str, precision: str, seed: int | str) -> str:
        """What is evaluated of a student: the packed folder where weights are integers, its bf16 folder otherwise."""
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
    def fetched_teacher(self) -> list[str]:
        """The teacher that is fetched, with which `prepare` compares the student; none where it is trained on the data."""
        return [f"{self.folder}/teacher/model/manifest.json"] if self.experiment.teacher.pretrained else []

    @property
    def teacher_flag(self) -> str:
        """Where the fetched teacher lies."""
        return f"--teacher {shlex.quote(f'{self.folder}/teacher/model')}" if self.experiment.teacher.pretrained else ""

    @property
    def asking(self) -> list[Asking]:
        """Every evaluation: the teacher's, and the students'.

        On processors starting costs more than the questions, so one process asks all students of a recipe; of those
        it asks again only what changed. With GPUs each student is a job of its own, and a cluster asks them at once.
        """
        teacher = f"{self.folder}/teacher"
        jobs = [
            Asking(
                "teacher", "the teacher", [f"{teacher}/model/manifest.json"], [f"{teacher}/predictions/manifest.json"]
            )
        ]
        together: dict[str, list[tuple[str, str, int]]] = {}
        for recipe, precision, seed in self.experiment.students():
            alone = self._asked("evaluate").gpus > 0
            name = f"students/{recipe}" + (f"/{precision}/seed{seed}" if alone else "")
            together.setdefault(name, []).append((recipe, precision, seed))
        for name, students in together.items():
            recipe, precision, seed = students[0]
            title = (
                f"{recipe} at {precision}, seed {seed}" if len(students) == 1 else f"{recipe}, {len(students)} students"
            )
            models = [self._shipped(*student) for student in students]
            predictions = [f"{self.student(*student)}/predictions/manifest.json" for student in students]
            jobs.append(Asking(name, title, models, predictions))
        return jobs

    @property
    def language(self) -> list[str]:
        """Files of the user's own that say what language tasks ask."""
        return [task for task in self.experiment.evaluation.language if task.endswith((".yaml", ".yml"))]

    @property
    def predictions(self) -> list[str]:
        """Predictions of the teacher and of every student."""
        return [path for job in self.asking for path in job.predictions]

    @property
    def curves(self) -> list[str]:
        """Training logs of every model that is trained here."""
        e = self.experiment
        logs = [f"{self.folder}/teacher/train.jsonl"] if e.teacher.train else []
        for recipe, precision, seed in e.students():
            made = e.student.train if recipe == "baseline" else not e.recipes[recipe].post_training
            if made:
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

    # Flags that only some experiments give.

    @property
    def benchmarks_flag(self) -> str:
        """Where benchmark files of the user's own lie."""
        folder = getattr(self.experiment.data, "benchmarks", None)
        return f"--benchmarks {shlex.quote(folder)}" if folder else ""

    def revision_flag(self, model: Model) -> str:
        """Which revision of a pretrained model is fetched."""
        return f"--revision {shlex.quote(model.revision)}" if model.revision else ""

    # What a job may use.

    def threads(self, job: str) -> int:
        """Processor cores of one such job."""
        return self._asked(job).cpus

    def resources(self, job: str) -> dict[str, Any]:
        """Memory, GPUs and time of one such job, under the names that Snakemake and its Slurm plugin know.

        A job that is sent again (`retries` in the Slurm profile) asks for twice, then three times the memory and time.
        The plugin counts `gpu` over all machines of a job and `gres` on each. Without GPUs it asks for `tasks`, one if
        nothing is said; `processes` is ours, for `grace train`.
        """
        asked = self._asked(job)
        named: dict[str, Any] = {
            "mem_mb": lambda wildcards, attempt: attempt * asked.mem_mb,
            "runtime": lambda wildcards, attempt: attempt * asked.runtime,
            "gpu": asked.gpus,
            "nodes": asked.nodes,
            "processes": asked.gpus,
        }
        if asked.nodes > 1 and asked.gpus:
            named |= {"gpu": 0, "gres": f"gpu:{asked.gpus}"}
        elif asked.nodes > 1:
            named["tasks"] = asked.nodes
        if asked.partition:
            named["slurm_partition"] = asked.partition
        if asked.account:
            named["slurm_account"] = asked.account
        return named

    def _asked(self, job: str) -> Resources:
        return self.experiment.resources.get(job, Resources())


def _json(run: Section, exclude: set[str] | None = None) -> str:
    return json.dumps(run.model_dump(mode="json", exclude=exclude), sort_keys=True)
