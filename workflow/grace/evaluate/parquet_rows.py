"""Rows of a Parquet file in any order, as lmms-eval's tasks ask for them, with only a few images in memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from grace.errors import GraceError, reason
from grace.evaluate.raw_rows import ROWS, shards

_IMAGE = datasets.Image()


def _is_image(kind: pa.DataType) -> bool:
    """The hub's form of an image, or a list of it."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_image(kind.value_type)
    return pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}


class ParquetRows:
    """A split: length, rows by number, and which columns there are. Images come decoded, one batch being held.

    Args:
        path: a file, or a folder of shards in the order of their names.
        only: a column and the value that rows must have in it.
        images: whether rows have their images.
    """

    def __init__(self, path: Path, only: tuple[str, str] | None = None, images: bool = True) -> None:
        self.path, self.only, self.images = path, only, images
        try:
            self.files = [pq.ParquetFile(shard, pre_buffer=False) for shard in shards(path)]
            schema = self.files[0].schema_arrow
            self.shown = [field.name for field in schema if _is_image(field.type)]
            words = [name for name in schema.names if name not in self.shown]
            self.words = pa.concat_tables([file.read(columns=words) for file in self.files])
        except (OSError, ValueError, pa.ArrowException) as error:
            raise GraceError(
                f"{path}: not a readable Parquet file ({reason(error)}); copy the data set again"
            ) from error
        self.rows = [
            row for row, value in enumerate(self.words[only[0]].to_pylist()) if value == only[1]
        ] if only and only[0] in words else list(range(self.words.num_rows))  # fmt: skip
        if not self.rows:
            raise GraceError(f"{path}: has no rows; copy the data set again")
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._held: pa.RecordBatch | None = None
        self._start, self._next = 0, 0

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys([*self.words.column_names, *(self.shown if self.images else [])])

    def without_images(self) -> "ParquetRows":
        return ParquetRows(self.path, self.only, images=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        found = self.words.slice(row, 1).to_pylist()[0]
        if self.images and self.shown:
            found |= {name: _decoded(value) for name, value in self._image(row).items()}
        return found

    def _image(self, row: int) -> dict[str, Any]:
        """The image columns of a row; cheap where rows are asked for in their order."""
        if self._held is None or row < self._start:
            self._batches = (
                batch for file in self.files for batch in file.iter_batches(batch_size=ROWS, columns=self.shown)
            )
            self._held, self._start, self._next = None, 0, 0
        while self._held is None or row >= self._next:
            held = self._held = next(self._batches)
            self._start, self._next = self._next, self._next + held.num_rows
        return self._held.slice(row - self._start, 1).to_pylist()[0]


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    return None if value is None else _IMAGE.decode_example(value)
