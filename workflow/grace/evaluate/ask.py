"""A benchmark under a protocol: rows are streamed from the file, asked in chunks through the runner, read and scored.

Nothing here belongs to one protocol: what is asked, of which rows and how it counts is all in its `Spec`. Memory is
that of a chunk of encoded images and of the answers, however large the benchmark.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from grace.benchmarks.extraction import Answer, extract, normalise
from grace.benchmarks.items import MARK, Item, show
from grace.benchmarks.protocols import Spec
from grace.benchmarks.registry import Benchmark
from grace.benchmarks.scores import SCORES
from grace.data.conversations import Message, Part
from grace.evaluate.rows import read_items
from grace.evaluate.runner import Question, Runner, Unaskable
from grace.results.predictions import SCHEMA, RowsFailed, read_questions

CHUNK_ROWS, CHUNK_BYTES = 2048, 1 << 28  # asked together; more would only pad less


def predictor(
    runner: Runner, settings, advance: Callable[[int], None]
) -> Callable[[Benchmark, Path, Spec], pd.DataFrame]:
    """What `grace evaluate` calls for each benchmark file."""
    said = cache(_user_turn)  # the same question is asked of many images

    def predict(entry: Benchmark, path: Path, spec: Spec) -> pd.DataFrame:
        limit, longest = settings.limit, settings.longest(entry.name)
        items = demo_items(path, limit) if entry.mirrors else read_items(path, entry, spec, limit)
        failed: list[tuple[str, str]] = []
        rows: list[list[Any]] = []
        for chunk in _chunks(items, failed):
            asked = []
            for item in chunk:
                try:
                    text, images = show(spec.prompt, spec.placing, item)
                except ValueError as error:
                    failed.append((item.id, str(error)))
                    continue
                tokens = longest or (spec.new_tokens if item.options else spec.new_tokens_open or spec.new_tokens)
                question = Question(item.id, said(text), tuple(images), tokens, spec.image == "pad")
                asked.append((item, question))
            rows += _answered(runner, spec, asked, failed, advance)
        found = pd.DataFrame(rows, columns=SCHEMA.names)
        if failed:
            raise RowsFailed(path, failed, found)
        return found

    return predict


def _user_turn(text: str) -> tuple[Message, ...]:
    """One user turn; each `MARK` in the text is an image."""
    parts: list[Part] = []
    for place, piece in enumerate(text.split(MARK)):
        parts += [Part("image")] if place else []
        parts += [Part("text", piece)] if piece else []
    return (Message("user", tuple(parts)),)


def _chunks(items: Iterator[tuple[str, Item | str]], failed: list[tuple[str, str]]) -> Iterator[list[Item]]:
    """Items to ask together; rows that have none go to `failed`."""
    chunk: list[Item] = []
    held = 0
    for name, item in items:
        if isinstance(item, str):
            failed.append((name, item))
            continue
        chunk.append(item)
        held += sum(map(len, item.images.values()))
        if len(chunk) == CHUNK_ROWS or held >= CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _answered(
    runner: Runner,
    spec: Spec,
    asked: list[tuple[Item, Question]],
    failed: list[tuple[str, str]],
    advance: Callable[[int], None],
) -> list[list[Any]]:
    """Rows of predictions; questions that cannot be asked go to `failed`, and the others are asked."""
    while asked:
        try:
            answers = runner.answer([question for _, question in asked], advance)
        except Unaskable as error:
            failed.append((error.question, error.reason))
            asked = [(item, question) for item, question in asked if item.id != error.question]
            continue
        return [
            prediction(item, question.key, answer, *judged(spec, item, answer.text))
            for (item, question), answer in zip(asked, answers, strict=True)
        ]
    return []


def prediction(item: Item, key: str, answer: Answer, extracted: str, score: float | None) -> list[Any]:
    """A row in the columns of `SCHEMA`; `key` names what the model was shown."""
    return [
        item.id, item.image_id, item.group, key, answer.text, extracted, item.target or "", score, answer.logprob,
        answer.entropy,
    ]  # fmt: skip


def judged(spec: Spec, item: Item, text: str) -> tuple[str, float | None]:
    """What is extracted of an answer, and its score; None where the target is hidden."""
    for stop in spec.stop:
        text = text.split(stop)[0]
    options = item.options
    if not options and item.target in ("A", "B", "C", "D"):  # options that stand in the question's text
        options = dict.fromkeys("ABCD", "")
    extracted = extract(spec.extraction, text, options, item.target or "")
    if spec.score == "normalised":
        extracted = normalise(extracted)
    return extracted, None if item.target is None else SCORES[spec.score](extracted, item.target, item.group)


def demo_items(path: Path, limit: int | None) -> Iterator[tuple[str, Item]]:
    """Rows of a demo benchmark."""
    for row in read_questions(path, limit).to_dict("records"):
        shown = {1: row["image"]}
        yield row["id"], Item(row["id"], shown, row["image_id"], row["question"], {}, "", row["answer"], row["group"])
