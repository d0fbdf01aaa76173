"""VLMEvalKit asks and scores: its data sets, prompts, inference loop and exact-matching evaluation around our runner.

VLMEvalKit is not on the package index: it is used from a checkout (`evaluation.vlmeval_checkout`, at the commit that
the registry names), in an environment of its own (`envs/vlmeval.txt`), from which `grace evaluate` is then called. A
benchmark of the paper is VLMEvalKit's own TSV as `benchmarks/{name}.tsv`; the demo's are written in that form here.

Its loop asks one question at a time, so our model answers a data set as a batch first and the loop looks answers up.
No LLM judges: `exact_matching`, with which an answer that cannot be read is wrong. Rows are kept as the protocol
`vlmevalkit` of this package reads and scores them, and every score is held against VLMEvalKit's own.
"""

# VLMEvalKit is a checkout that is found at run time.
# pyright: reportMissingImports=false

import base64
import os
import ssl
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from grace.benchmarks.extraction import Answer, extract, normalise
from grace.benchmarks.items import Item
from grace.benchmarks.protocols import Spec
from grace.benchmarks.registry import VLMEVAL, Benchmark
from grace.errors import GraceError, reason
from grace.evaluate.ask import demo_items, judged, prediction
from grace.evaluate.rows import read_items
from grace.evaluate.runner import Question, Runner, turns
from grace.results.predictions import SCHEMA, RowsFailed, read_questions

CHUNK = 512  # questions whose images are held at a time
MODEL = "grace"  # VLMEvalKit reuses predictions by model name, so every benchmark works in a new folder


def predictor(
    runner: Runner, settings, advance: Callable[[int], None]
) -> Callable[[Benchmark, Path, Spec], pd.DataFrame]:
    """What `grace evaluate` calls for each benchmark file."""
    sys.path.insert(0, str(Path(settings.vlmeval_checkout).resolve()))
    verified = ssl._create_default_https_context
    try:
        from vlmeval.vlm.base import BaseModel
    except ImportError as error:
        raise GraceError(
            f"{settings.vlmeval_checkout}: VLMEvalKit does not import here ({reason(error)}); pip install -r "
            "envs/vlmeval.txt and the checkout's requirements.txt in an environment of its own, and call grace "
            "evaluate from it"
        ) from error
    finally:
        ssl._create_default_https_context = verified  # importing VLMEvalKit turns the check of certificates off
    model = _model_class(BaseModel)(runner, advance)

    def of_file(benchmark: Benchmark, path: Path, spec: Spec) -> pd.DataFrame:
        model.longest = settings.longest(benchmark.name) or spec.new_tokens
        return predict(model, benchmark, path, spec, settings.limit)

    return of_file


def _model_class(base: type) -> type:
    """Our runner as a model of VLMEvalKit."""

    class RunnerVLM(base):
        INTERLEAVE = True  # images in their places, several where there are several

        def __init__(self, runner: Runner, advance: Callable[[int], None]) -> None:
            super().__init__()
            self.runner, self.advance = runner, advance
            self.longest: int | None = None
            self.answers: dict[tuple, str] = {}  # message -> answer

        def answer_all(self, messages: list[list[dict]]) -> list[tuple[Answer, str]]:
            """Answer all messages and remember them; also the key of what each asked.
            Images are held a chunk at a time.
            """
            found = []
            for start in range(0, len(messages), CHUNK):
                questions = [self._question(message) for message in messages[start : start + CHUNK]]
                answers = self.runner.answer(questions, self.advance)
                found += [(answer, question.key) for answer, question in zip(answers, questions, strict=True)]
            said = (answer.text for answer, _ in found)
            self.answers = dict(zip(map(_key, messages), said, strict=True))
            return found

        def _question(self, message: list[dict]) -> Question:
            parts = [
                {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["value"]}
                for part in message
            ]
            paths = [part["value"] for part in message if part["type"] == "image"]
            prompt = turns([{"role": "user", "content": parts}])
            return Question(str(paths[:1]), prompt, tuple(Path(path).read_bytes() for path in paths), self.longest)

        def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
            return self.answers[_key(message)]

    return RunnerVLM


def _key(message: list[dict]) -> tuple:
    return tuple((part["type"], part["value"]) for part in message)


