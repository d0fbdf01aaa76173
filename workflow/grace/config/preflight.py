"""What can be known of an experiment before its first job: whether everything that it names is in place and fits.

Each thing that is missing is one sentence, and all are said at once. Only names, sizes and headers are read, and
neither torch nor transformers is imported: a dry run asks all of this.
"""

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace.benchmarks.files import ANSWERS, benchmark_file
from grace.benchmarks.protocols import Spec, spec
from grace.benchmarks.registry import INSTALL, PACKAGES
from grace.config.plan import student_folder
from grace.config.preflight_models import model_problems
from grace.config.schema import Experiment, FilesData
from grace.errors import reason
from grace.hashes import known_sha256

IMAGES = ("image", "image_1")
VLLM = "evaluation.engine: vllm is not installed in this environment; `pip install vllm` there, or set engine: grace"
BF16 = 2  # bytes
TOKEN_BYTES = 8  # of conversation files per supervised token, at most: an estimate from below


@dataclass(frozen=True)
class Missing:
    """One thing that is not in place.

    Attributes:
        rule: the first rule that would fail for it.
        sentence: what it is, and what to do.
    """

    rule: str
    sentence: str


def missing(experiment: Experiment, folder: Path) -> list[Missing]:
    """Everything that an experiment whose results go to `folder` lacks; what was built already needs nothing."""
    found: list[Missing] = []
    prepared = (folder / "data/manifest.json").is_file()
    if not prepared and isinstance(experiment.data, FilesData):
        found += [Missing("prepare", text) for text in _sources(experiment.data)]
        found += [Missing("prepare", text) for text in _benchmarks(experiment, experiment.data)]
    if prepared and isinstance(experiment.data, FilesData) and experiment.data.benchmarks is not None:
        found += [
            Missing("evaluate", text) for text in _changed(Path(experiment.data.benchmarks), folder / "data/benchmarks")
        ]
    models = {
        "fetch_teacher": (experiment.teacher, "teacher", folder / "teacher/model"),
        "fetch_baseline": (
            experiment.student, "student",
            folder / student_folder("baseline", "bf16", experiment.baseline_seeds[0]) / "model",
        ),
    }  # fmt: skip
    configs: dict[str, dict[str, Any]] = {}
    for recipe, precision, seed in experiment.students():
        release = experiment.release(recipe, precision)
        if release and not (folder / student_folder(recipe, precision, seed) / "model/manifest.json").is_file():
            role = f"recipes.{recipe}.released.{precision}"
            found += [Missing("fetch_released", text) for text in model_problems(experiment, release, role, {})]
    for rule, (model, role, fetched) in models.items():
        if model.pretrained is None or (fetched / "manifest.json").is_file():
            continue
        found += [Missing(rule, text) for text in model_problems(experiment, model, role, configs)]
    found += [Missing("evaluate", text) for text in _harness(experiment)]
    if not prepared:
        found += [Missing("prepare", text) for text in _disk(experiment, folder, configs)]
    return found


def _sources(data: FilesData) -> Iterator[str]:
    """Conversations, and the folders of their images."""
    seen: set[str] = set()
    for number, source in enumerate(data.sources):
        path = Path(source.path)
        if not path.exists():
            yield (
                f"{path}: no such file or folder; copy the conversations there, or correct data.sources[{number}].path"
            )
        elif path.is_file() and not path.stat().st_size:
            yield f"{path}: is empty; copy the conversations again"
        for key, folder in [("images", source.images), *(("links_into", into) for into in source.links_into)]:
            if folder is not None and folder not in seen and not Path(folder).is_dir():
                seen.add(folder)
                yield f"{folder}: no such folder; copy the images there, or correct data.sources[{number}].{key}"


def _changed(own: Path, copies: Path) -> Iterator[str]:
    """The user's benchmark files that are not what was prepared: answers would be to the old questions."""
    for copy in sorted(file for file in copies.rglob("*") if file.is_file()):
        file = own / copy.relative_to(copies)
        if file.is_file() and known_sha256(file) != known_sha256(copy):
            yield (
                f"{file}: is not what `prepare` copied to {copy}, which is asked; put the old file back, or make the "
                "data and what learns from it again: snakemake --forcerun prepare"
            )


