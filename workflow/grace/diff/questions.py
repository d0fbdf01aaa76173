"""Predictions of many models, read so that the questions that they share are read once.

A benchmark's files repeat the same questions for every model, and equal columns written by the same library are equal
bytes. So the bytes of a file's question columns are held against those that were read before, and only a file with
others is decoded in full. Two trees of the paper's size are then read in about two seconds instead of a minute.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from grace.errors import GraceError
from grace.results.read import read_predictions

KEYS = ("sample_id", "image_id", "target", "prompt_hash")


@dataclass(frozen=True, eq=False)
class Questions:
    """The questions of a predictions file.

    Attributes:
        frame: image_id, target and prompt_hash by sample_id, sorted by it.
        images: [questions] number of each question's image; equal images have equal numbers in every benchmark.
        order: [questions] place of each question in the file.
        stored: the key columns' bytes in the file.
    """

    frame: pd.DataFrame
    images: np.ndarray
    order: np.ndarray
    stored: tuple[bytes, ...]


@dataclass(frozen=True)
class Shared:
    """What several files ask in common, with equal right answers; see `Reader.shared`.

    Attributes:
        samples: their sample ids, sorted.
        places: per file, where they are in its sorted questions.
        images: [questions] as in `Questions`.
        targets: [questions].
        added, removed: questions that only the second side or only the first has.
        reworded: questions of `samples` with another prompt. redefined: questions with another right answer.
    """

    samples: np.ndarray
    places: list[np.ndarray]
    images: np.ndarray
    targets: np.ndarray
    added: int
    removed: int
    reworded: int
    redefined: int


class Reader:
    """Reads predictions; keeps the questions of each benchmark, and what sets of them have in common."""

    def __init__(self) -> None:
        self._known: dict[str, list[Questions]] = {}
        self._images: dict[str, int] = {}
        self._shared: dict[tuple[int, ...], Shared] = {}

    def read(self, path: Path) -> tuple[Questions, np.ndarray]:
        """The questions of a file and the points of their answers [questions], 0 to 100, sorted by sample_id.

        A `GraceError` names a missing or damaged file, or what is wrong in it.
        """
        file, stored = _stored(path)
        for known in self._known.get(path.stem, []):
            if file is not None and known.stored == stored:
                with suppress(OSError, ValueError):  # a damaged page, which `read_predictions` names
                    scores = file.read(columns=["score"], use_threads=False)["score"].to_numpy()
                    if len(scores) == len(known.order) and np.isfinite(scores).all():
                        return known, 100 * scores[known.order]
        frame = read_predictions(path, [*KEYS, "score"])
        ids = pq.read_table(path, columns=["sample_id"])["sample_id"].to_pandas()
        order = ids.sort_values(kind="stable").index.to_numpy()
        codes, labels = pd.factorize(frame["image_id"])
        numbers = np.array([self._images.setdefault(str(label), len(self._images)) for label in labels], dtype=int)
        for name in ("target", "prompt_hash"):
            if name not in frame:
                raise GraceError(f"{path}: column {name} is missing; evaluate this model again")
        about = frame.set_index("sample_id")
        found = Questions(about[["image_id", "target", "prompt_hash"]], numbers[codes], order, stored)
        self._known.setdefault(path.stem, []).append(found)
        return found, 100 * about["score"].to_numpy(dtype=float)

    def shared(self, before: list[Questions], after: list[Questions]) -> Shared:
        """What every file of two sides has in common; the sides are compared by their first files."""
        key = tuple(map(id, (*before, *after)))
        if key not in self._shared:
            self._shared[key] = _shared(before, after)
        return self._shared[key]


def answers(path: Path, samples: np.ndarray) -> list[str]:
    """What a model said to these questions, in their order."""
    table = pq.read_table(path, columns=["sample_id", "prediction"], filters=[("sample_id", "in", list(samples))])
    said = dict(zip(*(table[name].to_pylist() for name in ("sample_id", "prediction")), strict=True))
    return [said[sample] for sample in samples]


def _shared(before: list[Questions], after: list[Questions]) -> Shared:
    old, new = before[0].frame, after[0].frame
    if all(each is before[0] for each in (*before, *after)):
        every = np.arange(len(old))
        places = [every] * (len(before) + len(after))
        samples, targets = old.index.to_numpy(), old["target"].to_numpy()
        return Shared(samples, places, before[0].images, targets, 0, 0, 0, 0)
    common = old.index
    for each in (*before, *after):
        common = common.intersection(each.frame.index)
    redefined = (old.loc[common, "target"] != new.loc[common, "target"]).to_numpy()
    kept = common[~redefined]
    places = [each.frame.index.get_indexer(kept) for each in (*before, *after)]
    return Shared(
        kept.to_numpy(), places, before[0].images[places[0]], new.loc[kept, "target"].to_numpy(),
        added=len(new.index.difference(old.index)),
        removed=len(old.index.difference(new.index)),
        reworded=int((old.loc[kept, "prompt_hash"] != new.loc[kept, "prompt_hash"]).sum()),
        redefined=int(redefined.sum()),
    )  # fmt: skip


def _stored(path: Path) -> tuple[pq.ParquetFile | None, tuple[bytes, ...]]:
    """A file, and its key columns' bytes; None and () where it has no such columns or cannot be read."""
    try:
        whole = pq.ParquetFile(path)
        about = whole.metadata
        names = about.schema.to_arrow_schema().names
        columns = [names.index(name) for name in KEYS]
        parts = []
        with path.open("rb") as file:
            for group in range(about.num_row_groups):
                for column in columns:
                    chunk = about.row_group(group).column(column)
                    start = chunk.dictionary_page_offset or chunk.data_page_offset
                    file.seek(min(start, chunk.data_page_offset))
                    parts.append(file.read(chunk.total_compressed_size))
        return whole, tuple(parts)
    except (OSError, ValueError, pa.ArrowInvalid):
        return None, ()
