"""Example questions with their image and what each model said."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from grace.errors import GraceError
from grace.report.paper import GRACE, label, row_role
from grace.results.read import BASELINE, TEACHER, Results, Row

PER_BENCHMARK = 2
MODELS = 8


@dataclass(frozen=True)
class Example:
    """One question: the encoded image, and per model its answer and whether that was right."""

    benchmark: str
    sample: str
    question: str
    target: str
    image: bytes
    answers: list[tuple[str, str, float]]  # (model, answer, score)


def shown_rows(results: Results) -> list[Row]:
    """Teacher, baseline, GRACE at every precision and the other INT4 students, at most MODELS of them."""
    experiment = results.experiment
    ours = [row for row in results.rows() if row_role(experiment, row) == GRACE]
    others = [row for row in results.rows("int4") if row not in ours]
    first = [row for row in (TEACHER, BASELINE) if row in results.seeds]
    return [*first, *ours, *others][:MODELS]


def read_benchmark(results: Results, benchmark: str, columns: list[str]) -> pd.DataFrame:
    """Columns of a benchmark file, indexed by `id`; a `GraceError` where the file is missing."""
    path = results.benchmark_path(benchmark)
    try:
        return pq.read_table(path, columns=["id", *columns]).to_pandas().set_index("id")
    except FileNotFoundError:
        raise GraceError(f"{path}: no such file; prepare the data first, or pull it with `dvc pull`") from None


def examples(results: Results) -> list[Example]:
    """Of each benchmark the first questions, by id, on which the shown models do not all score alike."""
    rows = shown_rows(results)
    found = []
    for benchmark in results.benchmarks:
        asked = [row for row in rows if results.has(row, benchmark)]
        if not asked or results.questions_file(benchmark) is None:  # partial results, or an official file
            continue
        frames: dict[Any, Any] = {
            row: results.predictions(row, results.seeds[row][0], benchmark).set_index("sample_id") for row in asked
        }
        scores = pd.DataFrame({row: frame["score"] for row, frame in frames.items()})
        split = scores.index[scores.nunique(axis=1) > 1]
        chosen = list(split[:PER_BENCHMARK]) or list(scores.index[:1])
        about: Any = read_benchmark(results, benchmark, ["image", "question"]).loc[chosen]
        for sample in chosen:
            answers = [
                (
                    f"{label(results.experiment, row)} {row.precision}",
                    str(frame.at[sample, "prediction"]),
                    float(frame.at[sample, "score"]),
                )
                for row, frame in frames.items()
            ]
            target = str(frames[asked[0]].at[sample, "target"])
            image = about.at[sample, "image"]["bytes"]
            found.append(Example(benchmark, str(sample), about.at[sample, "question"], target, image, answers))
    return found
