"""lmms-eval asks and scores: its official tasks on local copies of their data, around our batched runner.

A task of the paper is lmms-eval's own YAML (prompt, image, scoring, aggregation) with its data set replaced by
`benchmarks/{name}.parquet`, a local copy in that data set's columns. The demo's tasks are written here in the same
terms. Installed without its dependencies (`envs/lmms-eval.txt`), lmms-eval runs in the environment of the rest.
"""

import hashlib
import io
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from jinja2 import Environment, StrictUndefined
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.evaluator import evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from PIL import Image, ImageFile

from grace.benchmarks.extraction import EXTRACTIONS, Answer, normalise
from grace.benchmarks.registry import LMMS_EVAL, Benchmark
from grace.errors import GraceError
from grace.evaluate.runner import Question, Runner
from grace.results.predictions import SCHEMA, read_questions

# importing lmms-eval lets the whole process read images that are cut short as if they were whole
ImageFile.LOAD_TRUNCATED_IMAGES = False

_TEMPLATES = Environment(undefined=StrictUndefined, keep_trailing_newline=True)


class RunnerLMM(lmms):
    """Our runner as a model of lmms-eval, for tasks that show one image.

    Attributes:
        answers: the last task's answers by document, and the prompt and image of each as SHA-256.
    """

    def __init__(self, runner: Runner, advance: Callable[[int], None] = lambda steps: None) -> None:
        super().__init__()
        self.runner, self.advance = runner, advance
        self.answers: dict[int, tuple[Answer, str, str]] = {}

    def generate_until(self, requests) -> list[str]:
        """Answers in the order of `requests`."""
        questions, owners = [], []
        for request in requests:
            context, _, doc_to_visual, doc_id, task, split = request.args
            try:
                images = doc_to_visual(self.task_dict[task][split][doc_id])
            except (AttributeError, TypeError, OSError, SyntaxError) as error:  # no image, or one that is none
                raise GraceError(
                    f"lmms-eval task {task}: document {doc_id} has no readable image ({error}); mend that row"
                ) from error
            if len(images) != 1:
                raise GraceError(
                    f"lmms-eval task {task}: document {doc_id} has {len(images)} images; this model takes one"
                )
            said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": context}]}]
            questions.append(Question(f"{task}/{doc_id}", self.runner.render(said), _encoded(images[0])))
            owners.append(doc_id)
        found = self.runner.answer(questions, self.advance)
        self.answers = {
            doc_id: (answer, _hash(question.prompt.encode()), _hash(question.image))
            for doc_id, answer, question in zip(owners, found, questions, strict=True)
        }
        return [answer.text for answer in found]

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        raise GraceError("lmms-eval tasks that rank options by likelihood are not run here; use the generating task")

    def generate_until_multi_round(self, requests) -> list[str]:
        raise GraceError("lmms-eval tasks of several rounds are not run here")


def predictor(runner: Runner, settings, advance: Callable[[int], None]) -> Callable[[Benchmark, Path], pd.DataFrame]:
    """What `grace evaluate` calls for each benchmark file."""
    model = RunnerLMM(runner, advance)
    manager = TaskManager(verbosity="ERROR")
    return lambda benchmark, path: predict(model, manager, benchmark, path, settings.limit)


def predict(
    model: RunnerLMM, manager: TaskManager, benchmark: Benchmark, path: Path, limit: int | None
) -> pd.DataFrame:
    """Run one benchmark through lmms-eval; rows of a predictions file in the file's order."""
    name = benchmark.tasks[LMMS_EVAL]
    _check(path)
    with tempfile.TemporaryDirectory() as scratch:
        config = _demo_task(benchmark, path) if benchmark.mirrors else _official_task(manager, name)
        config |= {
            "dataset_path": "parquet", "dataset_name": None,
            "dataset_kwargs": {"data_files": {config["test_split"]: str(path)}, "cache_dir": scratch},
        }  # fmt: skip
        about = Namespace(output_path=scratch, process_with_media=True)
        try:
            task = ConfigurableTask(config=config, model_name="grace")
            model.task_dict = {name: task.dataset}
            results = evaluate(
                model, {name: task}, limit=limit, bootstrap_iters=0, cli_args=about, process_docs_parallel=1
            )
        except KeyError as error:
            raise GraceError(
                f"{path}: lmms-eval's task `{name}` needs column {error}; make it a copy of that data set"
            ) from error
        except GraceError as error:
            raise GraceError(f"{path}: {error}") from error
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        metrics = [metric["metric"] for metric in config["metric_list"]]
        rows = [_row(sample, metrics, task, benchmark, model) for sample in samples]
    return pd.DataFrame(rows, columns=SCHEMA.names)


