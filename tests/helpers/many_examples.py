"""Data folders of any size in the form that `prepare` writes, from a few conversations that come again and again."""

import hashlib
from itertools import islice, repeat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from some_conversations import picture

from grace.data import Conversation, EncodedImage
from grace.data.conversations import SCHEMA, as_row, asked_and_answered
from grace.data.examples import Tokeniser
from grace.data.images import FOLDERS
from grace.data.index import FILE, IndexWriter
from grace.data.mix import ExampleWriter
from grace.data.tokenise import PART
from grace.demo.processor import build_processor
from grace.files import sha256, write_json, write_manifest

GROUP = 1024
WORDS = ("what", "colour", "is", "the", "shirt", "and", "bag", "on", "left", "of")


def kinds(images: Path, count: int, turns: int) -> list[Conversation]:
    """Different conversations about one image each, in files below `images`."""
    images.mkdir(parents=True)
    found = []
    for number in range(count):
        image = picture(f"{number}", number)
        (images / f"{number}.png").write_bytes(image.read())
        said = [(" ".join(WORDS[(number + i + j) % 10] for j in range(8)), "red " * (1 + i)) for i in range(turns)]
        shown = EncodedImage(f"{number}", None, str(images / f"{number}.png"), image.sha256)
        found.append(Conversation(f"{number}", (shown,), asked_and_answered(said)))
    return found


def write_many(folder: Path, conversations: int, turns: int = 4, different: int = 16) -> None:
    """Make `folder` a data folder of so many conversations, each with an id and a key of its own."""
    processor = build_processor()
    some = kinds(folder.with_name(f"{folder.name}-images"), different, turns)
    rows = []
    for conversation, example in zip(some, Tokeniser(processor)(some), strict=True):
        ids, labels = example.input_ids.to(torch.int32).numpy(), example.labels.to(torch.int32).numpy()
        row = as_row(conversation, input_ids=ids, labels=labels, key="")
        row["images"][0]["path"] = f"0/{conversation.id}.png"
        rows.append(row)
    folder.mkdir(parents=True)
    processor.save_pretrained(folder / "processor")
    whole = [rows[number % different] for number in range(conversations % different)]
    tokens = sum(len(row["input_ids"]) for row in rows) * (conversations // different)
    tokens += sum(len(row["input_ids"]) for row in whole)
    train, index = folder / "train.parquet", folder / FILE
    group = pa.Table.from_pylist(list(islice((row for again in repeat(rows) for row in again), GROUP)), schema=PART)
    with ExampleWriter(folder / "examples.safetensors", conversations, tokens) as examples:
        with pq.ParquetWriter(train, SCHEMA) as table, IndexWriter(index) as lines:
            for start in range(0, conversations, GROUP):
                part = group.slice(0, min(GROUP, conversations - start)).combine_chunks()
                names = [f"c{number}" for number in range(start, start + len(part))]
                keys = [hashlib.sha256(name.encode()).hexdigest() for name in names]
                part = part.set_column(0, "id", pa.array(names)).set_column(
                    part.schema.get_field_index("key"), "key", pa.array(keys)
                )
                table.write_table(part.select(SCHEMA.names).cast(SCHEMA))
                lines.add(part)
                examples.add(part)
        examples.finish(sha256(train), sha256(index))
    write_json(folder / FOLDERS, {"0": str(folder.with_name(f"{folder.name}-images"))})
    write_manifest(folder)
