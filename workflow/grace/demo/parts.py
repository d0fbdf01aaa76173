"""The parts of the demo's data folder: training conversations and benchmark questions, tokenised and seen."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from grace.config.schema import DemoData
from grace.data import Conversation, EncodedImage, prepare_examples, prepare_features
from grace.data.conversations import SCHEMA, as_row, asked_and_answered
from grace.demo.benchmarks import items
from grace.demo.images import draw_scene, encode, generator, render
from grace.demo.processor import build_processor
from grace.demo.questions import caption, conversation, mistake
from grace.demo.sources import load_sources

TRAIN = SCHEMA.append(pa.field("sources", pa.list_(pa.string()))).append(pa.field("wrong", pa.list_(pa.bool_())))
_TEXT = {"dtype": "string", "_type": "Value"}
_TEXTS = {"feature": _TEXT, "_type": "List"}
_FEATURES = {
    "id": _TEXT, "image": {"_type": "Image"}, "image_id": _TEXT, "question": _TEXT, "answer": _TEXT, "options": _TEXTS,
    "group": _TEXT, "sources": _TEXTS,
}  # fmt: skip
_TYPES = {
    "Value": pa.string(),
    "List": pa.list_(pa.string()),
    "Image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
}
QUESTIONS = pa.schema(
    {name: _TYPES[feature["_type"]] for name, feature in _FEATURES.items()},
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)
"""The metadata tell `datasets`, whose import takes a second, which column holds encoded images."""
SCENE_SHARES = {"garments": 0.35, "crowd": 0.22, "text": 0.18, "keypad": 0.12, "degraded": 0.13}
"""How often each sort of image is trained on."""

_TOWER = Path(__file__).parent / "data" / "tower"


def _image(name: str, image) -> dict[str, Any]:
    return {"bytes": encode(image), "path": f"{name.replace('/', '-')}.jpg"}


def training_rows(data: DemoData, numbers: range, captions: float, wrong: float = 0.0) -> Iterator[dict[str, Any]]:
    """One row per training image of these numbers: a caption or questions, of which none gives another's answer away.

    Never both: behind a caption, questions could be answered without looking.

    Args:
        captions: share of the images that are described; the others are asked about.
        wrong: share of the answers that are replaced by a wrong one of the same kind; the column `wrong` tells which.
    """
    sources = load_sources("train")
    for index in numbers:
        rng = generator(data.seed, "train", "conversations", index)
        scene = draw_scene(rng, str(rng.choice(list(SCENE_SHARES), p=list(SCENE_SHARES.values()))), sources)
        captioned = rng.random() < captions
        asked = [caption(scene, rng)] if captioned else conversation(scene, rng, data.questions_per_image)
        name = f"train/{index}"
        image = EncodedImage.from_bytes(name, encode(render(rng, scene, sources)))
        mistaken = generator(data.seed, "train", "wrong", index)
        turns = [(q.question, q.answer if mistaken.random() >= wrong else mistake(q, mistaken)) for q in asked]
        row = as_row(Conversation(name, (image,), asked_and_answered(turns), bool(captioned)))
        told = [answer != q.answer for q, (_, answer) in zip(asked, turns, strict=True)]
        yield row | {"sources": scene.source_ids(sources), "wrong": told}


def question_rows(name: str, split: str, seed: int, wanted: int) -> Iterator[dict[str, Any]]:
    """`wanted` rows of a benchmark; questions about one image share its `image_id`."""
    sources = load_sources(split)
    for item in items(name, split, seed, wanted):
        image = _image(item.id, item.image)
        for number, question in enumerate(item.questions):
            yield {
                "id": f"{item.id}-{number}",
                "image": image,
                "image_id": item.id,
                "question": question.question,
                "answer": question.answer,
                "options": list(question.options),
                "group": question.group,
                "sources": item.scene.source_ids(sources),
            }


def _write(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, compression="zstd")


def write_conversations(folder: Path, data: DemoData, images: range, captions: float, wrong: float) -> None:
    """Write conversations about the training images of these numbers, and what every training reads of them.

    On one thread, which the bits depend on.

    Args:
        captions, wrong: as `training_rows` takes them.
    """
    torch.set_num_threads(1)
    processor = build_processor()
    _write(folder / "train.parquet", training_rows(data, images, captions, wrong), TRAIN)
    processor.save_pretrained(folder / "processor")
    shutil.copytree(_TOWER, folder / "vision_tower")
    prepare_examples(folder, processor, folder / "vision_tower")


def write_questions(folder: Path, data: DemoData, split: str, wanted: int, benchmarks: tuple[str, ...]) -> None:
    """Write a split's questions, `wanted` of each benchmark, and what the tower makes of their images; on one thread
    too.
    """
    torch.set_num_threads(1)
    processor = build_processor()
    for name in benchmarks:
        _write(folder / f"{name}.parquet", question_rows(name, split, data.seed, wanted), QUESTIONS)
    asked = [folder / f"{name}.parquet" for name in sorted(benchmarks)]
    prepare_features(asked, processor, _TOWER, folder / "features.safetensors")
