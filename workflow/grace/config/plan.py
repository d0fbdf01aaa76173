"""Which file feeds which job, and the flags that say so on a command line."""

import os
import shlex
from pathlib import Path
from typing import Any

from grace.config.schema import Experiment, Model
from grace.config.sections import Release
from grace.precision import split_precision


def student_folder(recipe: str, precision: str, seed: int | str) -> str:
    """A student's folder below the experiment's."""
    return f"students/{recipe}/{precision}/seed{seed}"


class Plan:
    """An experiment's files as the rules see them. Paths start from the repository's root."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.folder = f"results/{experiment.experiment}"

    # Code: one small file per subcommand.

    def code(self, subcommand: str) -> str:
        """The frozen code of a subcommand, `cache-write` for `grace cache write`."""
        return f"results/{{experiment}}/config/code/{subcommand}.json"

    def distil_code(self, wildcards: Any) -> str:
        """The frozen code of a training with a teacher, by its loss: `train+gated`."""
        return self.code(f"train+{self.experiment.recipes[wildcards.recipe].kd}").format(**dict(wildcards.items()))

    # Data.

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

    @property
    def pretraining(self) -> str:
        """The data folder that the models made here are trained on."""
        own = getattr(self.experiment.data, "finetune_images", None)
        return f"{self.folder}/data/pretraining" if own else f"{self.folder}/data"

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

    @property
    def _own_teacher(self) -> bool:
        """Whether a fetched teacher and data of the user's own meet, so that `prepare` compares the two models."""
        return self.experiment.data.source != "demo" and self.experiment.teacher.pretrained is not None

    def fetched_teacher(self, wildcards: Any) -> list[str]:
        """The teacher that is fetched, with which `prepare` compares the student;
        none where it is trained on the data.
        """
        return [f"{self.folder}/teacher/model/manifest.json"] if self._own_teacher else []

    @property
    def teacher_flag(self) -> str:
        """Where the fetched teacher lies."""
        return f"--teacher {shlex.quote(f'{self.folder}/teacher/model')}" if self._own_teacher else ""

    # The teacher's cache.

    def cache_part(self, ending: str) -> str:
        """A part of the teacher's cache, with its number as the wildcard `shard`."""
        return f"results/{{experiment}}/teacher/cache/shard-{{shard}}-of-{self.experiment.cache.shards:05d}.{ending}"

    def cache_parts(self, ending: str) -> list[str]:
        """Every part of the teacher's cache."""
        numbers = [f"{number:05d}" for number in range(self.experiment.cache.shards)]
        name = self.experiment.experiment
        return [self.cache_part(ending).format(experiment=name, shard=number) for number in numbers]

    # Students.

    def student(self, recipe: str, precision: str, seed: int | str) -> str:
        """A student's folder."""
        return f"{self.folder}/{student_folder(recipe, precision, seed)}"

    def start(self, wildcards: Any) -> str:
        """What a student starts from: another recipe's bf16 student, the baseline of its seed,
        or the one that was fetched.
        """
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

    def released_model(self, wildcards: Any) -> str:
        """The folder or hub id of a released student."""
        return self._release(wildcards).pretrained

    def released_revision(self, wildcards: Any) -> str:
        """Which revision of it is fetched."""
        return self.revision_flag(self._release(wildcards))

    def _release(self, wildcards: Any) -> Release:
        release = self.experiment.release(wildcards.recipe, wildcards.precision)
        assert release is not None, "its rule is constrained to recipes of released students"
        return release

    def revision_flag(self, model: Model | Release) -> str:
        """Which revision of a pretrained model is fetched."""
        return f"--revision {shlex.quote(model.revision)}" if model.revision else ""

    # What is asked, and what is reported.

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
        folders = ["teacher", *(student_folder(*student) for student in self.experiment.students())]
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
            if chosen.trains if chosen else e.student.train:
                logs.append(f"{self.student(recipe, precision, seed)}/train.jsonl")
        return logs
