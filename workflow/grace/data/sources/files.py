"""The records of one source, streamed: a JSON array, JSON lines, Parquet files, or a data set that `datasets` saved."""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grace.data.sources.record import BadRecord
from grace.errors import GraceError, reason

BLOCK = 1 << 20  # characters read at a time
LONGEST_RECORD = 64 << 20  # characters; a longer one is no conversation
TABLE_ROWS = 64  # rows of a table in memory at a time: they may hold encoded images

_SPACE = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Files:
    """A source that was opened.

    Attributes:
        files: everything it is read from, in order.
        records: starts a new pass; an item is the record or the `BadRecord` that stands for it.
        count: how many there are, found without decoding any image.
    """

    files: tuple[Path, ...]
    records: Callable[[], Iterator[Any]]
    count: Callable[[], int]


def open_source(path: str | Path) -> Files:
    """See what kind of source `path` is; a `GraceError` says what to change where it is none."""
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise GraceError(f"{path}: no such file; correct data.sources, or download it")
    if path.suffix == ".parquet":
        return Files((path,), lambda: _parquet((path,)), lambda: _parquet_rows((path,)))
    read = _lines if path.suffix in (".jsonl", ".ndjson") else _json
    return Files((path,), lambda: read(path), lambda: sum(1 for _ in read(path)))


def _open_folder(path: Path) -> Files:
    if (path / "dataset_dict.json").is_file():
        parts = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise GraceError(f"{path}: holds several splits ({parts}); name one, such as {path}/train, in data.sources")
    if (path / "state.json").is_file():
        files = tuple(sorted(path.glob("*.arrow")))
        return Files((path / "state.json", *files), lambda: _saved_data_set(path), lambda: len(_load_data_set(path)))
    files = tuple(sorted(path.rglob("*.parquet")))
    if not files:
        raise GraceError(
            f"{path}: no Parquet file and no data set of `save_to_disk` in this folder; name a JSON file, or such a "
            "folder"
        )
    return Files(files, lambda: _parquet(files), lambda: _parquet_rows(files))


def _characters(path: Path) -> Iterator[str]:
    """The file's text in blocks, UTF-8 with or without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as file:
        done = 0
        while block := file.read(BLOCK):
            try:
                yield decoder.decode(block)
            except UnicodeDecodeError as error:
                raise GraceError(
                    f"{path}: not UTF-8 near byte {done + error.start}; download it again, or save it as UTF-8"
                ) from None
            done += len(block)
        try:
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise GraceError(f"{path}: ends inside a character; download it again") from None


def _json(path: Path) -> Iterator[Any]:
    """The elements of a top-level array, one in memory at a time; a file of objects, one a line, is JSON lines."""
    blocks = _characters(path)
    text = ""
    while not text.strip():
        more = next(blocks, None)
        if more is None:
            raise GraceError(f"{path}: is empty; download it again")
        text += more
    first = text.lstrip()[0]
    if first == "{":
        yield from _objects(path)
    elif first == "[":
        yield from _array(path, text, blocks)
    else:
        raise GraceError(f"{path}: not a list of conversations; give a JSON array, or one JSON object a line")


def _objects(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        line = file.readline(LONGEST_RECORD).removeprefix(codecs.BOM_UTF8)
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        raise GraceError(
            f"{path}: holds an object, not a list of conversations; give a JSON array, or one JSON object a line"
        ) from None
    yield from _lines(path)


def _array(path: Path, text: str, blocks: Iterator[str]) -> Iterator[Any]:
    """Elements of the array that `text` begins; a decoder of the standard library reads each one."""
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    number, ended = 0, False
    while True:
        space = _SPACE.match(text, at)
        at = space.end() if space else at
        if text[at : at + 1] == "]":
            return _nothing_behind(path, text[at + 1 :], blocks)
        size = BLOCK
        while True:
            found, end = _element(path, decoder, text, at, number, ended)
            if end is not None:
                break
            text, at = text[at:], 0
            if len(text) > LONGEST_RECORD:
                raise GraceError(f"{path}: record {number} has more than {LONGEST_RECORD:,} characters; split the file")
            # Twice as much at each failure: a long record is not parsed once per block.
            read = []
            while sum(map(len, read)) < size and not ended:
                more = next(blocks, None)
                ended = more is None
                read.append(more or "")
            text, size = text + "".join(read), 2 * size
            space = _SPACE.match(text)
            at = space.end() if space else 0
            if text[at : at + 1] == "]":
                return _nothing_behind(path, text[at + 1 :], blocks)
        yield found
        number, at = number + 1, end


def _nothing_behind(path: Path, text: str, blocks: Iterator[str]) -> None:
    if text.strip() or any(block.strip() for block in blocks):
        raise GraceError(f"{path}: more follows behind the list of conversations; make it one list, or two files")


def _element(
    path: Path, decoder: json.JSONDecoder, text: str, at: int, number: int, ended: bool
) -> tuple[Any, int | None]:
    """An element and where it ends; no end where more of the file is needed to tell."""
    try:
        found, end = decoder.raw_decode(text, at)
    except RecursionError:
        raise GraceError(f"{path}: record {number} is nested too deeply; take it out") from None
    except json.JSONDecodeError as error:
        cut = error.msg.startswith("Unterminated string") or error.pos >= len(text) - 16
        if cut and not ended:
            return None, None
        where = "ends in the middle of" if cut and ended else f"not valid JSON ({error.msg}) in"
        raise GraceError(f"{path}: {where} record {number}; download it again, or mend it") from None
    except ValueError:  # an integer of more digits than Python converts
        raise GraceError(f"{path}: record {number} has a number of thousands of digits; take it out") from None
    if end >= len(text) and not ended:  # `12` may be the beginning of `123`
        return None, None
    return found, end


def _lines(path: Path) -> Iterator[Any]:
    """One JSON value a line; a broken line is a bad record, for the others stand on their own."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_RECORD):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
            number += 1
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                said = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
                yield BadRecord("line is not valid JSON", f"line {number}: {said}")


def _parquet(files: tuple[Path, ...]) -> Iterator[Any]:
    for path in files:
        with _reading_parquet(path), pq.ParquetFile(path) as file:
            for batch in file.iter_batches(TABLE_ROWS):
                yield from batch.to_pylist()


def _parquet_rows(files: tuple[Path, ...]) -> int:
    rows = 0
    for path in files:
        with _reading_parquet(path):
            rows += pq.read_metadata(path).num_rows
    return rows


@contextmanager
def _reading_parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise GraceError(f"{path}: not a readable Parquet file ({reason(error)}); download it again") from None


def _load_data_set(path: Path) -> Any:
    from datasets import load_from_disk

    try:
        return load_from_disk(str(path)).with_format("arrow")  # as stored: images stay encoded
    except Exception as error:  # `datasets` raises many kinds for a damaged folder
        raise GraceError(f"{path}: not a readable data set ({reason(error)}); save it again") from None


def _saved_data_set(path: Path) -> Iterator[Any]:
    for table in _load_data_set(path).iter(TABLE_ROWS):
        yield from table.to_pylist()
