"""lmms-eval asks and scores: its official tasks on local copies of their data, around our batched runner.

A task of the paper is lmms-eval's own YAML (prompt, image, scoring) with its data set replaced by
`benchmarks/{name}.parquet`, a local copy in that data set's columns, of which only the rows at hand are in memory. The
demo's tasks are written here in the same terms. Rows are kept as the protocol `lmms-eval` of this package reads and
scores them, and every score is held against lmms-eval's own. Installed without its dependencies (`envs/lmms-eval.txt`),
lmms-eval runs in the environment of the rest.
"""

import io
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.evaluator import evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from PIL import Image, ImageFile

from grace.benchmarks.extraction import Answer, extract, normalise
from grace.benchmarks.items import Item
from grace.benchmarks.protocols import Spec
from grace.benchmarks.registry import LMMS_EVAL, Benchmark
from grace.errors import GraceError, reason
from grace.evaluate.ask import demo_items, judged, prediction
from grace.evaluate.parquet_rows import ParquetRows
from grace.evaluate.rows import read_items
from grace.evaluate.runner import Question, Runner, turns
from grace.results.predictions import SCHEMA, RowsFailed

# importing lmms-eval lets the whole process read images that are cut short as if they were whole
ImageFile.LOAD_TRUNCATED_IMAGES = False

_TEMPLATES = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
CHUNK = 512  # documents whose images are held at a time
_NOT_HERE = (
    "submission",
    "seed_all",
    "seed_video",
    "mmmu_acc_pass_at_k",
)  # metrics that need a server, a video or a file


class RunnerLMM(lmms):
    """Our runner as a model of lmms-eval.

    Attributes:
        longest: longest answer; None: the task's own.
        answers: the last task's answers by document, each with the key of what was asked.
    """

    def __init__(self, runner: Runner, advance: Callable[[int], None] = lambda steps: None) -> None:
        super().__init__()
        self.runner, self.advance = runner, advance
        self.longest: int | None = None
        self.answers: dict[int, tuple[Answer, str]] = {}

    def generate_until(self, requests) -> list[str]:
        """Answers in the order of `requests`."""
        self.answers, texts = {}, []
        for start in range(0, len(requests), CHUNK):
            part = requests[start : start + CHUNK]
            questions = [self._question(request) for request in part]
            for request, question, answer in zip(
                part, questions, self.runner.answer(questions, self.advance), strict=True
            ):
                self.answers[request.args[3]] = (answer, question.key)
                texts.append(answer.text)
        return texts

    def _question(self, request: Any) -> Question:
        context, settings, doc_to_visual, doc_id, task, split = request.args
        try:
            images = tuple(_encoded(image) for image in doc_to_visual(self.task_dict[task][split][doc_id]))
        except (AttributeError, TypeError, OSError, SyntaxError) as error:  # no image, or one that is none
            raise GraceError(
                f"lmms-eval task {task}: document {doc_id} has no readable image ({reason(error)}); mend that row"
            ) from error
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": context}]
        prompt = turns([{"role": "user", "content": parts}])
        longest = self.longest or settings.get("max_new_tokens")
        return Question(f"{task}/{doc_id}", prompt, images, longest)

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        raise GraceError("lmms-eval tasks that rank options by likelihood are not run here; use the generating task")

    def generate_until_multi_round(self, requests) -> list[str]:
        raise GraceError("lmms-eval tasks of several rounds are not run here")


def predictor(
    runner: Runner, settings, advance: Callable[[int], None]
) -> Callable[[Benchmark, Path, Spec], pd.DataFrame]:
    """What `grace evaluate` calls for each benchmark file."""
    model = RunnerLMM(runner, advance)
    manager = TaskManager(verbosity="ERROR")

    def of_file(benchmark: Benchmark, path: Path, spec: Spec) -> pd.DataFrame:
        model.longest = settings.longest(benchmark.name) or spec.new_tokens
        return predict(model, manager, benchmark, path, spec, settings.limit)

    return of_file


class LocalTask(ConfigurableTask):
    """A task over rows of a local file instead of a data set that is fetched, copied and kept whole."""

    rows: ParquetRows  # set on a subclass, because the constructor asks for the data

    def download(self, dataset_kwargs=None) -> None:
        split = self.config.test_split
        self.dataset = {split: self.rows}
        self.dataset_no_image = {split: self.rows.without_images()}


