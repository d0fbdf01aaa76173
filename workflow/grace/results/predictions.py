"""The predictions of one model: a Parquet file per benchmark, each written whole, and a manifest that sums them up.

A file carries the key of what made it (model, questions, settings, evaluator) in its metadata. A benchmark whose file
has the key that is asked for is not asked again, so that a suite that was stopped goes on where it was.
"""

import hashlib
import json
import math
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from grace.benchmarks.metrics import METRICS, clustered_stderr
from grace.benchmarks.registry import Benchmark
from grace.errors import GraceError
from grace.files import MANIFEST, contents_hash, sha256, whole_file

EVALUATOR = "1"
"""Changes when the same answers would be kept or scored differently; part of every key."""

SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("image_id", pa.string()),
        ("group", pa.string()),
        ("prompt_hash", pa.string()),
        ("prediction", pa.string()),
        ("extracted", pa.string()),
        ("target", pa.string()),
        ("score", pa.float64()),
        ("logprob", pa.float64()),
        ("entropy", pa.float64()),
    ]
)
"""One row per question: `score` is 0..1, `logprob` and `entropy` are in nats, null where the harness hides them."""

QUESTIONS = ("id", "image", "image_id", "question", "answer", "options", "group")


def model_hash(folder: Path) -> str:
    """`contents_hash` of a model; without a manifest, the same over the files that are there."""
    if (folder / MANIFEST).is_file():
        return contents_hash(folder / MANIFEST)
    files = {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def prediction_key(model: str, questions: str, settings: dict, harness: dict, benchmark: Benchmark) -> str:
    """What a benchmark's predictions depend on, as one SHA-256 (hex)."""
    parts = {
        "model": model, "questions": questions, "settings": settings, "harness": harness, "evaluator": EVALUATOR,
        "prompt": benchmark.prompt, "metric": benchmark.metric, "extraction": benchmark.extraction,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_questions(path: Path, limit: int | None = None) -> pd.DataFrame:
    """A benchmark file's rows; a `GraceError` names a missing file or column, a row without image, a repeated id."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise GraceError(
            f"{path}: no such benchmark file; run `grace prepare`, or leave it out of evaluation.benchmarks"
        ) from None
    except (OSError, ValueError) as error:
        raise GraceError(
            f"{path}: not a readable Parquet file ({error}); delete it and build the data again"
        ) from error
    missing = [name for name in QUESTIONS if name not in table.column_names]
    if missing:
        raise GraceError(f"{path}: column {', '.join(missing)} is missing; a benchmark has {', '.join(QUESTIONS)}")
    rows = table.select(list(QUESTIONS)).slice(0, limit).to_pandas()
    if rows.empty:
        raise GraceError(f"{path}: has no rows; build the data again")
    repeated = rows["id"][rows["id"].duplicated()]
    if len(repeated):
        raise GraceError(f"{path}: id {repeated.iloc[0]} stands on more than one row; every question needs its own id")
    rows["image"] = [image["bytes"] if image else None for image in rows["image"]]
    for name in ("image", "question", "answer"):
        if rows[name].isna().any():
            raise GraceError(
                f"{path}: row {rows['id'][rows[name].isna()].iloc[0]} has no {name}; add it or leave the row out"
            )
    return rows


def summary(benchmark: Benchmark, rows: pd.DataFrame) -> dict:
    """A benchmark's numbers from its rows: the mean score (0..1) with its standard error, and the metric's others."""
    stderr = clustered_stderr(rows["score"].tolist(), rows["image_id"].tolist())
    return {
        "questions": len(rows),
        "metric": benchmark.metric,
        "score": float(rows["score"].mean()),
        "stderr": None if math.isnan(stderr) else stderr,
        "also": METRICS[benchmark.metric](rows),
    }


def write_predictions(path: Path, rows: pd.DataFrame, key: str) -> None:
    """Write one benchmark's predictions, whole or not at all; equal answers give equal bytes."""
    table = pa.Table.from_pandas(rows[SCHEMA.names], schema=SCHEMA, preserve_index=False)
    table = table.replace_schema_metadata({b"grace": json.dumps({"key": key}).encode()})
    with whole_file(path) as part:
        pq.write_table(table, part, compression="zstd")


def finished(path: Path, key: str) -> bool:
    """Whether predictions with this key are there, readable."""
    try:
        about = json.loads((pq.read_schema(path).metadata or {}).get(b"grace", b"{}"))
    except (OSError, ValueError):
        return False
    return about.get("key") == key


def read_rows(path: Path) -> pd.DataFrame:
    """The rows of a predictions file; a `GraceError` where it cannot be read."""
    try:
        return pq.read_table(path).to_pandas()
    except (OSError, ValueError) as error:
        raise GraceError(f"{path}: not readable ({error}); delete it and evaluate again") from error
