"""What an experiment's folder holds, as frames and arrays; a file that is missing or damaged is named, once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from grace.benchmarks.question_points import COLUMNS, SAID, UNLIKE_PERCENT, points
from grace.config.schema import Experiment
from grace.errors import GraceError, problem, reason
from grace.files import MANIFEST, read_json, read_manifest
from grace.results.predictions import about
from grace.results.statistics import Estimate, Scores, estimate

PREDICTION_COLUMNS = ("sample_id", "image_id", "score")
_BENCH = {
    "kernel": ("backend", "device", "shape", "m", "microseconds", "speedup"),
    "decode": ("model", "precision", "device", "batch", "tokens_per_second", "weight_mib", "peak_mib"),
}
_NAMES = {"backend", "device", "dtype", "shape", "model", "precision"}  # all other columns are numbers


@dataclass(frozen=True, order=True)
class Row:
    """A row of a table: one way of making a model, over all its seeds."""

    recipe: str
    precision: str

    def folder(self, seed: int) -> str:
        """Where one seed of it lives below the experiment's folder."""
        return "teacher" if self.recipe == "teacher" else f"students/{self.recipe}/{self.precision}/seed{seed}"

    def __str__(self) -> str:
        return "teacher" if self.recipe == "teacher" else f"{self.recipe} {self.precision}"


TEACHER = Row("teacher", "bf16")
BASELINE = Row("baseline", "bf16")


