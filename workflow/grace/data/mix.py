"""The parts of all sources as one mix: each source by its weight, in an order that `seed` alone decides.

A shuffle of rows that do not fit into memory: the rows are dealt out to files by where they come in the final order,
and each of these, small enough for memory, is then sorted. Only a few bytes per conversation are held.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from grace.data.conversations import SCHEMA
from grace.data.index import FILE as INDEX
from grace.data.index import IndexWriter
from grace.data.tokenise import PART
from grace.files import sha256, whole_file

PILE_ROWS = 4096  # rows that are sorted in memory at a time,
PILE_BYTES = 256 << 20  # or so many bytes where rows hold encoded images
MOST_PILES = 512  # files that are open at a time
GROUP_ROWS = 1024
GROUP_BYTES = 64 << 20  # of encoded images in one Parquet row group

_PLACED = PART.append(pa.field("place", pa.int64()))


@dataclass(frozen=True)
class Order:
    """Which row of the parts comes where.

    Attributes:
        rows: int64 [mixed], ascending: numbers of the parts' rows, counted over all parts; a row may come again.
        places: int64 [mixed], where each comes in the mix.
        copies: int64 [mixed], how many rows of the same id came before: 0 for the first.
    """

    rows: np.ndarray
    places: np.ndarray
    copies: np.ndarray


def plan_order(ids: np.ndarray, sizes: Sequence[int], weights: Sequence[float], seed: int) -> Order:
    """The mix of sources of `sizes` rows.

    Of a source of weight w every row comes floor(w) times, and a drawn share of the rows, w - floor(w), once more.

    Args:
        ids: uint64 [rows], a hash of every row's id.
    """
    draw = np.random.default_rng(seed)
    chosen, start = [], 0
    for size, weight in zip(sizes, weights, strict=True):
        whole = int(weight)
        more = draw.permutation(size)[: round((weight - whole) * size)]
        chosen.append(start + np.sort(np.concatenate([np.repeat(np.arange(size), whole), more])))
        start += size
    rows = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
    places = draw.permutation(len(rows))
    return Order(rows, places, _copies(ids[rows]))


def _copies(ids: np.ndarray) -> np.ndarray:
    """int64 [n]: how often each value stands earlier in `ids`."""
    order = np.argsort(ids, kind="stable")
    ranked = ids[order]
    first = np.r_[True, ranked[1:] != ranked[:-1]] if len(ids) else np.zeros(0, bool)
    starts = np.maximum.accumulate(np.where(first, np.arange(len(ids)), 0))
    copies = np.empty(len(ids), np.int64)
    copies[order] = np.arange(len(ids)) - starts
    return copies


def id_hash(name: str) -> int:
    """64 bits of an id."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def read_ids(parts: Sequence[Path]) -> np.ndarray:
    """uint64 [rows]: the hash of every row's id."""
    hashes: list[np.ndarray] = [np.zeros(0, np.uint64)]
    for part in parts:
        names = pa.ipc.open_file(str(part)).read_all()["id"].to_pylist()
        hashes.append(np.array([id_hash(name) for name in names], np.uint64))
    return np.concatenate(hashes)