def _benchmarks(experiment: Experiment, data: FilesData) -> Iterator[str]:
    """A file for each benchmark and protocol, with the columns that are read and the questions that are asked."""
    names = experiment.evaluation.benchmarks
    if data.benchmarks is None:
        yield (
            f"data.benchmarks: is not set; give the folder that has {names[0]}.parquet or .tsv (see docs/evaluation.md)"
        )
        return
    folder = Path(data.benchmarks)
    if not folder.is_dir():
        yield f"{folder}: no such folder; copy the benchmarks there, or correct data.benchmarks"
        return
    for name in names:
        for protocol in experiment.evaluation.protocols(name):
            path = benchmark_file(folder, protocol, name)
            if path is None:
                yield (
                    f"{folder / name}.parquet: no such benchmark file (nor .tsv, nor a folder of shards); copy it there"
                )
                continue
            yield from _columns(path, spec(protocol, name), experiment.evaluation.limit)


def _columns(path: Path, asked: Spec, limit: int | None) -> Iterator[str]:
    rows = None
    if path.suffix == ".tsv":
        with path.open(encoding="utf-8", errors="replace") as file:
            columns = file.readline().rstrip("\r\n").split("\t")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        try:
            about = [pq.ParquetFile(file) for file in files]
            columns, rows = about[0].schema_arrow.names, sum(file.metadata.num_rows for file in about)
        except (OSError, pa.ArrowException) as error:
            yield f"{path}: not a readable Parquet file ({reason(error)}); copy the data set again"
            return
    wanted: dict[str, tuple[str, ...]] = {"question": ("question",)}
    if not asked.hidden:
        wanted["answer"] = ANSWERS
    if asked.rows == "with_image":
        wanted["image"] = IMAGES
    for about, names in wanted.items():
        if not set(names) & set(columns):
            yield f"{path}: column {about} is missing; make it a copy of the official data set"
    if rows is not None and limit is None and asked.rows == "all" and rows != asked.size:
        yield (
            f"{path}: {rows:,} rows, but this protocol asks {asked.size:,}; copy the split that it asks, or set "
            "evaluation.limit, which tables then say"
        )


def _harness(experiment: Experiment) -> Iterator[str]:
    """The packages and checkouts that questions are asked through."""
    evaluation = experiment.evaluation
    harnesses = [evaluation.harness] + (["lm-eval"] if evaluation.language else [])
    for name in dict.fromkeys(harnesses):
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            yield f"evaluation.harness: {name} is not installed; {INSTALL[name]}"
    if evaluation.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        yield VLLM
    if evaluation.harness == "vlmeval":
        checkout = evaluation.vlmeval_checkout
        if checkout is None:
            yield "evaluation.vlmeval_checkout: is not set; give the folder of a VLMEvalKit checkout"
        elif not (Path(checkout) / "vlmeval").is_dir():
            yield f"{checkout}: no checkout of VLMEvalKit; correct evaluation.vlmeval_checkout"
    for task in evaluation.language:
        if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
            yield f"{task}: no such file; correct evaluation.language"


def _disk(experiment: Experiment, folder: Path, configs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What the experiment leaves behind, estimated from below, fits the disk."""
    needed = sum(
        _bytes(path) * (1 if role == "teacher" else len(experiment.students()))
        for role, path in (("teacher", experiment.teacher.pretrained), ("student", experiment.student.pretrained))
        if path is not None
    )
    width = _width(configs.get("teacher", {}))
    if isinstance(experiment.data, FilesData) and width and experiment.cache.format == "hidden":
        texts = sum(
            Path(source.path).stat().st_size for source in experiment.data.sources if Path(source.path).is_file()
        )
        needed += texts // TOKEN_BYTES * BF16 * width
    place = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        yield (
            f"{folder}: needs at least {needed / 1e9:,.0f} GB for the teacher's cache and the students, and {place} "
            f"has {free / 1e9:,.0f} GB free; make room, or link the folder to a larger disk"
        )


def _bytes(model: str) -> int:
    folder = Path(model)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0


def _width(config: dict[str, Any]) -> int:
    width = (config.get("text_config") or {}).get("hidden_size") or config.get("hidden_size")
    return width if isinstance(width, int) else 0
