"""The predictions of one model: a Parquet file per benchmark, each written whole, and a manifest that sums them up.

A file carries in its metadata the protocol it was made under, the key of what made it (model, questions, settings,
protocol, code, instructions) and the key of its answers alone. A benchmark whose file has the key that is asked for is
not asked again, so that a suite that was stopped goes on where it was; answers of the same key are scored again under
another protocol that asks the same.
"""

import json
import math
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from grace.benchmarks.extraction import Answer
from grace.benchmarks.metrics import METRICS
from grace.benchmarks.protocols import Spec
from grace.errors import GraceError, reason
from grace.files import whole_file
from grace.results.statistics import Scores, estimate

NAMED = 3  # failed rows that a message names

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
"""One row per question.

`prompt_hash` names all that the model was shown, `prediction` is the raw answer, `extracted` what the protocol takes of
it, `target` the right answer (a JSON list where several count), `score` in 0..1 what the protocol makes of these two.
`logprob` and `entropy` are in nats, null where the harness hides them.
"""


class RowsFailed(GraceError):
    """Some rows could not be asked; `rows` are the predictions of the others."""

    def __init__(self, path: Path, failed: list[tuple[str, str]], rows: pd.DataFrame) -> None:
        named = "; ".join(f"row {name} {reason}" for name, reason in failed[:NAMED])
        more = f"; and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
        super().__init__(
            f"{path}: {len(failed)} of {len(failed) + len(rows)} rows cannot be asked ({named}{more}); mend or replace "
            "them"
        )
        self.rows = rows


QUESTION_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("image_id", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("options", pa.list_(pa.string())),
        ("group", pa.string()),
    ]
)
"""A benchmark file of one's own: a row is a question about one image (`bytes`), and `id` is its own."""


def read_questions(path: Path, limit: int | None = None) -> pd.DataFrame:
    """Rows of a benchmark file of one's own, in the columns of `QUESTION_SCHEMA`, `image` as bytes.

    Raises:
        GraceError: the file or a column is missing or of another type, a row lacks something, or an id is repeated.
    """
    named = ", ".join(QUESTION_SCHEMA.names)
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in QUESTION_SCHEMA.names if name not in file.schema_arrow.names]
            if missing:
                raise GraceError(f"{path}: column {', '.join(missing)} is missing; a benchmark has {named}")
            table = file.read(columns=QUESTION_SCHEMA.names).select(QUESTION_SCHEMA.names).slice(0, limit)
        table = pa.table([_cast(path, table[field.name], field) for field in QUESTION_SCHEMA], schema=QUESTION_SCHEMA)
    except FileNotFoundError:
        raise GraceError(
            f"{path}: no such benchmark file; run `grace prepare`, or leave it out of evaluation.benchmarks"
        ) from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise GraceError(
            f"{path}: not a readable Parquet file ({reason(error)}); delete it and build the data again"
        ) from error
    rows = table.to_pandas()
    if rows.empty:
        raise GraceError(f"{path}: has no rows; build the data again")
    if rows["id"].isna().any():
        raise GraceError(f"{path}: row {int(rows['id'].isna().argmax())} has no id; every question needs its own id")
    repeated = rows["id"][rows["id"].duplicated()]
    if len(repeated):
        raise GraceError(f"{path}: id {repeated.iloc[0]} stands on more than one row; every question needs its own id")
    rows["image"] = [image["bytes"] if image else None for image in rows["image"]]
    for name in ("image", "image_id", "question", "answer"):
        lacking = rows[name].isna() | (rows[name].str.len() == 0)
        if lacking.any():
            raise GraceError(f"{path}: row {rows['id'][lacking].iloc[0]} has no {name}; add it or leave the row out")
    rows["group"] = rows["group"].fillna("")
    return rows


def _cast(path: Path, column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    try:
        return column.cast(field.type)
    except (pa.ArrowException, ValueError) as error:
        raise GraceError(
            f"{path}: column {field.name} is {column.type}, not {field.type}; build the data again"
        ) from error


def summary(protocol: str, spec: Spec, rows: pd.DataFrame, limit: int | None = None) -> dict:
    """A benchmark's numbers from its rows: the mean score (0..1) with its standard error, and the metric's others.

    Where a `limit` was asked for, `of` says how many questions the protocol has.
    """
    scores = Scores(rows["score"].to_numpy(dtype=float)[None], rows["image_id"].to_numpy())
    stderr = estimate([scores]).stderr  # infinite where there is one image
    partial = {} if limit is None else {"limit": limit, "of": spec.size}
    return {
        "protocol": protocol,
        "questions": len(rows),
        **partial,
        "metric": spec.metric,
        "score": float(rows["score"].mean()),
        "stderr": stderr if math.isfinite(stderr) else None,
        "also": METRICS[spec.metric](rows),
    }


def write_predictions(path: Path, rows: pd.DataFrame, key: str, protocol: str = "", answers: str = "") -> None:
    """Write one benchmark's predictions, whole or not at all; equal answers give equal bytes."""
    table = pa.Table.from_pandas(rows[SCHEMA.names], schema=SCHEMA, preserve_index=False)
    about = {"key": key, "protocol": protocol, "answers": answers}
    table = table.replace_schema_metadata({b"grace": json.dumps(about).encode()})
    with whole_file(path) as part:
        pq.write_table(table, part, compression="zstd")


def about(path: Path) -> dict[str, str]:
    """What a predictions file says of itself: `key`, `protocol`, `answers`; empty where it can't be read."""
    try:
        found = json.loads((pq.read_schema(path).metadata or {}).get(b"grace", b"{}"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def known_answers(folder: Path, key: str) -> dict[str, Answer]:
    """Answers by `prompt_hash` in all predictions below `folder` whose `answers_key` is `key`."""
    found: dict[str, Answer] = {}
    for path in sorted(folder.rglob("*.parquet")):
        if about(path).get("answers") == key:
            try:
                rows = read_rows(path)
            except GraceError:  # a damaged file is its own benchmark's trouble
                continue
            columns = zip(rows["prompt_hash"], rows["prediction"], rows["logprob"], rows["entropy"], strict=True)
            found |= {asked: Answer(*said) for asked, *said in columns}
    return found


def finished(path: Path, key: str) -> bool:
    """Whether predictions with this key are there, readable."""
    return about(path).get("key") == key


def read_rows(path: Path) -> pd.DataFrame:
    """The rows of a predictions file; a `GraceError` where it cannot be read."""
    try:
        return pq.read_table(path).to_pandas()
    except (OSError, ValueError) as error:
        raise GraceError(f"{path}: not readable ({reason(error)}); delete it and evaluate again") from error
