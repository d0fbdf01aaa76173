"""VLMEvalKit asks and scores: its data sets, prompts, inference loop and exact-matching evaluation around our runner.

VLMEvalKit is not on the package index: it is used from a checkout (`evaluation.vlmeval_checkout`, at the commit that
the registry names), in an environment of its own (`envs/vlmeval.txt`), from which `grace evaluate` is then called. A
benchmark of the paper is VLMEvalKit's own TSV as `benchmarks/{name}.tsv`; the demo's are written in that form here.

Its loop asks one question at a time, so our model answers a data set as a batch first and the loop looks answers up.
No LLM judges: `exact_matching`, with which an answer that cannot be read is wrong.
"""

import base64
import hashlib
import os
import ssl
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from grace.benchmarks.extraction import EXTRACTIONS, Answer, normalise
from grace.benchmarks.registry import VLMEVAL, Benchmark
from grace.errors import GraceError
from grace.evaluate.runner import Question, Runner
from grace.results.predictions import SCHEMA, read_questions

MODEL = "grace"  # VLMEvalKit reuses predictions by model name, so every benchmark works in a new folder


def predictor(runner: Runner, settings, advance: Callable[[int], None]) -> Callable[[Benchmark, Path], pd.DataFrame]:
    """What `grace evaluate` calls for each benchmark file."""
    sys.path.insert(0, str(Path(settings.vlmeval_checkout).resolve()))
    verified = ssl._create_default_https_context
    try:
        from vlmeval.vlm.base import BaseModel
    except ImportError as error:
        raise GraceError(
            f"{settings.vlmeval_checkout}: VLMEvalKit does not import here ({error}); pip install -r envs/vlmeval.txt "
            "and the checkout's requirements.txt in an environment of its own, and call grace evaluate from it"
        ) from error
    finally:
        ssl._create_default_https_context = verified  # importing VLMEvalKit turns the check of certificates off
    model = _model_class(BaseModel)(runner, advance)
    return lambda benchmark, path: predict(model, benchmark, path, settings.limit)


def _model_class(base: type) -> type:
    """Our runner as a model of VLMEvalKit."""

    class RunnerVLM(base):
        INTERLEAVE = False  # one image; VLMEvalKit's own rule picks the first where there are more

        def __init__(self, runner: Runner, advance: Callable[[int], None]) -> None:
            super().__init__()
            self.runner, self.advance = runner, advance
            self.answers: dict[
                tuple[str, str], tuple[Answer, str]
            ] = {}  # (text, image's path) -> answer, prompt's hash

        def answer_all(self, messages: list[list[dict]], dataset: str) -> list[tuple[Answer, str]]:
            """Answer all messages as a batch and remember them; also the SHA-256 of each rendered prompt."""
            keys = [self.message_to_promptimg(message, dataset=dataset) for message in messages]
            questions = []
            for text, image in keys:
                said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
                questions.append(Question(image, self.runner.render(said), Path(image).read_bytes()))
            hashes = [hashlib.sha256(question.prompt.encode()).hexdigest() for question in questions]
            found = list(zip(self.runner.answer(questions, self.advance), hashes, strict=True))
            self.answers = dict(zip(keys, found, strict=True))
            return found

        def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
            return self.answers[self.message_to_promptimg(message, dataset=dataset)][0].text

    return RunnerVLM


