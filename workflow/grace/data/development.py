"""The development split as examples: questions that nothing is trained on, for the loss during training."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grace.data.conversations import Conversation, asked_and_answered
from grace.data.examples import Example, Tokeniser
from grace.data.images import EncodedImage
from grace.errors import GraceError

FOLDER = "development/benchmarks"
QUESTIONS = 256  # at most; spread over the benchmarks, one behind the other


def development_examples(data: Path, processor: Any) -> list[Example]:
    """Up to `QUESTIONS` questions of `data`/development/benchmarks, asked and answered like training's.

    Raises:
        GraceError: the data has no development split.
    """
    files = sorted((data / FOLDER).glob("*.parquet"))
    table = pa.concat_tables([_read(file) for file in files]) if files else None
    if table is None or not len(table):
        raise GraceError(f"{data / FOLDER}: the data has no development split; set validate_every to null")
    rows = table.take(list(range(0, len(table), -(-len(table) // QUESTIONS)))).to_pylist()
    conversations = [
        Conversation(
            row["id"],
            (EncodedImage.from_bytes(row["id"], row["image"]["bytes"]),),
            asked_and_answered([(row["question"], row["answer"])]),
        )
        for row in rows
    ]
    return Tokeniser(processor)(conversations)


def _read(path: Path) -> pa.Table:
    with pq.ParquetFile(path) as file:
        return file.read(["id", "image", "question", "answer"])