def _check(path: Path) -> None:
    try:
        empty = pq.read_metadata(path).num_rows == 0
    except (OSError, ValueError) as error:
        raise GraceError(f"{path}: not a readable Parquet file ({error}); copy the data set again") from error
    if empty:
        raise GraceError(f"{path}: has no rows; copy the data set again")


def _official_task(manager: TaskManager, name: str) -> dict[str, Any]:
    """lmms-eval's own task without what needs a network, a judge or a submission server."""
    config = load_yaml_config(manager._task_index[name]["yaml_path"], mode="full")
    config["metric_list"] = [metric for metric in config["metric_list"] if metric["metric"] != "submission"]
    config.pop("tag", None)
    config.pop("process_docs", None)  # GQA's fetches the images; a local copy has them beside the questions
    return config


def _demo_task(benchmark: Benchmark, path: Path) -> dict[str, Any]:
    """A demo benchmark in lmms-eval's terms."""
    read_questions(path)
    prompt, extract = (
        _TEMPLATES.from_string(benchmark.prompt.removeprefix("<image>")),
        EXTRACTIONS[benchmark.extraction],
    )

    def process_results(doc: dict, results: list[str]) -> dict[str, float]:
        return {"exact_match": float(normalise(extract(results[0])) == normalise(doc["answer"]))}

    return {
        "task": benchmark.tasks[LMMS_EVAL],
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": lambda doc: [_opened(doc["image"]).convert("RGB")],
        "doc_to_text": lambda doc, lmms_eval_specific_kwargs=None: prompt.render(doc),
        "doc_to_target": "answer",
        "process_results": process_results,
        "generation_kwargs": {"until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def _row(sample: dict, metrics: list[str], task, benchmark: Benchmark, model: RunnerLMM) -> dict[str, Any]:
    """One row from what lmms-eval logs of a document; the first metric that it reports scores the row."""
    doc, number = sample["doc"], sample["doc_id"]
    metric = next(name for name in metrics if name in sample)
    value = sample[metric]
    answer, prompt_hash, image_hash = model.answers[number]
    extracted = value.get("parsed_pred", value.get("pred")) if isinstance(value, dict) else None
    if not isinstance(extracted, str):
        extracted = normalise(EXTRACTIONS[benchmark.extraction](sample["filtered_resps"][0]))
    index = doc.get("id") if benchmark.mirrors else doc.get("index") if benchmark.metric == "circular" else number
    return {
        "sample_id": str(index),
        "image_id": doc.get("image_id") if benchmark.mirrors else image_hash,
        "group": str(doc.get("category") or doc.get("group") or doc.get("question_type") or ""),
        "prompt_hash": prompt_hash,
        "prediction": answer.text,
        "extracted": extracted,
        "target": str(sample["target"]),
        "score": _score(value, task.aggregation()[metric]),
        "logprob": answer.logprob,
        "entropy": answer.entropy,
    }


def _score(value: Any, aggregate: Callable) -> float:
    """A document's own score: the number the task gives it, or its aggregation over this document alone.

    MMBench numbers the shifted copies of a question from 1,000,000 on; alone, each is judged as the question itself.
    """
    if not isinstance(value, dict):
        return float(value)
    if "score" in value:
        return float(value["score"])
    if "index" in value:
        from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

        alone = pd.DataFrame([value])
        return float(mmbench_evaluator.eval_sub_data(alone, {value["index"]: value["answer"]}, static_only=True))
    return float(aggregate([value]))


def _opened(image: Any) -> Image.Image:
    return Image.open(io.BytesIO(image["bytes"])) if isinstance(image, dict) else image


def _encoded(image: Image.Image) -> bytes:
    """The image as PPM: lossless, and quicker to write than PNG."""
    kept = io.BytesIO()
    image.convert("RGB").save(kept, "PPM")
    return kept.getvalue()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