def write_mix(parts: Sequence[Path], order: Order, ids: np.ndarray, folder: Path, work: Path) -> None:
    """Write `folder`/train.parquet, examples.safetensors and index.arrow from the parts' rows in `order`;
    `work` is for piles.
    """
    mixed = len(order.rows)
    mean = sum(part.stat().st_size for part in parts) // max(len(ids), 1) + 1
    per_pile = max(1, min(PILE_ROWS, PILE_BYTES // mean), -(-mixed // MOST_PILES))
    piles = [work / f"pile-{n:04d}.arrow" for n in range(-(-mixed // per_pile))]
    tokens = _deal(parts, order, np.sort(ids), piles, per_pile)
    with (
        whole_file(folder / "train.parquet") as train,
        whole_file(folder / "examples.safetensors") as path,
        whole_file(folder / INDEX) as index_path,
        ExampleWriter(path, mixed, tokens) as examples,
    ):
        with pq.ParquetWriter(train, SCHEMA) as table, IndexWriter(index_path) as index:
            for pile in piles:
                rows = _sorted(pile)
                pile.unlink()
                for group in _groups(rows):
                    table.write_table(group.select(SCHEMA.names).cast(SCHEMA), row_group_size=len(group))
                    examples.add(group)
                    index.add(group)
        examples.finish(sha256(train), sha256(index_path))


def _deal(parts: Sequence[Path], order: Order, ids: np.ndarray, piles: Sequence[Path], per_pile: int) -> int:
    """Write every row to the pile of its place; return the number of tokens. `ids` are sorted hashes."""
    tokens = start = rows = size = 0
    waiting: list[pa.Table] = []
    with ExitStack() as stack:
        files = [stack.enter_context(pa.ipc.new_stream(str(pile), _PLACED)) for pile in piles]

        def flush() -> None:
            table = pa.concat_tables(waiting)
            belongs = table["place"].to_numpy() // per_pile
            by_pile = np.argsort(belongs, kind="stable")
            table, belongs = table.take(pa.array(by_pile)), belongs[by_pile]
            for pile in np.unique(belongs):
                first, last = np.searchsorted(belongs, [pile, pile + 1])
                files[pile].write_table(table.slice(first, last - first).combine_chunks())

        for part in parts:
            table = pa.ipc.open_file(str(part)).read_all()
            taken = _placed(table, order, start, ids)
            start += len(table)
            tokens += sum(len(chunk.flatten()) for chunk in taken["input_ids"].chunks)
            waiting.append(taken)
            rows, size = rows + len(taken), size + taken.nbytes
            if rows >= PILE_ROWS or size >= PILE_BYTES:
                flush()
                waiting, rows, size = [], 0, 0
        if rows:
            flush()
    return tokens


def _placed(table: pa.Table, order: Order, start: int, ids: np.ndarray) -> pa.Table:
    """The rows of a part, the first of which is row `start` of all, as often as they come, with their places."""
    first, last = np.searchsorted(order.rows, [start, start + len(table)])
    taken = table.take(pa.array(order.rows[first:last] - start))
    names = [
        name if copies == 0 else _free_name(name, copies, ids)
        for name, copies in zip(taken["id"].to_pylist(), order.copies[first:last], strict=True)
    ]
    taken = taken.set_column(0, "id", pa.array(names, pa.string()))
    return taken.append_column("place", pa.array(order.places[first:last], pa.int64())).cast(_PLACED)


def _free_name(name: str, copies: int, ids: np.ndarray) -> str:
    """An id for a row whose id came `copies` times before: `name#2` for the second, unless a row is called so."""
    name = f"{name}#{copies + 1}"
    while True:
        value = np.uint64(id_hash(name))
        at = np.searchsorted(ids, value)
        if at == len(ids) or ids[at] != value:
            return name
        name += "'"


def _sorted(pile: Path) -> pa.Table:
    with pa.ipc.open_stream(str(pile)) as stream:
        return stream.read_all().sort_by("place").combine_chunks()


def _groups(rows: pa.Table) -> Iterator[pa.Table]:
    """Row groups of bounded size, for readers hold at least one in memory."""
    images = rows["images"].combine_chunks()
    encoded = pc.fill_null(pc.call_function("binary_length", [images.flatten().field("bytes")]), 0).to_numpy()
    ends = np.cumsum(pc.fill_null(images.value_lengths(), 0).to_numpy())
    until = np.r_[0, np.cumsum(encoded)][ends]  # bytes of the images up to each row
    start = 0
    while start < len(rows):
        before = until[start - 1] if start else 0
        end = int(np.searchsorted(until, before + GROUP_BYTES, side="right"))
        end = min(max(end, start + 1), start + GROUP_ROWS, len(rows))
        yield rows.slice(start, end - start)
        start = end


class ExampleWriter:
    """`examples.safetensors`, row group by row group: the format lets tensors of known size be filled in any order.

    Args:
        path: the file.
        examples: how many there will be.
        tokens: of all of them together.
    """

    def __init__(self, path: Path, examples: int, tokens: int) -> None:
        self._layout: dict[str, Any] = {}
        self._at: dict[str, int] = {}
        end = 0
        shapes = {
            "lengths": ("I64", [examples], 8 * examples),
            "input_ids": ("I32", [tokens], 4 * tokens),
            "labels": ("I32", [tokens], 4 * tokens),
            "keys": ("U8", [examples, 32], 32 * examples),
        }
        for name, (dtype, shape, size) in shapes.items():
            self._layout[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            self._at[name], end = end, end + size
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._start = 8 + len(self._header("0" * 64, "0" * 64))

    def _header(self, conversations: str, index: str) -> bytes:
        about = json.dumps({"conversations": conversations, "index": index}, sort_keys=True)
        text = json.dumps({"__metadata__": {"about": about}, **self._layout}, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 8)

    def _write(self, data: bytes, at: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._file, view, at)
            view, at = view[done:], at + done

    def add(self, rows: pa.Table) -> None:
        """Append rows of `PART`."""
        ids, labels = (rows[name].combine_chunks() for name in ("input_ids", "labels"))
        lengths = np.asarray(ids.value_lengths(), np.int64)
        data = {
            "lengths": lengths.astype("<i8").tobytes(),
            "input_ids": ids.flatten().to_numpy().astype("<i4").tobytes(),
            "labels": labels.flatten().to_numpy().astype("<i4").tobytes(),
            "keys": bytes.fromhex("".join(rows["key"].to_pylist())),
        }
        for name, block in data.items():
            self._write(block, self._start + self._at[name])
            self._at[name] += len(block)

    def finish(self, conversations: str, index: str) -> None:
        """Write the header, with the SHA-256 of `train.parquet` and of the index."""
        header = self._header(conversations, index)
        self._write(len(header).to_bytes(8, "little") + header, 0)

    def __enter__(self) -> "ExampleWriter":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
