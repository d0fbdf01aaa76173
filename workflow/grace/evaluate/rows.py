"""Benchmark files as found in the wild, read row by row into `Item`s: Parquet in the columns of lmms-lab's copies on
the hub (one file, or a folder of shards), and VLMEvalKit's TSV. Nothing but the rows at hand is held in memory.

A row that cannot be asked does not stop the others: it comes out as a reason.
"""

import ast
import base64
import binascii
import hashlib
import json
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from grace.benchmarks.files import ANSWERS
from grace.benchmarks.items import Item
from grace.benchmarks.protocols import Spec
from grace.benchmarks.registry import Benchmark
from grace.errors import GraceError
from grace.evaluate.raw_rows import raw_rows

_IDS = ("index", "id", "question_id", "questionId")  # POPE's question_id starts anew with each poll
_CATEGORY = ("category", "question_type", "subtask")
_SUBCATEGORY = ("subcategory", "l2-category", "l2_category", "L2-category")
_CHOICES = ("choices", "options")
_NUMBERED = tuple(f"image_{number}" for number in range(1, 8))
_OTHERS = (
    "image", "question", "hint", "split", "data_type", "ocr_tokens", "question_type", "image_path", "set_id",
    "figure_id", "visual_input", "question_id", *(f"choice_{letter}" for letter in "abcd"),
)  # fmt: skip
COLUMNS = {*_IDS, *ANSWERS, *_CATEGORY, *_SUBCATEGORY, *_CHOICES, *_NUMBERED, *_OTHERS, *string.ascii_uppercase}
YES_NO = ("pope", "pope_lmms", "mme", "hallusion")  # metrics of benchmarks whose answers are yes or no


def read_items(path: Path, entry: Benchmark, spec: Spec, limit: int | None = None) -> Iterator[tuple[str, Item | str]]:
    """(name of the row, item, or why it can't be asked) of every row that the protocol asks, in the file's order.

    Raises:
        GraceError: the file is not readable, has no questions, or has other rows than the protocol asks (with a `limit`
            only the first so many are looked at).
    """
    seen: set[str] = set()
    asked_of: Counter[str] = Counter()  # questions of each of MME's images
    count = 0
    for place, raw in enumerate(_apart(raw_rows(path, COLUMNS), spec)):
        if limit is not None and count == limit:
            return
        try:
            if not _selected(raw, spec):
                continue
            item: Item | str = _item(raw, place, spec, asked_of)
            name = item.id
        except (ValueError, TypeError) as error:
            item, name = str(error), str(place)
        if name in seen and not isinstance(item, str):
            item = "has the id of an earlier row; every question needs its own"
        seen.add(name)
        count += 1
        yield name, item
    if limit is None and count != spec.size:
        hearsay = " (a count that was not verified at its source)" if "size" in spec.unverified else ""
        raise GraceError(
            f"{path}: {count:,} questions, but {entry.title} has {spec.size:,}{hearsay} under this protocol; copy all "
            "of the split that it asks, or set evaluation.limit, which tables then say"
        )
    if count == 0:
        raise GraceError(f"{path}: has no rows that this protocol asks; copy the data set again")


def _apart(rows: Iterator[dict], spec: Spec) -> Iterator[dict]:
    """VLMEvalKit's POPE has a question of several polls once, and counts it in each."""
    for raw in rows:
        polls = str(raw.get("category") or "").split(",") if spec.metric == "pope" else ()
        if len(polls) < 2:
            yield raw
            continue
        for poll in map(str.strip, polls):
            yield {**raw, "index": f"{raw.get('index')}/{poll}", "category": poll}


def _selected(raw: dict, spec: Spec) -> bool:
    """Whether the protocol's `rows` takes this one."""
    if spec.rows == "image":
        return raw.get("data_type") in (None, "image")
    if spec.rows == "validation":
        named = raw.get("split") or str(raw.get("id") or "").split("_")[0]
        return str(named) == "validation"
    if spec.rows == "with_image":
        return any(raw.get(name) is not None for name in ("image", *_NUMBERED))
    return True


def _text(raw: dict, *names: str) -> str:
    """The first of these columns that has something, as text; empty where none does."""
    for name in names:
        value = raw.get(name)
        if value is None or (isinstance(value, float) and pd.isna(value)):
            continue
        if not isinstance(value, str | int | float):
            raise ValueError(f"has a {name} that is no text")
        return str(value)
    return ""


def _item(raw: dict, place: int, spec: Spec, asked_of: Counter[str]) -> Item:
    question = _text(raw, "question")
    if not question.strip():
        raise ValueError("has no question")
    images = _images(raw)
    options = _options(raw)
    if options and spec.lists_options is False:
        raise ValueError("has its options apart, which this protocol's prompt never shows; copy the data set it asks")
    if not options and spec.lists_options:
        raise ValueError("has no options, which this protocol's prompt lists; copy the data set it asks")
    shown = hashlib.sha256(b"".join(images[n] for n in sorted(images))).hexdigest() if images else ""
    columns = {"category": _CATEGORY, "subcategory": _SUBCATEGORY}
    return Item(
        id=_identity(raw, place, spec, asked_of),
        images=images,
        image_id=_pair(raw, spec) or shown,
        question=question,
        options=options,
        hint=_missing_to_empty(_text(raw, "hint")),
        target=_target(raw, options, spec),
        group="/".join(_text(raw, *columns[column]) for column in spec.group),
        words=tuple(str(word) for word in _list(raw.get("ocr_tokens")) or ()),
    )


