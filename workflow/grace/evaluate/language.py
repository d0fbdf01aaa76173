"""The language side: lm-eval's text-only tasks on the same model, to see whether quantisation cost it its language.

A task is one of lm-eval's own names or a YAML file in lm-eval's format; with `dataset_path: json` (or parquet, text)
and local `data_files` it needs no network. Tasks that score likelihoods run: multiple choice, perplexity.
"""

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from grace.errors import GraceError, reason
from grace.evaluate.language_tasks import content_of, is_file
from grace.files import whole_file

if TYPE_CHECKING:
    from grace.evaluate.runner import Runner

SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("sample_id", pa.string()),
        ("prompt_hash", pa.string()),
        ("metric", pa.string()),
        ("values", pa.list_(pa.float64())),
    ]
)
"""One row per text and metric: the score, or what the task's aggregate is made of (log-likelihood in nats, weight)."""


def score_text(runner: "Runner", task: str, limit: int | None) -> tuple[pd.DataFrame, dict[str, dict[str, float]]]:
    """Run one task; its rows and, by task (a name of lm-eval's may stand for several), lm-eval's own aggregates."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    from grace.evaluate.lm_eval_model import RunnerLM

    own = is_file(task)
    name = content_of(task).task if own else task
    try:
        manager = TaskManager(include_path=str(Path(task).parent) if own else None, include_defaults=not own)
        results: Any = evaluate(RunnerLM(runner), manager.load([name]), limit=limit, bootstrap_iters=0)
    except GraceError as error:
        raise GraceError(f"evaluation.language: {task}: {error}") from error
    except Exception as error:  # lm-eval and datasets raise their own kinds for a name, a file or a download
        raise GraceError(
            f"evaluation.language: lm-eval could not run `{task}` ({reason(error)}); check the name, or give a YAML "
            "file whose dataset_kwargs.data_files are on this machine"
        ) from error
    rows = []
    for found, samples in results["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                value = sample[metric]
                values = [float(v) for v in value] if isinstance(value, tuple | list) else [float(value)]
                rows.append([found, str(sample["doc_id"]), sample["prompt_hash"], metric, values])
    totals = {
        found: {re.sub(",none$", "", key): value for key, value in values.items() if _is_number(value)}
        for found, values in results["results"].items()
    }
    return pd.DataFrame(rows, columns=SCHEMA.names), totals


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def write_text_scores(path: Path, found: tuple[pd.DataFrame, dict], key: str) -> None:
    """Write one task's scores, whole or not at all."""
    rows, totals = found
    table = pa.Table.from_pandas(rows, schema=SCHEMA, preserve_index=False)
    about = json.dumps({"key": key, "results": totals})
    with whole_file(path) as part:
        pq.write_table(table.replace_schema_metadata({b"grace": about.encode()}), part, compression="zstd")


def text_summary(path: Path) -> dict:
    """What the manifest says of a task: lm-eval's aggregates, and how many texts they are over."""
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"grace"])
    texts = len({(row["task"], row["sample_id"]) for row in table.select(["task", "sample_id"]).to_pylist()})
    return {"texts": texts, "results": about["results"]}
