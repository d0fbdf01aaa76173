"""Write the demo's data folder: training conversations, development and test questions, processor, vision tower."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value

from grace.config.schema import DemoData
from grace.data import Conversation, EncodedImage, prepare_examples, prepare_features
from grace.data.conversations import SCHEMA, as_row, asked_and_answered
from grace.demo.benchmarks import find_benchmark, items
from grace.demo.images import draw_scene, encode, generator, render
from grace.demo.processor import build_processor
from grace.demo.questions import caption, conversation, mistake
from grace.demo.sources import load_sources
from grace.files import MANIFEST, list_files, whole_folder, write_json
from grace.progress import progress

TRAIN = SCHEMA.append(pa.field("sources", pa.list_(pa.string()))).append(pa.field("wrong", pa.list_(pa.bool_())))
QUESTIONS = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "image_id": Value("string"),
        "question": Value("string"),
        "answer": Value("string"),
        "options": List(Value("string")),
        "group": Value("string"),
        "sources": List(Value("string")),
    }
)
SCENE_SHARES = {"garments": 0.35, "crowd": 0.22, "text": 0.18, "keypad": 0.12, "degraded": 0.13}
"""How often each sort of image is trained on."""

CAPTION_SHARE = 0.4
"""Share of the training images that are described; the others are asked about."""

PRETRAINING = "pretraining"

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


def _write(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema, advance) -> None:
    kept = []
    for row in rows:
        kept.append(row)
        advance()
    # A question table's schema tells `datasets` in its metadata which column holds encoded images.
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(kept, schema=schema), path, compression="zstd")


def _training(folder: Path, rows: Iterable[dict[str, Any]], processor, advance) -> None:
    """What a training reads: train.parquet, its examples and index, the processor and the tower."""
    _write(folder / "train.parquet", rows, TRAIN, advance)
    processor.save_pretrained(folder / "processor")
    shutil.copytree(_TOWER, folder / "vision_tower")
    prepare_examples(folder, processor, folder / "vision_tower")


def _questions(folder: Path, split: str, names: list[str], data: DemoData, wanted: int, processor, advance) -> None:
    """One Parquet file per benchmark, and the tower's features of their images."""
    for name in names:
        _write(
            folder / f"{name}.parquet", question_rows(name, split, data.seed, wanted), QUESTIONS.arrow_schema, advance
        )
    asked = [folder / f"{name}.parquet" for name in sorted(names)]
    if asked:
        prepare_features(asked, processor, _TOWER, folder / "features.safetensors")


def prepare(data: DemoData, benchmarks: list[str], out: Path) -> None:
    """Write the data folder `out`; its content depends on `data` and `benchmarks` alone.

    It holds what the students are trained on (train.parquet, with examples.safetensors and index.arrow, which training
    reads), processor/, vision_tower/, the test questions in benchmarks/ and the development questions in
    development/benchmarks/. With `finetune_images`, pretraining/ is a folder of the same form, of other images, for
    the models that are made here.

    A `GraceError` names an unknown benchmark or a source file that cannot be read.
    """
    for name in benchmarks:
        find_benchmark(name)
    own = data.finetune_images or 0
    total = data.images + own + len(benchmarks) * (data.development_questions + data.benchmark_questions)
    processor = build_processor()
    with (
        whole_folder(out, source=data.model_dump(), benchmarks=benchmarks) as folder,
        progress("images and questions", total) as advance,
    ):
        made = training_rows(data, range(data.images), CAPTION_SHARE, 0 if own else data.label_noise)
        if own:
            _training(folder / PRETRAINING, made, processor, advance)
            write_json(folder / PRETRAINING / MANIFEST, {"files": list_files(folder / PRETRAINING)})
            made = training_rows(data, range(data.images, data.images + own), 0.0, data.label_noise)
        _training(folder, made, processor, advance)
        for place, split, wanted in (
            ("development/benchmarks", "development", data.development_questions),
            ("benchmarks", "test", data.benchmark_questions),
        ):
            _questions(folder / place, split, benchmarks, data, wanted, processor, advance)
