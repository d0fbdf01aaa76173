"""Reading and writing `train.parquet`: one row is one conversation, about any number of images or none."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from grace.data.images import EncodedImage, image_file
from grace.errors import GraceError, reason

Role = Literal["system", "user", "assistant"]

_IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string(), "sha256": pa.string()})
_PART = pa.struct({"type": pa.string(), "text": pa.string()})
_MESSAGE = pa.struct({"role": pa.string(), "content": pa.list_(_PART)})
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "images": pa.list_(_IMAGE),
        "messages": pa.list_(_MESSAGE),
        "caption": pa.bool_(),
    }
)
"""The columns of `train.parquet`; a writer may add others, which only people read."""


@dataclass(frozen=True)
class Part:
    """A piece of a message: text, or the place where the conversation's next image stands (its text is empty)."""

    type: Literal["image", "text"]
    text: str = ""


@dataclass(frozen=True)
class Message:
    """What one side says."""

    role: Role
    content: tuple[Part, ...]


@dataclass(frozen=True)
class Conversation:
    """What is said about some images.

    Attributes:
        id: unique in the file.
        images: in the order of the image parts of `messages`.
        messages: system turns anywhere, user and assistant turns in their order.
        caption: whether it only describes its image: for models made from scratch to learn to see from.
    """

    id: str
    images: tuple[EncodedImage, ...]
    messages: tuple[Message, ...]
    caption: bool = False


IMAGE = Part("image")


def asked_and_answered(turns: Sequence[tuple[str, str]], images: int = 1) -> tuple[Message, ...]:
    """(question, answer) pairs as messages, with the images before the first question."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        shown = (IMAGE,) * images if number == 0 else ()
        messages += [Message("user", (*shown, Part("text", question))), Message("assistant", (Part("text", answer),))]
    return tuple(messages)


def as_row(conversation: Conversation, **more: Any) -> dict[str, Any]:
    """The conversation as a row of `SCHEMA`, with `more` columns of the writer's own."""
    return {
        "id": conversation.id,
        "images": [{"bytes": i.data, "path": i.path, "sha256": i.sha256} for i in conversation.images],
        "messages": [
            {"role": message.role, "content": [{"type": p.type, "text": p.text} for p in message.content]}
            for message in conversation.messages
        ],
        "caption": conversation.caption,
        **more,
    }


def load_conversations(path: str | Path, limit: int | None = None) -> list[Conversation]:
    """Read the conversations of a Parquet file; a `GraceError` names a missing file or column, or a broken row."""
    found: list[Conversation] = []
    for table in _read(path, SCHEMA.names):
        if limit is not None:
            table = table.slice(0, limit - len(found))
        images = _images(path, table, len(found))
        rows = zip(images, table["messages"].to_pylist(), table["caption"].to_pylist(), strict=True)
        for number, ((name, images), said, caption) in enumerate(rows, len(found)):
            messages = tuple(
                Message(turn["role"], tuple(Part(part["type"], part["text"] or "") for part in turn["content"]))
                for turn in said or ()
            )
            problem = _problem(messages, len(images))
            if problem:
                raise GraceError(f"{path}: row {number} (id {name}) {problem}; build the data again")
            found.append(Conversation(name, images, messages, bool(caption)))
        if limit is not None and len(found) >= limit:
            break
    return found


def read_images(path: str | Path) -> Iterator[tuple[str, tuple[EncodedImage, ...]]]:
    """Every row's id and images, a row group at a time."""
    number = 0
    for table in _read(path, ["id", "images"]):
        yield from _images(path, table, number)
        number += len(table)


def _problem(messages: Sequence[Message], images: int) -> str | None:
    if not any(message.role == "assistant" for message in messages):
        return "has no answer"
    for message in messages:
        if message.role not in ("system", "user", "assistant"):
            return f"has a message of role {message.role!r}; roles are system, user and assistant"
        kinds = {part.type for part in message.content}
        if kinds - {"image", "text"}:
            return f"has a part of type {min(kinds - {'image', 'text'})!r}; types are image and text"
        if "image" in kinds and message.role != "user":
            return f"has an image in a message of role {message.role}; images stand in user messages"
    places = sum(part.type == "image" for message in messages for part in message.content)
    if places != images:
        return f"has {images} images and {places} places for them"
    return None


def _read(path: str | Path, columns: list[str]) -> Iterator[pa.Table]:
    """The file's row groups, one after the other."""
    try:
        # `pq.read_table` would import pandas, half a second; a buffer ahead would keep the whole file
        with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            missing = [name for name in SCHEMA.names if name not in file.schema_arrow.names]
            if not missing:
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group, columns)
                return
    except FileNotFoundError:
        raise GraceError(f"{path}: no such file; run `grace prepare` first") from None
    except (OSError, ValueError) as error:
        raise GraceError(
            f"{path}: not a readable Parquet file ({reason(error)}); delete it and build it again"
        ) from error
    raise GraceError(f"{path}: column {', '.join(missing)} is missing; it needs {', '.join(SCHEMA.names)}")


def _images(path: str | Path, table: pa.Table, first: int) -> list[tuple[str, tuple[EncodedImage, ...]]]:
    """Each row's id and images: an image is its `bytes`, or, where these are null, the file `path` with `sha256`.

    `first` is the number of the table's first row in the file.
    """
    found = []
    rows = zip(table["id"].to_pylist(), table["images"].to_pylist(), strict=True)
    for number, (name, images) in enumerate(rows, first):
        read = []
        for image in images or ():
            if image["bytes"]:
                read.append(EncodedImage.from_bytes(name, image["bytes"]))
            elif image["path"] and image["sha256"]:
                read.append(EncodedImage(name, None, image_file(Path(path).parent, image["path"]), image["sha256"]))
            else:
                raise GraceError(f"{path}: row {number} (id {name}) has an empty image; build the data again")
        found.append((name, tuple(read)))
    return found