@dataclass
class Results:
    """One experiment's outputs. Frames are read when asked for and kept.

    Attributes:
        folder: `results/{experiment}`.
        experiment: its frozen config.
        seeds: every row with the seeds whose predictions exist, teacher and baseline first, in the config's order.
        benchmarks: names, in the config's order.
        mirrors: the paper's benchmark that each of them stands for.
        metrics: the metric of each under its protocol.
        missing: models of the experiment, or benchmarks of a model, that have no predictions (yet).
    """

    folder: Path
    experiment: Experiment
    seeds: dict[Row, tuple[int, ...]]
    benchmarks: list[str]
    mirrors: Mapping[str, str]
    metrics: Mapping[str, str]
    missing: list[str] = field(default_factory=list)
    _scores: dict = field(default_factory=dict, repr=False)
    _samples: dict = field(default_factory=dict, repr=False)
    _estimates: dict = field(default_factory=dict, repr=False)

    def form(self, benchmark: str) -> str:
        """How a benchmark's points are counted: its metric where its own paper counts otherwise than by the mean score.

        The demo's benchmarks, which only imitate those, always take the mean score.
        """
        metric = self.metrics[benchmark]
        return metric if metric in SAID and benchmark not in self.imitations else "mean"

    def benchmark_path(self, benchmark: str) -> Path:
        """Where the benchmark's file lies, if it is here."""
        return self.folder / "data" / "benchmarks" / f"{benchmark}.parquet"

    def questions_file(self, benchmark: str) -> Path | None:
        """The benchmark's file, where it is here and in this pipeline's own layout: questions with their images."""
        path = self.benchmark_path(benchmark)
        wanted = {"id", "image", "image_id", "question", "answer"}
        return path if path.is_file() and wanted <= set(pq.read_schema(path).names) else None

    @cached_property
    def imitations(self) -> frozenset[str]:
        """Benchmarks that stand for another one."""
        from grace.benchmarks.registry import BENCHMARKS

        return frozenset(name for name in self.benchmarks if name in BENCHMARKS and BENCHMARKS[name].mirrors)

    @cached_property
    def averaged(self) -> list[str]:
        """The benchmarks that the average is made of: all whose points count up to 100."""
        return [name for name in self.benchmarks if self.form(name) not in UNLIKE_PERCENT]

    def has(self, row: Row, benchmark: str) -> bool:
        """Whether every seed of a row has predictions on a benchmark."""
        return all(
            (self.folder / row.folder(seed) / "predictions" / f"{benchmark}.parquet").is_file()
            for seed in self.seeds[row]
        )

    def has_average(self, row: Row) -> bool:
        """Whether a row has every benchmark that the average is made of."""
        return bool(self.averaged) and all(self.has(row, benchmark) for benchmark in self.averaged)

    def predictions(self, row: Row, seed: int, benchmark: str, columns: list[str] | None = None) -> pd.DataFrame:
        """Per-sample predictions, sorted by sample_id; a `GraceError` names a missing or damaged file."""
        path = self.folder / row.folder(seed) / "predictions" / f"{benchmark}.parquet"
        return read_predictions(path, columns)

    def files(self, row: Row, benchmark: str | None = None, seeds: tuple[int, ...] = ()) -> tuple[str, ...]:
        """The predictions behind a row's score on one benchmark, or its average, as paths below the folder.

        `seeds`: these alone; none: all that the row has, as for the teacher always.
        """
        names = self.averaged if benchmark is None else [benchmark]
        shown = seeds if seeds and row != TEACHER else self.seeds[row]
        return tuple(f"{row.folder(seed)}/predictions/{name}.parquet" for name in names for seed in shown)

    def seed_names(self, row: Row) -> tuple[int | str, ...]:
        """What a row's seeds are paired with other rows' by; the teacher's is nobody else's."""
        return ("teacher",) if row == TEACHER else self.seeds[row]

    def scores(self, row: Row, benchmark: str) -> Scores:
        """Points [seeds, questions] of a row; all rows of a benchmark hold the same questions in the same order."""
        if (row, benchmark) not in self._scores:
            self._scores[row, benchmark] = self._read_scores(row, benchmark)
        return self._scores[row, benchmark]

    def _read_scores(self, row: Row, benchmark: str) -> Scores:
        values, images = [], None
        protocol = self.experiment.evaluation.protocols(benchmark)[0]
        for seed in self.seeds[row]:
            self._check_protocol(row, seed, benchmark, protocol)
            frame = points(self.predictions(row, seed, benchmark, list(COLUMNS)), self.form(benchmark))
            samples = frame["sample_id"].to_numpy()
            expected = self._samples.setdefault(benchmark, samples)
            if len(samples) != len(expected) or (samples != expected).any():
                raise GraceError(
                    f"{self.folder / row.folder(seed)}/predictions/{benchmark}.parquet: {len(samples)} questions that "
                    f"are not the {len(expected)} of the other models; evaluate this model again on the experiment's "
                    "benchmark file"
                )
            values.append(frame["points"].to_numpy(dtype=float))
            # by name, not by who was read first: the bootstrap draws images in the order of these numbers
            images = pd.util.hash_array(frame["image_id"].astype(str).to_numpy(dtype=object))
        assert images is not None, "a row has a seed"
        return Scores(np.stack(values), images, self.seed_names(row))

    def _check_protocol(self, row: Row, seed: int, benchmark: str, protocol: str) -> None:
        """A `GraceError` where a predictions file was made under another protocol than its column."""
        path = self.folder / row.folder(seed) / "predictions" / f"{benchmark}.parquet"
        made = about(path).get("protocol") or protocol
        if made != protocol:
            raise GraceError(
                f"{path}: was made under the protocol {made}, but this experiment's is {protocol}; evaluate this model "
                "again"
            )

    def all_scores(self, row: Row) -> list[Scores]:
        """One `Scores` per benchmark of the average."""
        return [self.scores(row, benchmark) for benchmark in self.averaged]

    def estimate(self, row: Row, benchmark: str | None = None) -> Estimate:
        """A row's score on one benchmark, or its average."""
        if (row, benchmark) not in self._estimates:
            parts = self.all_scores(row) if benchmark is None else [self.scores(row, benchmark)]
            self._estimates[row, benchmark] = estimate(parts)
        return self._estimates[row, benchmark]

    def rows(self, *precisions: str) -> list[Row]:
        """Student rows at these precisions, all of them when none is given; teacher and baseline not among them."""
        return [
            row
            for row in self.seeds
            if row not in (TEACHER, BASELINE) and (not precisions or row.precision in precisions)
        ]

    def manifest(self, row: Row, seed: int) -> dict[str, Any]:
        """The manifest of a model's predictions."""
        return read_predictions_manifest(self.folder / row.folder(seed) / "predictions")

    def training(self, row: Row, seed: int) -> pd.DataFrame:
        """The training log; a `GraceError` where there is none."""
        path = self.folder / row.folder(seed) / "train.jsonl"
        try:
            return pd.read_json(path, lines=True)
        except FileNotFoundError:
            raise GraceError(f"{path}: no such file; train this model first") from None
        except ValueError as error:
            raise GraceError(f"{path}: not a training log ({reason(error)}); train this model again") from error

    @cached_property
    def kernel(self) -> pd.DataFrame | None:
        """bench/kernel.csv, or None where the kernel benchmark was not run."""
        return read_bench(self.folder, "kernel")

    @cached_property
    def decode(self) -> pd.DataFrame | None:
        """bench/decode.csv, or None where the decoding benchmark was not run."""
        return read_bench(self.folder, "decode")