def predict(model: Any, benchmark: Benchmark, path: Path, limit: int | None) -> pd.DataFrame:
    """Run one benchmark through VLMEvalKit; rows of a predictions file in the data set's order."""
    from vlmeval.inference import infer_data_job
    from vlmeval.smp import load

    name = benchmark.tasks[VLMEVAL]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"LMUData": scratch, "PRED_FORMAT": "tsv"}  # its default, XLSX, refuses control characters
        dataset = (
            _demo_dataset(benchmark, path, name, Path(scratch))
            if benchmark.mirrors
            else _official_dataset(path, name, Path(scratch))
        )
        if limit is not None:
            dataset.data = dataset.data.iloc[:limit]
        asked = dataset.data.copy()
        found = model.answer_all([dataset.build_prompt(row) for _, row in asked.iterrows()], name)
        infer_data_job(model, scratch, MODEL, dataset)
        (file,) = Path(scratch).glob(f"{MODEL}_{name}.*")
        said = load(str(file))
        if [str(index) for index in said["index"]] != [str(index) for index in asked["index"]]:
            raise GraceError(f"{path}: VLMEvalKit returned other rows than it was asked; give every row its own index")
        scored = _scored(dataset, benchmark, str(file), asked, [answer.text for answer, _ in found])
        images = [hashlib.sha256(str(image).encode()).hexdigest() for image in asked["image"]]
    columns = asked.get("image_id", pd.Series(images, index=asked.index))
    groups = asked.get("category", asked.get("l2-category", pd.Series("", index=asked.index))).astype(object)
    return pd.DataFrame(
        {
            "sample_id": asked.get("id", asked["index"]).astype(str).tolist(),
            "image_id": columns.tolist(),
            "group": ["" if pd.isna(group) else str(group) for group in groups],
            "prompt_hash": [prompt for _, prompt in found],
            "prediction": [answer.text for answer, _ in found],
            "extracted": [extracted for extracted, _ in scored],
            "target": asked["answer"].astype(str).tolist(),
            "score": [float(score) for _, score in scored],
            "logprob": [answer.logprob for answer, _ in found],
            "entropy": [answer.entropy for answer, _ in found],
        },
        columns=SCHEMA.names,
    )


def _official_dataset(path: Path, name: str, root: Path) -> Any:
    """VLMEvalKit's own data set on a local copy of its TSV; another copy than the pinned one would be downloaded over."""
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
            right = [s for _, s in _exactly(benchmark, data["prediction"].astype(str), data["answer"].astype(str))]
            return {"Overall": 100 * sum(right) / len(right)}

    return GraceDataset(name)


def _exactly(benchmark: Benchmark, said, targets) -> list[tuple[str, float]]:
    extract = EXTRACTIONS[benchmark.extraction]
    pairs = [(normalise(extract(text)), normalise(target)) for text, target in zip(said, targets, strict=True)]
    return [(one, float(one == other)) for one, other in pairs]


def _scored(
    dataset: Any, benchmark: Benchmark, file: str, asked: pd.DataFrame, said: list[str]
) -> list[tuple[str, float]]:
    """(extracted, score) of every row, as VLMEvalKit's own evaluation of the predictions in `file` judges it."""
    from vlmeval.smp import get_intermediate_file_path, load

    if benchmark.mirrors:
        return _exactly(benchmark, said, asked["answer"].astype(str))
    dataset.evaluate(file, model="exact_matching", nproc=1)
    if benchmark.metric == "circular":
        from vlmeval.utils import can_infer

        letters = [can_infer(text, _options(row)) or "" for text, (_, row) in zip(said, asked.iterrows(), strict=True)]
        return [(letter, float(letter == answer)) for letter, answer in zip(letters, asked["answer"], strict=True)]
    if dataset.TYPE == "MCQ":
        kept = load(get_intermediate_file_path(file, "_exact_matching_result"))
        hits = dict(zip(kept["index"].astype(str), kept["hit"], strict=True))
        return [
            (EXTRACTIONS["letter"](text), hits[str(index)]) for text, index in zip(said, asked["index"], strict=True)
        ]
    if dataset.TYPE == "Y/N":
        kept = load(get_intermediate_file_path(file, "_auxmatch"))
        return [(str(word).lower(), score) for word, score in zip(kept["extracted"], kept["score"], strict=True)]
    if benchmark.metric == "contains":
        return [(text, _contains(text, row)) for text, (_, row) in zip(said, asked.iterrows(), strict=True)]
    from vlmeval.dataset.utils.vqa_eval import process_line

    method = "accuracy" if benchmark.metric == "exact_match" else "vqa_score"
    judged = []
    for text, (_, row) in zip(said, asked.iterrows(), strict=True):
        answers = str(row["answers"] if "answers" in row else row["answer"])
        line = process_line({"answer": answers, "prediction": text}, method=method)
        judged.append((line["pred"], sum(line["match"]) / len(line["match"])))
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
