"""`index.arrow`: where every conversation's images are, one row each, memory-mapped.

What training reads instead of `train.parquet`, whose rows cannot be reached one by one. Only images that are encoded in
`train.parquet` itself are read from there, a row group at a time.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from grace.data.images import EncodedImage, image_file
from grace.errors import GraceError, reason

FILE = "index.arrow"
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "caption": pa.bool_(),
        "images": pa.list_(pa.struct({"path": pa.string(), "sha256": pa.string()})),
    }
)
"""`path` as in `train.parquet`; null for an image that is encoded there."""
GROUPS_KEPT = 2  # row groups of encoded images in memory


class IndexWriter:
    """Writes the index of rows of `train.parquet`, some at a time.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._table = pa.ipc.new_file(self._file, SCHEMA)

    def add(self, rows: pa.Table) -> None:
        """Append rows with the columns `id`, `images` and `caption` of `train.parquet`; every image has its SHA-256."""
        images = rows["images"].combine_chunks()
        counts = pc.fill_null(images.value_lengths(), 0).to_numpy()
        shown: Any = images.flatten()
        encoded = pc.fill_null(pc.call_function("binary_length", [shown.field("bytes")]), 0).to_numpy() > 0
        paths = pc.call_function("if_else", [pa.array(encoded), pa.scalar(None, pa.string()), shown.field("path")])
        fields = [("path", pa.string()), ("sha256", pa.string())]
        flat = pa.StructArray.from_arrays([paths, shown.field("sha256")], fields=[pa.field(*field) for field in fields])
        offsets = pa.array(np.r_[0, counts.cumsum()].astype(np.int32))
        own = pa.ListArray.from_arrays(offsets, flat)
        columns = [rows["id"].combine_chunks(), pc.fill_null(rows["caption"].combine_chunks(), False), own]
        self._table.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._table.close()
        self._file.close()


class EncodedImages:
    """The images that are encoded in a `train.parquet`, read by row; of the last row groups the bytes are kept."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path, memory_map=True, pre_buffer=False)
        about = self._file.metadata
        self._ends = np.cumsum([about.row_group(group).num_rows for group in range(about.num_row_groups)])
        self._kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._lock = Lock()

    def read(self, row: int, place: int) -> bytes:
        """The encoded bytes of a row's image number `place`."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        with self._lock:
            if group not in self._kept:
                self._kept[group] = self._file.read_row_group(group, ["images"])["images"]
                if len(self._kept) > GROUPS_KEPT:
                    self._kept.popitem(last=False)
            images = self._kept[group]
        first = int(self._ends[group - 1]) if group else 0
        return images[row - first].as_py()[place]["bytes"]


@dataclass(frozen=True)
class TableImage(EncodedImage):
    """An image encoded in `train.parquet`, read when it is asked for."""

    table: EncodedImages | None = None
    row: int = 0
    place: int = 0

    def read(self) -> bytes:
        """The encoded bytes."""
        assert self.table is not None
        return self.table.read(self.row, self.place)


class Index:
    """An index as `IndexWriter` wrote it.

    Attributes:
        captions: bool [conversations].
        counts: int32 [conversations], images of each.
    """

    def __init__(self, data: Path) -> None:
        """Of a data folder; a `GraceError` says what to do where there is none or it is damaged."""
        self._data = data
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(data / FILE)))
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            if reader.schema != SCHEMA:
                raise pa.ArrowInvalid("other columns")
        except FileNotFoundError:
            raise GraceError(f"{data / FILE}: no such file; delete the folder and run `grace prepare` again") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise GraceError(
                f"{data / FILE}: cannot be read ({reason(error)}); delete the folder and run `grace prepare` again"
            ) from error
        self._ends = np.cumsum([len(batch) for batch in self._batches], dtype=np.int64)
        captions = [_numbers(batch["caption"].cast(pa.uint8())).astype(bool) for batch in self._batches]
        self.captions = np.concatenate([np.zeros(0, bool), *captions])
        counts = [_numbers(batch["images"].value_lengths()) for batch in self._batches]
        self.counts = np.concatenate([np.zeros(0, np.int32), *counts])
        self._encoded: EncodedImages | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def row(self, number: int) -> tuple[str, tuple[EncodedImage, ...]]:
        """The id and the images of a conversation."""
        at = int(np.searchsorted(self._ends, number, side="right"))
        batch, inside = self._batches[at], number - (int(self._ends[at - 1]) if at else 0)
        name = batch["id"][inside].as_py()
        images = []
        for place, image in enumerate(batch["images"][inside].as_py()):
            path, sha = image["path"], image["sha256"]
            if path is None:
                if self._encoded is None:
                    self._encoded = EncodedImages(self._data / "train.parquet")
                images.append(TableImage(name, None, None, sha, None, self._encoded, number, place))
            else:
                images.append(EncodedImage(name, None, image_file(self._data, path), sha))
        return name, tuple(images)


def _numbers(array: Any) -> np.ndarray:
    """A view of an Arrow array of numbers without nulls; `to_numpy` would import pandas, a third of a second."""
    return np.from_dlpack(array)
