"""The development split as examples: questions that nothing is trained on, for the loss during training."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from grace.data.conversations import Conversation, asked_and_answered
from grace.data.examples import Example, Tokeniser
from grace.data.images import EncodedImage
from grace.errors import GraceError

FILE = "development.parquet"
QUESTIONS = 256  # at most; spread over the file, which has benchmark behind benchmark


def development_examples(data: Path, processor: Any) -> list[Example]:
    """Up to `QUESTIONS` questions of `data`/development.parquet, asked and answered like training's.

    Raises:
        GraceError: the data has no development split.
    """
    if not (data / FILE).is_file():
        raise GraceError(f"{data / FILE}: the data has no development split; set validate_every to null")
    with pq.ParquetFile(data / FILE) as file:
        table = file.read(["id", "image", "question", "answer"])
    if not len(table):
        raise GraceError(f"{data / FILE}: the development split is empty; set validate_every to null")
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
