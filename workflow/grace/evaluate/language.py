"""The language side: lm-eval's text-only tasks on the same model, to see whether quantisation cost it its language.

A task is one of lm-eval's own names or a YAML file in lm-eval's format; with `dataset_path: json` (or parquet, text)
and local `data_files` it needs no network. Tasks that score likelihoods run: multiple choice, perplexity.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import BaseModel, Field, ValidationError

from grace.errors import GraceError, reason
from grace.files import sha256, whole_file

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


def text_file(out: Path, task: str) -> Path:
    """Where the scores of a task go."""
    return out / "language" / f"{Path(task).stem}.parquet"


def text_key(model: str, task: str, limit: int | None, made_with: dict) -> str:
    """What a task's scores depend on, as one SHA-256 (hex): the model, a file of one's own with its local data, and
    `made_with`, the code and how a processor computes.
    """
    import importlib.metadata

    parts = {"model": model, "task": task, "limit": limit, "made_with": made_with}
    parts["lm-eval"] = importlib.metadata.version("lm_eval")
    if _is_file(task):
        parts |= {str(path): sha256(path) for path in (Path(task), *_data_files(task))}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


class _Data(BaseModel):
    data_files: str | list[str] | dict[str, str | list[str]] = []


class _TaskFile(BaseModel):
    """What is read here of a task file; the rest is lm-eval's."""

    task: str = Field(min_length=1)
    dataset_kwargs: _Data | None = None


def _content(task: str) -> _TaskFile:
    """A task file's own keys; lm-eval's `!function` tags are left unread.

    Raises:
        GraceError: the file is missing, is no YAML, or a key is not what lm-eval's format has there.
    """

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        return _TaskFile.model_validate(yaml.load(Path(task).read_text(encoding="utf-8"), Loader))
    except FileNotFoundError:
        raise GraceError(f"evaluation.language: {task}: no such file; give lm-eval's name or a YAML file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        raise GraceError(f"{task}: `{where}` is not as lm-eval's format asks ({first['msg']}); mend it") from None
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise GraceError(f"{task}: not valid YAML ({reason(error)}); mend it") from error


def _data_files(task: str) -> list[Path]:
    """The local files that a task reads, from where the job runs; a `GraceError` names one that is missing."""
    named = (_content(task).dataset_kwargs or _Data()).data_files
    listed = named.values() if isinstance(named, dict) else [named]
    paths = [Path(path) for entry in listed for path in ([entry] if isinstance(entry, str) else entry)]
    for path in paths:
        try:
            there = path.is_file()
        except (OSError, ValueError):  # a name that no file can have
            there = False
        if not there:
            raise GraceError(f"{task}: {str(path)[:100]}: no such file; mend dataset_kwargs.data_files")
    return paths


def score_text(runner: "Runner", task: str, limit: int | None) -> tuple[pd.DataFrame, dict[str, dict[str, float]]]:
    """Run one task; its rows and, by task (a name of lm-eval's may stand for several), lm-eval's own aggregates."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    from grace.evaluate.lm_eval_model import RunnerLM

    own = _is_file(task)
    name = _content(task).task if own else task
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
