"""Write the demo's data folder: training conversations, development and test questions, processor, vision tower."""

import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
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
from grace.workers import submitting

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


def _write(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    # A question table's schema tells `datasets` in its metadata which column holds encoded images.
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, compression="zstd")


class Part(NamedTuple):
    """A folder that one process makes: training conversations of these images, or a split's questions.

    Attributes:
        images: the numbers of the images that conversations are about; empty for questions.
        captions, wrong: as `training_rows` takes them.
        split, wanted, benchmarks: of the questions, so many for each of these benchmarks.
    """

    folder: Path
    data: DemoData
    images: range = range(0)
    captions: float = 0.0
    wrong: float = 0.0
    split: str = ""
    wanted: int = 0
    benchmarks: tuple[str, ...] = ()


def _make(part: Part) -> int:
    """Write a part, on one thread, which its bits depend on; how many images and questions it holds."""
    torch.set_num_threads(1)
    part.folder.mkdir(parents=True, exist_ok=True)
    processor = build_processor()
    if part.images:
        rows = training_rows(part.data, part.images, part.captions, part.wrong)
        _write(part.folder / "train.parquet", rows, TRAIN)
        processor.save_pretrained(part.folder / "processor")
        shutil.copytree(_TOWER, part.folder / "vision_tower")
        prepare_examples(part.folder, processor, part.folder / "vision_tower")
    for name in part.benchmarks:
        rows = question_rows(name, part.split, part.data.seed, part.wanted)
        _write(part.folder / f"{name}.parquet", rows, QUESTIONS.arrow_schema)
    if asked := [part.folder / f"{name}.parquet" for name in sorted(part.benchmarks)]:
        prepare_features(asked, processor, _TOWER, part.folder / "features.safetensors")
    return len(part.images) + len(asked) * part.wanted


def prepare(data: DemoData, benchmarks: list[str], out: Path, workers: int = 1) -> None:
    """Write the data folder `out`; its content depends on `data` and `benchmarks` alone, not on how many `workers` make
    it.

    It holds what the students are trained on (train.parquet, with examples.safetensors and index.arrow, which training
    reads), processor/, vision_tower/, the test questions in benchmarks/ and the development questions in
    development/benchmarks/. With `finetune_images`, pretraining/ is a folder of the same form, of other images, for
    the models that are made here.

    A `GraceError` names an unknown benchmark or a source file that cannot be read.
    """
    names = tuple(benchmarks)
    for name in names:
        find_benchmark(name)
    own = data.finetune_images or 0
    total = data.images + own + len(names) * (data.development_questions + data.benchmark_questions)
    with whole_folder(out, source=data.model_dump(), benchmarks=benchmarks) as folder:
        parts = [
            Part(
                folder / "benchmarks", data, split="test", wanted=data.benchmark_questions, benchmarks=names,
            ),
            Part(
                folder / "development/benchmarks", data, split="development", wanted=data.development_questions,
                benchmarks=names,
            ),
        ]  # fmt: skip
        if own:
            parts.append(Part(folder / PRETRAINING, data, range(data.images), CAPTION_SHARE))
            parts.append(Part(folder, data, range(data.images, data.images + own), wrong=data.label_noise))
        else:
            parts.append(Part(folder, data, range(data.images), CAPTION_SHARE, data.label_noise))
        parts = [part for part in parts if part.images or part.benchmarks]
        parts.sort(key=lambda part: len(part.images) + len(names) * part.wanted, reverse=True)  # the longest first
        with submitting(workers, "grace.demo.prepare") as submit, progress("images and questions", total) as advance:
            for made in as_completed([submit(_make, part) for part in parts]):
                advance(made.result())
        if own:
            write_json(folder / PRETRAINING / MANIFEST, {"files": list_files(folder / PRETRAINING)})
