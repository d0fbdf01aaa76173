"""A benchmark's file, Parquet or VLMEvalKit's TSV, row by row as it stands; only the rows at hand are in memory."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from grace.errors import GraceError, reason

ROWS = 64  # read at once
_REFERENCE = 64  # VLMEvalKit: an image cell no longer than this is the index of the row that has the image


def shards(path: Path) -> list[Path]:
    """The files of a benchmark: itself, or the Parquet files of a folder in the order of their names."""
    found = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not found:
        raise GraceError(f"{path}: has no Parquet files; copy the data set again")
    return found


def raw_rows(path: Path, columns: Collection[str]) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries of those of `columns` that there are;
    a `GraceError` where a file has no readable questions.
    """
    for file in shards(path):
        try:
            yield from (_tsv if file.suffix == ".tsv" else _parquet)(file, columns)
        except (OSError, ValueError, pa.ArrowException, pd.errors.ParserError, NotImplementedError) as error:
            raise GraceError(f"{file}: not readable ({reason(error)}); copy the data set again") from error


def _parquet(path: Path, columns: Collection[str]) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path, pre_buffer=False) as file:
        names = [name for name in file.schema_arrow.names if name in columns]
        if "question" not in names:
            raise GraceError(f"{path}: column question is missing; make it a copy of the official data set")
        for batch in file.iter_batches(batch_size=ROWS, columns=names):
            yield from batch.to_pylist()


def _tsv(path: Path, columns: Collection[str]) -> Iterator[dict[str, Any]]:
    """Cells as text, those that pandas takes for missing as None, which is how both readers of this format see them."""
    held = _referenced(path)
    for part in _tsv_parts(path, lambda name: name in columns):
        if "question" not in part:
            raise GraceError(f"{path}: column question is missing; make it a copy of the official data set")
        for row in part.to_dict("records"):
            raw = {str(name): None if pd.isna(value) else value for name, value in row.items()}
            image = raw.get("image")
            if image in held:
                raw["image"] = held[image]
            yield raw


def _tsv_parts(path: Path, wanted: Callable[[str], bool]) -> Iterator[pd.DataFrame]:
    yield from pd.read_csv(path, sep="\t", dtype=str, chunksize=ROWS, usecols=wanted)


def _referenced(path: Path) -> dict[str, str]:
    """Image cells that other rows name by index."""
    wanted: set[str] = set()
    for part in _tsv_parts(path, lambda name: name == "image"):
        if "image" in part:
            wanted |= {cell for cell in part["image"].dropna() if len(cell) <= _REFERENCE}
    held = {}
    for part in _tsv_parts(path, lambda name: name in ("index", "image")) if wanted else ():
        if "index" in part:
            pairs = zip(part["index"], part["image"], strict=True)
            held |= {i: cell for i, cell in pairs if i in wanted and isinstance(cell, str) and len(cell) > _REFERENCE}
    return held