def predict(
    model: RunnerLMM, manager: TaskManager, benchmark: Benchmark, path: Path, spec: Spec, limit: int | None
) -> pd.DataFrame:
    """Run one benchmark through lmms-eval; rows of a predictions file in the file's order.

    Raises:
        GraceError: a row cannot be asked, the file lacks a column, or lmms-eval scores an answer otherwise than we do.
    """
    name = benchmark.tasks[LMMS_EVAL]
    items = list(_items(path, benchmark, spec, limit))
    if path.suffix == ".tsv":
        raise GraceError(f"{path}: lmms-eval reads Parquet; copy its data set, or use harness `grace`")
    rows = ParquetRows(path, only=("data_type", "image") if spec.rows == "image" else None)
    with tempfile.TemporaryDirectory() as scratch:
        config = _demo_task(benchmark) if benchmark.mirrors else _official_task(manager, name)
        config["dataset_kwargs"] = {}
        about = Namespace(output_path=scratch, process_with_media=True)
        aggregations = {metric["metric"]: metric["aggregation"] for metric in config["metric_list"]}
        if limit is not None:  # some aggregations take nothing but whole benchmarks
            config["metric_list"] = [{**metric, "aggregation": len} for metric in config["metric_list"]]
        try:
            task = type("Task", (LocalTask,), {"rows": rows})(config=config, model_name="grace")
            model.task_dict = {name: task.dataset}
            results: Any = evaluate(
                model, {name: task}, limit=limit, bootstrap_iters=0, cli_args=about, process_docs_parallel=1
            )
        except KeyError as error:
            raise GraceError(
                f"{path}: lmms-eval's task `{name}` needs column {error}; make it a copy of that data set"
            ) from error
        except GraceError as error:
            raise GraceError(f"{path}: {error}") from error
        samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        made = []
        for item, sample in zip(items, samples, strict=True):
            answer, asked = model.answers[sample["doc_id"]]
            extracted, score = judged(spec, item, answer.text)
            metric = next(metric for metric in aggregations if metric in sample)
            theirs = _score(sample[metric], aggregations[metric])
            if (
                score is not None and abs(theirs - score) > 1e-9 and extracted
            ):  # where nothing can be read, lmms-eval may guess
                raise GraceError(
                    f"{path}: row {item.id}: lmms-eval scores {answer.text!r} {theirs:g}, the protocol here {score:g}; "
                    "report it, with the version of lmms-eval"
                )
            made.append(prediction(item, asked, answer, extracted, score))
    return pd.DataFrame(made, columns=SCHEMA.names)


def _items(path: Path, benchmark: Benchmark, spec: Spec, limit: int | None) -> Iterator[Item]:
    """What is asked, without the images; a row that can't be asked ends it, because lmms-eval runs all or none."""
    found = demo_items(path, limit) if benchmark.mirrors else read_items(path, benchmark, spec, limit)
    for name, item in found:
        if isinstance(item, str):
            raise RowsFailed(path, [(name, item)], pd.DataFrame(columns=SCHEMA.names))
        yield replace(item, images={})


def _official_task(manager: TaskManager, name: str) -> dict[str, Any]:
    """lmms-eval's own task without what needs a network, a judge or a submission server."""
    config = load_yaml_config(manager._task_index[name]["yaml_path"], mode="full")
    config["metric_list"] = [metric for metric in config["metric_list"] if metric["metric"] not in _NOT_HERE]
    config.pop("tag", None)
    config.pop("process_docs", None)  # GQA's fetches the images; a local copy has them beside the questions
    return config


def _demo_task(benchmark: Benchmark) -> dict[str, Any]:
    """A demo benchmark in lmms-eval's terms."""
    prompt = _TEMPLATES.from_string(benchmark.prompt.removeprefix("<image>"))

    def process_results(doc: dict, results: list[str]) -> dict[str, float]:
        return {
            "exact_match": float(
                normalise(extract(benchmark.extraction, results[0].split("\n")[0])) == normalise(doc["answer"])
            )
        }

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


def _score(value: Any, aggregate: Callable) -> float:
    """A document's own score: the number the task gives it, or its aggregation over this document alone.

    MMBench numbers the shifted copies of a question from 1,000,000 on; alone, each is judged as the question itself.
    """
    if not isinstance(value, dict):
        return float(value)
    if isinstance(value.get("pred"), str):
        return float(value["pred"].lower().strip() == value["answer"].lower().strip())
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
