"""lm-eval asks and scores: its tasks, prompts, filters and metrics around our batched runner.

A task is made from the registry as the dictionary that a YAML file of lm-eval would hold; `task_yaml` writes that file,
so that lm-eval's own command line can run the same task on the same Parquet file. In process the only difference is
where rows come from: the table is in memory already, prompts are rendered once, and a row names its image instead of
carrying it, because lm-eval copies, hashes and logs whole rows.
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, StrictUndefined
from lm_eval import utils
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from grace.benchmarks.extraction import normalise
from grace.benchmarks.protocols import Spec
from grace.benchmarks.registry import LM_EVAL, Benchmark
from grace.errors import GraceError
from grace.evaluate.lm_eval_model import RunnerLM
from grace.evaluate.runner import Runner
from grace.results.predictions import SCHEMA, read_questions

KEPT_BYTES = 1 << 24  # of a benchmark's file: rows of a larger one are read for each model anew
_TEMPLATES = Environment(undefined=StrictUndefined, keep_trailing_newline=True)

FILTERS: dict[str, list[dict]] = {
    "whole": [{"function": "take_first"}],
    "yes_no": [
        {
            "function": "regex", "fallback": "", "group_select": 0,
            "regex_pattern": r"(?is)^(?!.*\byes\b.*\bno\b)(?!.*\bno\b.*\byes\b).*\b(yes|no)\b",
        },
        {"function": "take_first"},
    ],
    "letter": [
        {
            "function": "regex", "fallback": "", "group_select": 0,
            "regex_pattern": r"^\s*(?!A\s+[a-z])\(?([A-Z])(?:[).:,\s]|$)",
        },
        {"function": "take_first"},
    ],
}  # fmt: skip
"""lm-eval's filters that do what `grace.benchmarks.extraction.EXTRACTIONS` does, by the same names."""


def task_config(benchmark: Benchmark, max_new_tokens: int) -> dict:
    """The task as lm-eval's YAML says it, without its data."""
    return {
        "task": benchmark.tasks[LM_EVAL],
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": benchmark.prompt,
        "doc_to_target": "answer",
        "doc_to_image": ["image"],
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": max_new_tokens},
        "filter_list": [{"name": benchmark.extraction, "filter": FILTERS[benchmark.extraction]}],
        "metric_list": [
            {
                "metric": "exact_match", "aggregation": "mean", "higher_is_better": True,
                "ignore_case": True, "ignore_punctuation": True,
            }
        ],
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }  # fmt: skip


def task_yaml(benchmark: Benchmark, questions: Path, max_new_tokens: int, folder: Path) -> Path:
    """Write the task for `lm_eval run --model hf-multimodal --include_path FOLDER --apply_chat_template`."""
    data = {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": str(questions.resolve())}}}
    path = folder / f"{benchmark.tasks[LM_EVAL]}.yaml"
    path.write_text(yaml.safe_dump({**task_config(benchmark, max_new_tokens), **data}, sort_keys=False))
    return path


class Documents(list):
    """A split in memory, as lm-eval reads one: rows, and which columns they have."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(self[0])


class Task(ConfigurableTask):
    """A task that keeps what its metrics make of each answer, in the order of its documents.

    lm-eval's own log of samples would cost as much as the answers: it hashes every document as indented JSON.
    """

    def __init__(self, **about: Any) -> None:
        super().__init__(**about)
        self.scored: list[dict[str, Any]] = []

    def process_results(self, doc: Any, results: Any) -> Any:
        found = super().process_results(doc, results)
        self.scored.append(found)
        return found


def documents(prompt: str, rows: pd.DataFrame) -> Documents:
    """Rows as lm-eval is given them: (prompt, answer, image), `image` being the question's id."""
    template = _TEMPLATES.from_string(prompt)
    return Documents(
        {"prompt": template.render(row), "answer": row["answer"], "image": row["id"]}
        for row in rows[["id", "question", "answer", "options", "group"]].to_dict("records")
    )


def build_task(benchmark: Benchmark, docs: Documents, max_new_tokens: int) -> Task:
    """The task over documents in memory."""
    config = {
        **task_config(benchmark, max_new_tokens),
        "doc_to_text": "prompt",
        "custom_dataset": lambda **_: {"test": docs},
    }
    logging.getLogger("lm_eval").setLevel(
        logging.ERROR
    )  # it warns of every custom dataset and of test rows as few-shot pool
    return Task(config=config)


def predictor(
    runner: Runner, settings, advance: Callable[[int], None]
) -> Callable[[Benchmark, Path, Spec], pd.DataFrame]:
    """What `grace evaluate` calls for each benchmark file."""
    lm = RunnerLM(runner, advance)

    def of_file(benchmark: Benchmark, path: Path, spec: Spec) -> pd.DataFrame:
        rows, docs = _rows(benchmark.prompt, path, settings.limit)
        try:
            return predict(lm, benchmark, rows, settings.longest(benchmark.name) or spec.new_tokens, docs)
        except GraceError as error:
            raise GraceError(f"{path}: {error}") from error

    return of_file


def _rows(prompt: str, path: Path, limit: int | None) -> tuple[pd.DataFrame, Documents]:
    """The rows of a benchmark's file and their documents; of a small file once for all models that a process asks."""
    if path.is_file() and path.stat().st_size <= KEPT_BYTES:
        return _kept(prompt, path, path.stat().st_mtime_ns, limit)
    return _read(prompt, path, limit)


def _read(prompt: str, path: Path, limit: int | None) -> tuple[pd.DataFrame, Documents]:
    rows = read_questions(path, limit)
    return rows, documents(prompt, rows)


@lru_cache(maxsize=64)
def _kept(prompt: str, path: Path, modified: int, limit: int | None) -> tuple[pd.DataFrame, Documents]:
    return _read(prompt, path, limit)


def predict(
    lm: RunnerLM, benchmark: Benchmark, rows: pd.DataFrame, max_new_tokens: int, docs: Documents | None = None
) -> pd.DataFrame:
    """Run one benchmark through lm-eval; rows of a predictions file in the order of `rows`.

    Args:
        docs: the `documents` of the rows, where they were made already.
    """
    task = build_task(benchmark, documents(benchmark.prompt, rows) if docs is None else docs, max_new_tokens)
    lm.images = dict(zip(rows["id"], rows["image"], strict=True))
    evaluate(
        lm, {"tasks": {task.task_name: task}}, apply_chat_template=True, fewshot_as_multiturn=True, bootstrap_iters=0,
        log_samples=False,
    )  # fmt: skip
    asked = sorted(task.instances, key=lambda instance: instance.doc_id)  # pyright: ignore
    answers = [lm.answers[instance.doc_id] for instance in asked]
    return pd.DataFrame(
        {
            "sample_id": rows["id"].tolist(),
            "image_id": rows["image_id"].tolist(),
            "group": rows["group"].tolist(),
            "prompt_hash": [utils.hash_string(instance.args[0]) for instance in asked],
            "prediction": [instance.resps[0] for instance in asked],
            "extracted": [normalise(instance.filtered_resps[benchmark.extraction]) for instance in asked],
            "target": rows["answer"].tolist(),
            "score": [float(scored["exact_match"]) for scored in task.scored],
            "logprob": [answer.logprob for answer in answers],
            "entropy": [answer.entropy for answer in answers],
        },
        columns=SCHEMA.names,
    )
