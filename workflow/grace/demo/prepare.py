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
from grace.demo.questions import caption, conversation
from grace.demo.sources import load_sources
from grace.files import whole_folder
from grace.progress import progress

TRAIN = SCHEMA.append(pa.field("sources", pa.list_(pa.string())))
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
DEVELOPMENT = Features({"benchmark": Value("string"), **QUESTIONS})

SCENE_SHARES = {"garments": 0.35, "crowd": 0.22, "text": 0.18, "keypad": 0.12, "degraded": 0.13}
"""How often each sort of image is trained on."""

CAPTION_SHARE = 0.4
"""Share of the training images that are described; the others are asked about."""

_TOWER = Path(__file__).parent / "data" / "tower"


def _image(name: str, image) -> dict[str, Any]:
    return {"bytes": encode(image), "path": f"{name.replace('/', '-')}.jpg"}


def training_rows(data: DemoData) -> Iterator[dict[str, Any]]:
    """One row per training image: either a caption or questions, of which none gives another's answer away.

    Never both: behind a caption, questions could be answered without looking.
    """
    sources = load_sources("train")
    for index in range(data.images):
        rng = generator(data.seed, "train", "conversations", index)
        scene = draw_scene(rng, str(rng.choice(list(SCENE_SHARES), p=list(SCENE_SHARES.values()))), sources)
        captioned = rng.random() < CAPTION_SHARE
        asked = [caption(scene, rng)] if captioned else conversation(scene, rng, data.questions_per_image)
        name = f"train/{index}"
        image = EncodedImage.from_bytes(name, encode(render(rng, scene, sources)))
        messages = asked_and_answered([(q.question, q.answer) for q in asked])
        yield as_row(Conversation(name, (image,), messages, bool(captioned)), sources=scene.source_ids(sources))


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


def prepare(data: DemoData, benchmarks: list[str], out: Path) -> None:
    """Write `train.parquet`, `development.parquet`, `benchmarks/*.parquet`, `processor/` and `vision_tower/` to `out`.

    Beside them goes `examples.safetensors`, what training reads of the conversations. The content depends on `data`
    and `benchmarks` alone. A `GraceError` names an unknown benchmark or a source file that cannot be read.
    """
    for name in benchmarks:
        find_benchmark(name)
    total = data.images + len(benchmarks) * (data.development_questions + data.benchmark_questions)
    with whole_folder(out, source=data.model_dump(), benchmarks=benchmarks) as folder:
        with progress("images and questions", total) as advance:
            _write(folder / "train.parquet", training_rows(data), TRAIN, advance)
            development = (
                {"benchmark": name, **row}
                for name in benchmarks
                for row in question_rows(name, "development", data.seed, data.development_questions)
            )
            _write(folder / "development.parquet", development, DEVELOPMENT.arrow_schema, advance)
            for name in benchmarks:
                rows = question_rows(name, "test", data.seed, data.benchmark_questions)
                _write(folder / "benchmarks" / f"{name}.parquet", rows, QUESTIONS.arrow_schema, advance)
        processor = build_processor()
        processor.save_pretrained(folder / "processor")
        shutil.copytree(_TOWER, folder / "vision_tower")
        prepare_examples(folder, processor, folder / "vision_tower")
        asked = sorted((folder / "benchmarks").glob("*.parquet"))
        if asked:
            prepare_features(asked, processor, folder / "vision_tower", folder / "benchmarks" / "features.safetensors")