def _missing_to_empty(text: str) -> str:
    return "" if text == "nan" else text


def _identity(raw: dict, place: int, spec: Spec, asked_of: Counter[str]) -> str:
    """The data set's own id; MME's names the image, so its questions are numbered."""
    if spec.metric == "hallusion" and raw.get("set_id") is not None:
        names = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id")
        return "_".join(_text(raw, name) for name in names)
    named = _text(raw, *_IDS) or str(place)
    if spec.metric == "mme" and "index" not in raw:
        image = f"{_text(raw, 'category')}/{named}"
        asked_of[image] += 1
        if asked_of[image] > 2:
            raise ValueError("is a third question about its image; MME asks two")
        return f"{image}/{asked_of[image]}"
    if spec.metric == "circular" and not named.isdigit():
        raise ValueError(f"has index {named}, which is no number; MMBench counts a question's orders by it")
    return named


def _pair(raw: dict, spec: Spec) -> str:
    """MME's two questions of an image share its name."""
    return _text(raw, "image_path", "question_id") if spec.metric == "mme" else ""


def _list(value: Any) -> list | None:
    """A list, or text that spells one; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def _options(raw: dict) -> dict[str, str]:
    """Choices by letter, from columns A, B, ..., a list, or choice_a, choice_b, ..."""
    lettered = {x: _text(raw, x) for x in string.ascii_uppercase if x in raw}
    if lettered:
        return {x: text for x, text in lettered.items() if text and text != "nan"}
    name = next((name for name in _CHOICES if raw.get(name) not in (None, "")), "")
    listed = _list(raw[name]) if name else None
    if name and listed is None:
        raise ValueError(f"has {name} that are no list: {str(raw[name])[:80]}")
    if listed is None and "choice_a" in raw:
        listed = [_text(raw, f"choice_{x}") for x in "abcd"]
    if listed is None:
        return {}
    if len(listed) > len(string.ascii_uppercase):
        raise ValueError(f"has {len(listed)} options, more than there are letters")
    return {x: str(text) for x, text in zip(string.ascii_uppercase, listed, strict=False)}


def _given(value: Any) -> list:
    """An answer's cell as a list: annotators' answers, or itself alone."""
    listed = _list(value)
    return [value] if listed is None else [each.get("answer") if isinstance(each, dict) else each for each in listed]


def _said(answer: Any) -> bool:
    """Whether there is an answer: test splits have null, NaN or empty text in its place."""
    return answer is not None and answer == answer and str(answer).strip() != ""


def _target(raw: dict, options: dict[str, str], spec: Spec) -> str | None:
    """The right answer as files of predictions keep it; None where the data set hides it.

    Raises:
        ValueError: the row's answer is none that its question can have, or is missing where it is needed.
    """
    value = next((raw[name] for name in ANSWERS if any(map(_said, _given(raw.get(name))))), None)
    if spec.hidden:
        if value is not None:
            raise ValueError("has an answer, but this protocol asks a split whose answers are hidden; copy that split")
        return None
    if value is None:
        raise ValueError("has no answer, as in splits whose answers are hidden; copy the split that this protocol asks")
    listed = _list(value) is not None
    if listed and options:
        raise ValueError("has several answers beside its options; a choice has one")
    if listed:
        return json.dumps([str(answer) for answer in _given(value)], ensure_ascii=False)
    text = _text({"answer": value}, "answer")
    if spec.metric in YES_NO:
        said = {"1": "yes", "0": "no"}.get(text.strip(), text.strip().lower().removesuffix("."))
        if said not in ("yes", "no"):
            raise ValueError(f"has the answer {text!r}, which is neither yes nor no")
        return said
    if options:
        letter = text.strip()
        if letter not in options and letter.isdecimal() and int(letter) < len(options):
            letter = list(options)[int(letter)]
        if letter not in options:
            raise ValueError(f"has the answer {text!r}, which is none of its options {', '.join(options)}")
        return letter
    if spec.placing != "first" and spec.rows == "validation":  # MMMU's open questions, marked as such by a list
        return json.dumps([text], ensure_ascii=False)
    return text


def _images(raw: dict) -> dict[int, bytes]:
    cells = [raw.get(name) for name in _NUMBERED] if raw.get("image") is None else [raw["image"]]
    if len(cells) == 1:
        cells = _list(cells[0]) or cells
    return {number: _bytes(cell) for number, cell in enumerate(cells, 1) if cell is not None}


def _bytes(cell: Any) -> bytes:
    """An encoded image: as the hub's Parquet files keep it, as bytes, or in base64."""
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    if isinstance(cell, str):
        try:
            cell = base64.b64decode(cell.partition("base64,")[2] or cell, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("has an image that is not valid base64") from None
    if not isinstance(cell, bytes) or not cell:
        raise ValueError("has an image without content")
    return cell
