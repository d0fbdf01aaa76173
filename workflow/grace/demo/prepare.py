"""Write the demo's data folder: training conversations, development and test questions, processor, vision tower.

The processes that make its parts (`grace.demo.parts`) import torch and transformers; the one that hands them out does
not, or the others would wait for it.
"""

from concurrent.futures import as_completed
from pathlib import Path
from typing import NamedTuple

from grace.config.schema import DemoData
from grace.demo.benchmarks import find_benchmark
from grace.files import MANIFEST, list_files, whole_folder, write_json
from grace.progress import progress
from grace.workers import submitting

CAPTION_SHARE = 0.4
"""Share of the training images that are described; the others are asked about."""

PRETRAINING = "pretraining"


class Part(NamedTuple):
    """A folder that one process makes: training conversations of these images, or a split's questions.

    Attributes:
        images: the numbers of the images that conversations are about; empty for questions.
        captions, wrong: as `grace.demo.parts.training_rows` takes them.
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
    """Write a part; how many images and questions it holds."""
    from grace.demo.parts import write_conversations, write_questions

    if part.images:
        write_conversations(part.folder, part.data, part.images, part.captions, part.wrong)
    if part.benchmarks:
        write_questions(part.folder, part.data, part.split, part.wanted, part.benchmarks)
    return len(part.images) + len(part.benchmarks) * part.wanted


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
        with submitting(workers, "grace.demo.parts") as submit, progress("images and questions", total) as advance:
            for made in as_completed([submit(_make, part) for part in parts]):
                advance(made.result())
        if own:
            write_json(folder / PRETRAINING / MANIFEST, {"files": list_files(folder / PRETRAINING)})