def predict(model: Any, benchmark: Benchmark, path: Path, spec: Spec, limit: int | None) -> pd.DataFrame:
    """Run one benchmark through VLMEvalKit; rows of a predictions file in the data set's order.

    Raises:
        GraceError: a row cannot be asked, VLMEvalKit drops or adds rows, or it scores an answer otherwise than we do.
    """
    from vlmeval.inference import infer_data_job
    from vlmeval.smp import load

    name = benchmark.tasks[VLMEVAL]
    items = _items(path, benchmark, spec, limit)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"LMUData": scratch, "PRED_FORMAT": "tsv"}  # its default, XLSX, refuses control characters
        dataset = (
            _demo_dataset(benchmark, path, name, Path(scratch))
            if benchmark.mirrors
            else _official_dataset(path, name, Path(scratch))
        )
        if spec.rows == "validation":  # its copy holds the development rows, too
            dataset.data = dataset.data[dataset.data["split"] == "validation"].reset_index(drop=True)
        # POPE's row of several polls is a question in each of them
        names = [str(n) if benchmark.mirrors else item.id.split("/")[0] for n, item in enumerate(items)]
        if limit is not None:
            dataset.data = dataset.data[[str(index) in names for index in dataset.data["index"]]]
        asked = dataset.data.copy()
        row_of = {str(index): row for row, index in enumerate(asked["index"])}
        if len(row_of) != len(asked) or row_of.keys() != set(names):
            raise GraceError(f"{path}: VLMEvalKit asks other rows than the protocol here; copy the TSV again")
        found = model.answer_all([dataset.build_prompt(row) for _, row in asked.iterrows()])
        infer_data_job(model, scratch, MODEL, dataset)
        (file,) = Path(scratch).glob(f"{MODEL}_{name}.*")
        said = load(str(file))
        if [str(index) for index in said["index"]] != [str(index) for index in asked["index"]]:
            raise GraceError(f"{path}: VLMEvalKit returned other rows than it was asked; give every row its own index")
        texts = [answer.text for answer, _ in found]
        theirs = _scored(dataset, benchmark, spec, str(file), asked, texts) if limit is None else [None] * len(texts)
    rows = []
    for item, name in zip(items, names, strict=True):
        (answer, key), score_there = found[row_of[name]], theirs[row_of[name]]
        extracted, score = judged(spec, item, answer.text)
        if score_there is not None and score is not None and abs(score_there - score) > 1e-9:
            raise GraceError(
                f"{path}: row {item.id}: VLMEvalKit scores {answer.text!r} {score_there:g}, the protocol here "
                f"{score:g}; report it, with the commit of the checkout"
            )
        rows.append(prediction(item, key, answer, extracted, score))
    return pd.DataFrame(rows, columns=SCHEMA.names)


def _items(path: Path, benchmark: Benchmark, spec: Spec, limit: int | None) -> list[Item]:
    """What is asked, without the images; a row that can't be asked ends it, because VLMEvalKit runs all or none."""
    if path.suffix != ".tsv" and not benchmark.mirrors:
        raise GraceError(f"{path}: VLMEvalKit reads TSV; copy its file, or use harness `grace`")
    found = list(demo_items(path, limit) if benchmark.mirrors else read_items(path, benchmark, spec, limit))
    failed = [(name, item) for name, item in found if isinstance(item, str)]
    if failed:
        raise RowsFailed(path, failed, pd.DataFrame(columns=SCHEMA.names))
    return [replace(item, images={}) for _, item in found if not isinstance(item, str)]


def _official_dataset(path: Path, name: str, root: Path) -> Any:
    """VLMEvalKit's own data set on a local copy of its TSV;
    another copy than the pinned one would be downloaded over.
    """
    from vlmeval.dataset import SUPPORTED_DATASETS, build_dataset
    from vlmeval.dataset.image_base import ImageBaseDataset
    from vlmeval.smp import md5

    if name not in SUPPORTED_DATASETS:
        raise GraceError(
            f"{path}: this checkout of VLMEvalKit has no data set `{name}`; check out the registry's commit"
        )
    pinned = {k: v for kind in _all_kinds(ImageBaseDataset) for k, v in kind.DATASET_MD5.items()}.get(name)
    if pinned is not None and md5(str(path)) != pinned:
        raise GraceError(f"{path}: is not VLMEvalKit's copy of {name} (md5 {pinned}); download that TSV again")
    (root / f"{name}.tsv").symlink_to(path.resolve())
    return build_dataset(name)