def read_results(folder: str | Path, partial: bool = False) -> Results:
    """Open `results/{experiment}`.

    With `partial`, models without predictions are left out (still running, or not pulled) and listed in `missing`;
    otherwise the first one is a `GraceError` that says how many there are.
    """
    folder = Path(folder)
    path = folder / "config" / "experiment.json"
    try:
        experiment = Experiment.model_validate(read_json(path))
    except ValidationError as error:
        raise GraceError(f"{path}: {problem(error)}; freeze the config again with this version") from error
    seeds: dict[Row, tuple[int, ...]] = {}
    missing, absent = [], []
    for row, seed in [(TEACHER, 0)] + [(Row(r, p), s) for r, p, s in experiment.students()]:
        manifest = folder / row.folder(seed) / "predictions" / MANIFEST
        if manifest.is_file():
            seeds[row] = (*seeds.get(row, ()), seed)
        else:
            missing.append(manifest)
            absent.append(f"{row} seed {seed}" if row != TEACHER else str(row))
    if missing and not (partial and seeds):
        others = f" (and {len(missing) - 1} more models lack predictions)" if len(missing) > 1 else ""
        raise GraceError(f"{missing[0]}: no such file{others}; evaluate the models first, or pull them with `dvc pull`")
    benchmarks = list(experiment.evaluation.benchmarks)
    results = Results(folder, experiment, seeds, benchmarks, *_registered(experiment), absent)
    for row in seeds:
        lacking = [name for name in benchmarks if not results.has(row, name)]
        if lacking and not partial:
            raise GraceError(
                f"{folder / row.folder(seeds[row][0])}: no predictions on {', '.join(lacking)} in every seed of this "
                "model; evaluate it again, or pull them with `dvc pull`"
            )
        results.missing += [f"{row} on {name}" for name in lacking]
    return results


def _registered(experiment: Experiment) -> tuple[dict[str, str], dict[str, str]]:
    """The paper's benchmark that each stands for, and its metric under the protocol that tables show."""
    from grace.benchmarks.protocols import spec
    from grace.benchmarks.registry import benchmark

    asked = experiment.evaluation
    mirrors = {name: benchmark(benchmark(name).mirrors or name).title for name in asked.benchmarks}
    return mirrors, {name: spec(asked.protocols(name)[0], name).metric for name in asked.benchmarks}


def read_predictions(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """A predictions file sorted by sample_id; a `GraceError` names what is missing, doubled or not a number in it."""
    try:
        with pq.ParquetFile(path) as file:  # opened once, as there are hundreds
            names = file.schema_arrow.names
            lacking = [name for name in PREDICTION_COLUMNS if name not in names]
            if lacking:
                raise GraceError(f"{path}: column {', '.join(lacking)} is missing; evaluate this model again")
            table = file.read(columns=[name for name in columns if name in names] if columns else None)
    except FileNotFoundError:
        raise GraceError(f"{path}: no such file; evaluate this model first, or pull it with `dvc pull`") from None
    except (pa.ArrowException, OSError) as error:
        raise GraceError(
            f"{path}: not a readable Parquet file ({reason(error)}); delete it and evaluate this model again"
        ) from error
    frame = table.to_pandas().sort_values("sample_id", kind="stable", ignore_index=True)
    if frame["sample_id"].duplicated().any():
        double = frame["sample_id"][frame["sample_id"].duplicated()].iloc[0]
        raise GraceError(f"{path}: sample_id {double} stands twice; give every question an id of its own")
    if "score" in frame and not np.isfinite(frame["score"].to_numpy(dtype=float)).all():
        raise GraceError(f"{path}: a score is not a number; evaluate this model again")
    return frame


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Scored(_Strict):
    questions: NonNegativeInt
    score: float
    protocol: str | None = None
    file: str | None = None
    seconds: float | None = None


class _Named(_Strict):
    file: str


class _Texts(_Named):
    results: dict[str, dict[str, float]]


class _Manifest(_Strict):
    """What is read of a manifest of predictions besides its files."""

    model: str = ""
    harness: dict[str, str] = {}
    benchmarks: dict[str, _Scored]
    protocols: dict[str, dict[str, _Named]] = {}
    language: dict[str, _Texts] = {}


def read_predictions_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of predictions; a `GraceError` where it is missing,
    or a value is not what it has to be.
    """
    value = read_manifest(folder / MANIFEST)
    try:
        _Manifest.model_validate(value)
    except ValidationError as error:
        raise GraceError(f"{folder / MANIFEST}: {problem(error)}; evaluate this model again") from None
    return value


def read_bench(folder: Path, name: Literal["kernel", "decode"]) -> pd.DataFrame | None:
    """bench/{name}.csv of an experiment's folder, or None where that benchmark was not run.

    A decode.csv has the bits of keys and values in its column `cache`: 16 in tables of before there was another.

    Raises:
        GraceError: it cannot be read, or a column is missing or holds something else than numbers.
    """
    path = folder / "bench" / f"{name}.csv"
    if not path.is_file():
        return None
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise GraceError(f"{path}: not a readable CSV file ({reason(error)}); run the benchmark again") from error
    lacking = [column for column in _BENCH[name] if column not in frame]
    if lacking:
        raise GraceError(f"{path}: column {', '.join(lacking)} is missing; run the benchmark again")
    for column in frame.columns.difference(list(_NAMES)):
        if not pd.api.types.is_numeric_dtype(frame[column]):
            raise GraceError(f"{path}: column {column} holds something that is no number; run the benchmark again")
    return frame.assign(cache=16) if name == "decode" and "cache" not in frame else frame
