"""Reading `train.parquet`: one row is one picture with its conversation."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from grace.data.pictures import Picture
from grace.errors import GraceError

COLUMNS = ("id", "image", "conversation")


@dataclass(frozen=True)
class Conversation:
    """One picture and what is said about it.

    Attributes:
        id: unique in the file.
        image: the encoded picture.
        turns: (question, answer) pairs in order.
        caption: whether it only describes the picture: for models made from scratch to learn to see from.
    """

    id: str
    image: Picture
    turns: tuple[tuple[str, str], ...]
    caption: bool = False


def load_conversations(path: str | Path, limit: int | None = None) -> list[Conversation]:
    """Read the conversations of a Parquet file; a `GraceError` names a missing file or column, or a broken row.

    A row is a caption where its column `caption`, which may be left out, is true.
    A row's picture is its `image.bytes`, or, where these are null, the file `image.path` with the hash `image_sha256`.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise GraceError(f"{path}: no such file; run `grace prepare` first") from None
    except (OSError, ValueError) as error:
        raise GraceError(f"{path}: not a readable Parquet file ({error}); delete it and build it again") from error
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise GraceError(f"{path}: column {', '.join(missing)} is missing; it needs {', '.join(COLUMNS)}")
    rows = (table.slice(0, limit) if limit is not None else table).to_pylist()
    found = []
    for number, row in enumerate(rows):
        image = row["image"] or {}
        if image.get("bytes"):
            picture = Picture.from_bytes(row["id"], image["bytes"])
        elif image.get("path") and row.get("image_sha256"):
            picture = Picture(row["id"], None, image["path"], row["image_sha256"])
        else:
            raise GraceError(f"{path}: row {number} (id {row['id']}) has no picture; build the data again")
        if not row["conversation"]:
            raise GraceError(f"{path}: row {number} (id {row['id']}) has no conversation; build the data again")
        turns = tuple((turn["question"], turn["answer"]) for turn in row["conversation"])
        found.append(Conversation(row["id"], picture, turns, bool(row.get("caption"))))
    return found
