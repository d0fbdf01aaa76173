"""One part of a data set: some records, read, checked and tokenised by one worker process, as one file.

A part depends on nothing but its records, so that any number of workers writes the same bytes, and a killed
`prepare` goes on with the parts that it lacks.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from grace.config.sections import FilesData
from grace.data.conversations import SCHEMA, Conversation, as_row
from grace.data.decode import Unreadable, decode
from grace.data.images import EncodedImage, read_regular
from grace.data.sources import BadRecord, ImageReference, Said, understand
from grace.data.sources.paths import ImageFolder
from grace.errors import GraceError
from grace.files import sha256, whole_file, write_json

ROWS = 256  # records of a part
BYTES = 16 << 20  # and encoded images at most, where they come with the records

PART = pa.schema(
    [*SCHEMA, pa.field("input_ids", pa.list_(pa.int32())), pa.field("labels", pa.list_(pa.int32())),
     pa.field("key", pa.string())]
)  # fmt: skip
"""A part's columns: `train.parquet`'s and what is tokenised; labels as in `Example`."""

TOO_LONG = "longer than max_length"


@dataclass(frozen=True)
class Task:
    """What a worker is given.

    Attributes:
        data: the experiment's `data` section.
        processor: folder of the student's processor.
        source: number of the source in `data.sources`.
        first: number of the first record in the source.
        records: as the source holds them, or the `BadRecord` that stands for one.
        target: the part's file; its description goes beside it as JSON.
    """

    data: FilesData
    processor: Path
    source: int
    first: int
    records: list[Any]
    target: Path


@dataclass
class Counts:
    """What happened to the records of a part.

    Attributes:
        skipped: records that were left out: source, record (from 0), id, reason, detail.
        notes: how often something was mended or is worth knowing.
        images: path, bytes and modification time (ns) of every image file, to see one that is replaced later.
    """

    skipped: list[dict[str, Any]] = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)
    images: list[tuple[str, int, int]] = field(default_factory=list)


@cache
def _tokeniser(processor: Path) -> Any:
    import torch

    from grace.data.examples import Tokeniser
    from grace.models import load_processor

    torch.set_num_threads(1)
    return Tokeniser(load_processor(processor))


_image_folder = cache(ImageFolder)


def make_part(task: Task) -> Path:
    """Write a part and its description; a record that cannot be trained on is listed there."""
    counts = Counts()
    read = list(_conversations(task, counts))
    rows = list(_tokenised(task, read, counts))
    counts.notes["conversations without an image"] += sum(not row["images"] for row in rows)
    counts.notes["images"] += sum(len(row["images"]) for row in rows)
    with whole_file(task.target) as part, pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, PART) as table:
        table.write_table(pa.Table.from_pylist(rows, schema=PART))
    description = {
        "sha256": sha256(task.target),
        "rows": len(rows),
        "records": len(task.records),
        "skipped": sorted(counts.skipped, key=lambda entry: entry["record"]),
        "notes": dict(sorted((+counts.notes).items())),
        "images": counts.images,
    }
    write_json(task.target.with_suffix(".json"), description)
    return task.target


def read_part(target: Path, records: int | None = None) -> dict[str, Any] | None:
    """The description of a part that is whole and whose images are still as they were; None for any other."""
    try:
        description = json.loads(target.with_suffix(".json").read_text())
        whole = sha256(target) == description["sha256"] and records in (None, description["records"])
        for path, size, modified in description["images"] if whole else ():
            found = Path(path).stat()
            whole = whole and (found.st_size, found.st_mtime_ns) == (size, modified)
    except (OSError, ValueError, KeyError):
        return None
    return description if whole else None


def _skip(task: Task, counts: Counts, record: int, name: str | None, reason: str, detail: str) -> None:
    entry = {"source": task.source, "record": record, "id": name, "reason": reason, "detail": detail}
    counts.skipped.append(entry)


def _conversations(task: Task, counts: Counts) -> Iterator[tuple[int, Conversation]]:
    """(record number, conversation with its images checked) of every record that can be trained on."""
    section = task.data.sources[task.source]
    for number, record in enumerate(task.records, task.first):
        name = None
        try:
            if isinstance(record, BadRecord):
                raise record
            said = understand(record, section.format)
            name = said.id or f"{task.source}-{number}"
            yield number, _with_images(task, name, said, counts)
        except BadRecord as error:
            if name is None and isinstance(record, dict) and isinstance(record.get("id"), (str, int)):
                name = str(record["id"])[:100].encode(errors="replace").decode()
            _skip(task, counts, number, name, error.reason, error.detail)


def _with_images(task: Task, name: str, said: Said, counts: Counts) -> Conversation:
    notes = Counter(said.notes)
    files: list[tuple[str, int, int]] = []
    images = tuple(_image(task, name, reference, notes, files) for reference in said.images)
    counts.notes += notes
    counts.images += files
    return Conversation(name, images, tuple(said.messages))


def _image(
    task: Task, name: str, reference: ImageReference, notes: Counter, files: list[tuple[str, int, int]]
) -> EncodedImage:
    """The image, decoded once to know that it can be; a `BadRecord` where it cannot."""
    data, path = reference.data, None
    if data is None:
        section = task.data.sources[task.source]
        assert reference.path is not None
        if section.images is None:
            raise BadRecord("image folder is not set", f"{reference.path[:120]}; set `images` of this source")
        inside, real = _image_folder(section.images, tuple(section.links_into)).find(reference.path)
        try:
            data = read_regular(real)
            found = Path(real).stat()
        except OSError as error:
            raise BadRecord("image cannot be read", f"{inside[:120]}: {error.strerror or error}") from None
        path = f"{task.source}/{inside}"
        files.append((real, found.st_size, found.st_mtime_ns))
    try:
        _, header = decode(data, task.data.min_pixels, task.data.max_pixels)
    except Unreadable as error:
        raise BadRecord(error.reason, f"{path or 'encoded image'}: {error}"[:300]) from None
    if header.animated:
        notes["animations of which the first frame is used"] += 1
    shape = (header.height, header.width)
    return EncodedImage(name, data if path is None else None, path, hashlib.sha256(data).hexdigest(), shape)


def _tokenised(task: Task, read: list[tuple[int, Conversation]], counts: Counts) -> Iterator[dict[str, Any]]:
    """Rows of `PART`; conversations that are too long lose their last turns, or are left out."""
    tokeniser = _tokeniser(task.processor)
    limit = task.data.max_length
    for (number, conversation), example in zip(read, _examples(tokeniser, [c for _, c in read]), strict=True):
        if not isinstance(example, str) and limit is not None and len(example.input_ids) > limit:
            conversation, example = _shortened(tokeniser, conversation, limit)
            if example is not None:
                counts.notes["conversations cut between turns to fit max_length"] += 1
        if example is None:
            _skip(task, counts, number, conversation.id, TOO_LONG, f"its first turn alone has more than {limit} tokens")
        elif isinstance(example, str):
            _skip(task, counts, number, conversation.id, "processor cannot read the conversation", example)
        elif example.supervised_tokens() == 0:
            _skip(task, counts, number, conversation.id, "no token is asked for", "")
        else:
            yield as_row(
                conversation, input_ids=example.input_ids.numpy(), labels=example.labels.numpy(), key=example.key
            )


def _examples(tokeniser: Any, conversations: list[Conversation]) -> list[Any]:
    """An `Example` for each, or the reason why there is none, such as an aspect ratio that the processor refuses."""
    if not conversations:
        return []
    try:
        return list(tokeniser(conversations))
    except (GraceError, ValueError) as error:
        if len(conversations) == 1:
            return [(str(error).splitlines() or [type(error).__name__])[0][:300]]
    return [found for one in conversations for found in _examples(tokeniser, [one])]


def _shortened(tokeniser: Any, conversation: Conversation, limit: int) -> tuple[Conversation, Any]:
    """With as many whole turns, from the first on, as fit into `limit` tokens; None where not even one does."""
    ends = [i + 1 for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    low, high, best = 0, len(ends) - 1, (conversation, None)  # the first `high` ends may fit, the first `low` do
    while low < high:
        middle = (low + high + 1) // 2
        messages = conversation.messages[: ends[middle - 1]]
        images = sum(part.type == "image" for message in messages for part in message.content)
        shorter = replace(conversation, messages=messages, images=conversation.images[:images])
        [example] = _examples(tokeniser, [shorter])
        if isinstance(example, str):
            return shorter, example
        if len(example.input_ids) <= limit:
            low, best = middle, (shorter, example)
        else:
            high = middle - 1
    return best