def _all_kinds(kind: type) -> list[type]:
    return [kind, *(below for child in kind.__subclasses__() for below in _all_kinds(child))]


def _demo_dataset(benchmark: Benchmark, path: Path, name: str, root: Path) -> Any:
    """A demo benchmark as a data set of VLMEvalKit."""
    from vlmeval.dataset.image_base import ImageBaseDataset
    from vlmeval.smp import load

    rows = read_questions(path)
    table = rows.assign(
        index=range(len(rows)),
        image=[base64.b64encode(image).decode() for image in rows["image"]],
        category=rows["group"],
    )
    table = table[["index", "id", "image_id", "image", "question", "answer", "category"]]
    table.to_csv(root / f"{name}.tsv", sep="\t", index=False)

    class GraceDataset(ImageBaseDataset):
        TYPE = "VQA"

        def load_data(self, dataset: str) -> pd.DataFrame:
            return load(str(root / f"{dataset}.tsv"))

        def evaluate(self, eval_file: str, **judge_kwargs) -> dict[str, float]:
            data = load(eval_file)
            right = _exactly(benchmark, data["prediction"].astype(str), data["answer"].astype(str))
            return {"Overall": 100 * sum(right) / len(right)}

    return GraceDataset(name)


def _exactly(benchmark: Benchmark, said, targets) -> list[float]:
    pairs = [(extract(benchmark.extraction, text), target) for text, target in zip(said, targets, strict=True)]
    return [float(normalise(one) == normalise(other)) for one, other in pairs]


def _scored(
    dataset: Any, benchmark: Benchmark, spec: Spec, file: str, asked: pd.DataFrame, said: list[str]
) -> list[float]:
    """Score of every row as VLMEvalKit's own evaluation of the predictions in `file` judges it."""
    from vlmeval.smp import get_intermediate_file_path, load

    if benchmark.mirrors:
        return _exactly(benchmark, (text.split("\n")[0] for text in said), asked["answer"].astype(str))
    if spec.metric == "circular":
        from vlmeval.utils import can_infer

        pairs = zip(said, asked.iterrows(), strict=True)
        return [float(can_infer(text, _options(row)) == row["answer"]) for text, (_, row) in pairs]
    dataset.evaluate(file, model="exact_matching", nproc=1)
    if dataset.TYPE == "MCQ":
        kept = load(get_intermediate_file_path(file, "_exact_matching_result"))
        hits = dict(zip(kept["index"].astype(str), kept["hit"], strict=True))
        return [float(hits[str(index)]) for index in asked["index"]]
    if dataset.TYPE == "Y/N":
        kept = load(get_intermediate_file_path(file, "_auxmatch"))
        return [float(score) for score in kept["score"]]
    if spec.metric == "contains":
        return [_contains(text, row) for text, (_, row) in zip(said, asked.iterrows(), strict=True)]
    from vlmeval.dataset.utils.vqa_eval import process_line

    method = "accuracy" if spec.metric == "exact_match" else "vqa_score"
    judged = []
    for text, (_, row) in zip(said, asked.iterrows(), strict=True):
        answers = str(row["answers"] if "answers" in row else row["answer"])
        line = process_line({"answer": answers, "prediction": text}, method=method)
        judged.append(sum(line["match"]) / len(line["match"]))
    return judged


def _options(row: pd.Series) -> dict[str, str]:
    return {letter: row[letter] for letter in "ABCDEFGH" if letter in row and not pd.isna(row[letter])}


def _contains(said: str, row: pd.Series) -> float:
    """OCRBench: one of the answers stands in what is said; spaces do not count in formulas."""
    from ast import literal_eval

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        formula = row["category"] == "Handwritten Mathematical Expression Recognition"
        return text.replace(" ", "") if formula else text.lower()

    return float(any(plain(answer) in plain(said) for answer in literal_eval(str(row["answer"]))))
