"""Images of the training data that are in a benchmark: the same bytes, or the same picture to the eye.

Two images look the same when their difference hashes differ in at most `NEAR` of 64 bits: the hash says, on a grid of
9 x 8 grey values, which of two neighbours in a row is brighter, and survives resizing and recompression but no crop.
"""

import multiprocessing
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from grace.benchmarks.files import questions_file
from grace.benchmarks.protocols import Spec, spec
from grace.benchmarks.registry import Benchmark, benchmark
from grace.data.conversations import read_images
from grace.data.images import EncodedImage
from grace.errors import GraceError
from grace.evaluate.ask import demo_items
from grace.evaluate.rows import read_items
from grace.files import write_json
from grace.results.predictions import read_rows

NEAR = 3  # bits
CHUNK = 64  # images that a worker is handed at once
_BANDS = NEAR + 1  # of 64 / _BANDS bits: hashes within NEAR bits agree in one of them


def difference_hash(image: Image.Image) -> int:
    """64 bits: whether each of 8 x 8 grey values is less bright than its right neighbour, row by row."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS), dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def _hashed(image: EncodedImage) -> tuple[str, int]:
    return image.sha256, difference_hash(image.open())


def _all_hashed(images: Iterable[EncodedImage], workers: int) -> list[tuple[str, int]]:
    if workers <= 1:
        return list(map(_hashed, images))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver")) as pool:
        return list(pool.map(_hashed, images, chunksize=CHUNK))


class TrainingImages:
    """The images of the training data, to be asked whether one is among them.

    Args:
        images: each once or more.
        workers: processes that open them.
    """

    def __init__(self, images: Iterable[EncodedImage], workers: int = 1) -> None:
        apart = {image.sha256: image for image in images}
        self.exact = set(apart)
        looks = {look for _, look in _all_hashed(apart.values(), workers)}
        self.bands: list[dict[int, list[int]]] = [{} for _ in range(_BANDS)]
        for look in looks:
            for band, part in zip(self.bands, _parts(look), strict=True):
                band.setdefault(part, []).append(look)

    def has(self, sha256: str, look: int) -> str:
        """`exact`, `near` or an empty string."""
        if sha256 in self.exact:
            return "exact"
        near = (other for band, part in zip(self.bands, _parts(look), strict=True) for other in band.get(part, ()))
        return "near" if any((look ^ other).bit_count() <= NEAR for other in near) else ""


def _parts(look: int) -> list[int]:
    width = 64 // _BANDS
    return [look >> width * band & (1 << width) - 1 for band in range(_BANDS)]


def training_images(data: Path) -> Iterator[EncodedImage]:
    """Every image of `data/train.parquet`."""
    for _, images in read_images(data / "train.parquet"):
        yield from images


def overlap(seen: TrainingImages, path: Path, entry: Benchmark, spec: Spec, limit: int | None = None) -> dict:
    """Questions of a benchmark whose images were trained on: counts, and their ids by kind.

    Images that cannot be decoded are counted and belong to neither.
    """
    found: dict[str, list[str]] = {"exact": [], "near": []}
    questions = unreadable = 0
    items = demo_items(path, limit) if entry.mirrors else read_items(path, entry, spec, limit or spec.size)
    for name, item in items:
        questions += 1
        if isinstance(item, str):
            unreadable += 1
            continue
        try:
            kinds = {seen.has(*_hashed(EncodedImage.from_bytes(name, data))) for data in item.images.values()}
        except GraceError:
            unreadable += 1
            continue
        kind = next((kind for kind in ("exact", "near") if kind in kinds), None)
        if kind:
            found[kind].append(name)
    return {
        "questions": questions,
        "unreadable": unreadable,
        **{f"{k}_count": len(v) for k, v in found.items()},
        **found,
    }


def clean_score(rows: pd.DataFrame, found: dict) -> dict[str, float | int | None]:
    """The mean score of a predictions file over all rows and over those whose images were not trained on."""
    dirty = rows["sample_id"].isin([*found["exact"], *found["near"]])
    clean = rows["score"][~dirty]
    return {
        "score": float(rows["score"].mean()),
        "clean_score": float(clean.mean()) if len(clean) else None,
        "clean_questions": len(clean),
    }


def write_overlap(
    data: Path,
    out: Path,
    asked: Mapping[str, str],
    predictions: Iterable[Path] = (),
    limit: int | None = None,
    workers: int = 1,
) -> dict:
    """Write to the JSON file `out` which questions show images of `data`/train.parquet.

    With folders of predictions also each benchmark's score over all questions and over the clean ones.

    Args:
        asked: the protocol whose questions are looked at, by benchmark.
        limit: only the first so many questions of each benchmark.
        workers: processes that open the training images.

    Raises:
        GraceError: a benchmark is unknown or its file is missing or unreadable, or a training image is.
    """
    seen = TrainingImages(training_images(data), workers)
    found = {}
    for name, protocol in asked.items():
        path = questions_file(data, name, protocol)
        found[name] = overlap(seen, path, benchmark(name), spec(protocol, name), limit)
        scores = {str(folder): folder / f"{name}.parquet" for folder in predictions}
        found[name]["models"] = {
            folder: clean_score(read_rows(path), found[name]) for folder, path in scores.items() if path.is_file()
        }
    write_json(out, {"near_bits": NEAR, "training_images": len(seen.exact), "benchmarks": found})
    return found
