"""Reading `train.parquet`: one row is one image with its conversation."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from grace.data.images import EncodedImage
from grace.errors import GraceError

COLUMNS = ("id", "image", "conversation")


@dataclass(frozen=True)
class Conversation:
    """One image and what is said about it.

    Attributes:
        id: unique in the file.
        image: the encoded image.
        turns: (question, answer) pairs in order.
        caption: whether it only describes the image: for models made from scratch to learn to see from.
    """

    id: str
    image: EncodedImage
    turns: tuple[tuple[str, str], ...]
    caption: bool = False


def load_conversations(path: str | Path, limit: int | None = None) -> list[Conversation]:
    """Read the conversations of a Parquet file; a `GraceError` names a missing file or column, or a broken row.

    A row is a caption where its column `caption`, which may be left out, is true.
    """
    table = _read(path, limit)
    said = table["conversation"].to_pylist()
    found = []
    for number, (image, caption, turns) in enumerate(zip(_images(path, table), _captions(table), said, strict=True)):
        if not turns:
            raise GraceError(f"{path}: row {number} (id {image.name}) has no conversation; build the data again")
        turns = tuple((turn["question"], turn["answer"]) for turn in turns)
        found.append(Conversation(image.name, image, turns, caption))
    return found


def load_images(path: str | Path) -> list[tuple[EncodedImage, bool]]:
    """Every row's image, named by the row's id, and whether it is a caption; a tenth of the time of all columns."""
    table = _read(path, None)
    return list(zip(_images(path, table), _captions(table), strict=True))


def _read(path: str | Path, limit: int | None) -> pa.Table:
    try:
        with pq.ParquetFile(path, memory_map=True) as file:  # `pq.read_table` would import pandas, half a second
            missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
            if not missing:
                wanted = [name for name in (*COLUMNS, "caption", "image_sha256") if name in file.schema_arrow.names]
                table = file.read(wanted)
                return table.slice(0, limit) if limit is not None else table
    except FileNotFoundError:
        raise GraceError(f"{path}: no such file; run `grace prepare` first") from None
    except (OSError, ValueError) as error:
        raise GraceError(f"{path}: not a readable Parquet file ({error}); delete it and build it again") from error
    raise GraceError(f"{path}: column {', '.join(missing)} is missing; it needs {', '.join(COLUMNS)}")


def _captions(table: pa.Table) -> list[bool]:
    if "caption" not in table.column_names:
        return [False] * len(table)
    return [bool(value) for value in table["caption"].to_pylist()]


def _images(path: str | Path, table: pa.Table) -> list[EncodedImage]:
    """A row's image is its `image.bytes`, or, where these are null, the file `image.path` with `image_sha256`."""
    hashes = table["image_sha256"].to_pylist() if "image_sha256" in table.column_names else [None] * len(table)
    found = []
    for number, (name, image, sha256) in enumerate(
        zip(table["id"].to_pylist(), table["image"].to_pylist(), hashes, strict=True)
    ):
        image = image or {}
        if image.get("bytes"):
            found.append(EncodedImage.from_bytes(name, image["bytes"]))
        elif image.get("path") and sha256:
            found.append(EncodedImage(name, None, image["path"], sha256))
        else:
            raise GraceError(f"{path}: row {number} (id {name}) has no image; build the data again")
    return found
