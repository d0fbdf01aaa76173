"""An experiment's data folder from conversations and images of the user's own.

Records are streamed from the sources and handed to worker processes in parts (`tokenise`), which are then mixed
(`mix`). Parts that are whole are kept, so that a killed run goes on, until the folder is made.
"""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from grace.config.code import CodeIndex
from grace.config.sections import FilesData
from grace.data.images import FOLDERS
from grace.data.mix import plan_order, read_ids, write_mix
from grace.data.report import summarise, too_many, write_report
from grace.data.sources import Files, open_source
from grace.data.tokenise import BYTES, ROWS, Task, make_part, read_part
from grace.errors import GraceError
from grace.files import read_json, whole_folder, write_json
from grace.progress import progress
from grace.workers import submitting


def prepare_files(
    data: FilesData, processor: Path, benchmarks: Path | None, out: Path, parts: Path, workers: int = 1
) -> None:
    """Write `out`: train.parquet, examples.safetensors, report.json and .md, processor/ and benchmarks/; without
    sources the last two alone.

    Images that lie in files stay where they are; `train.parquet` names them by the number of their source and their
    path inside its image folder, with their SHA-256. Where these folders lie stands in image_folders.json, which is
    no part of the folder's contents, so that another mount point changes nothing.

    Args:
        data: the experiment's `data` section.
        processor: folder of the student, whose processor reads the conversations.
        benchmarks: folder of Parquet files in this project's format.
        parts: folder for finished parts; deleted in the end.
        workers: processes; the result does not depend on it.

    Raises:
        GraceError: a source or folder is missing or damaged, more than `max_bad` of the records are bad, or none is
            left.
    """
    for section in data.sources:
        if section.images is not None and not Path(section.images).is_dir():
            raise GraceError(f"{section.images}: no such folder; correct `images` of {section.path} in data.sources")
    if not data.sources:  # nothing is trained
        with whole_folder(out, data=_settings(data)) as folder:
            _copy_asked(folder, processor, benchmarks)
        return
    opened = [open_source(section.path) for section in data.sources]
    before = _stamps(opened)
    _keep_only(parts, data, processor, before)
    written = _write_parts(data, opened, processor, parts, workers)
    _check_unchanged(opened, before)

    summary = summarise(data, written)
    bad = sum(summary["bad"].values())
    if bad > data.max_bad * summary["records"] or not summary["conversations"]:
        write_report(parts, data, written, summary, 0)
        if bad > data.max_bad * summary["records"]:
            raise GraceError(too_many(data, written, summary, parts / "report.md"))
        names = ", ".join(section.path for section in data.sources)
        raise GraceError(f"{names}: no conversation to train on; see {parts / 'report.md'}")
    for group in ("notes", "bad", "left out"):
        for name, count in summary[group].items():
            print(f"{'left out, ' * (group != 'notes')}{name}: {count:,}")

    ids = read_ids(written)
    sizes = [source.get("conversations", 0) for source in summary["sources"]]
    order = plan_order(ids, sizes, [section.weight for section in data.sources], data.seed)
    if not len(order.rows):
        raise GraceError("data.sources: the weights leave no conversation; raise them")
    with whole_folder(out, data=_settings(data)) as folder:
        write_mix(written, order, ids, folder, parts)
        write_report(folder, data, written, summary, len(order.rows))
        write_json(folder / FOLDERS, {str(n): s.images for n, s in enumerate(data.sources) if s.images is not None})
        _copy_asked(folder, processor, benchmarks)
        _check_unchanged(opened, before)  # Snakemake records the sources as they are at the job's end
    shutil.rmtree(parts)


def _copy_asked(folder: Path, processor: Path, benchmarks: Path | None) -> None:
    """What evaluation reads."""
    from grace.models import load_processor

    load_processor(processor).save_pretrained(folder / "processor")  # with the template and geometry of training
    if benchmarks is not None:
        for path in benchmarks.rglob("*"):
            if not path.is_file() and not path.is_dir():
                raise GraceError(f"{path}: a pipe, a device or a link to nothing; take it out of data.benchmarks")
        shutil.copytree(benchmarks, folder / "benchmarks")


def _settings(data: FilesData) -> dict[str, Any]:
    """What decides the folder's contents, without where the sources lie."""
    settings = data.model_dump(exclude={"benchmarks", "max_bad"})
    for section in settings["sources"]:
        section["path"] = Path(section["path"]).name
        del section["images"], section["links_into"]
    return settings


def _stamps(opened: list[Files]) -> list[tuple[str, int, int]]:
    """Path, bytes and modification time (ns) of every file of the sources."""
    found = [(str(path), path.stat()) for source in opened for path in source.files]
    return [(path, about.st_size, about.st_mtime_ns) for path, about in found]


def _check_unchanged(opened: list[Files], before: list[tuple[str, int, int]]) -> None:
    if _stamps(opened) != before:
        raise GraceError("a file of data.sources changed while it was read; run again")


def _keep_only(parts: Path, data: FilesData, processor: Path, stamps: list[tuple[str, int, int]]) -> None:
    """Delete parts that were made from something else: other sources, limits, processor or code."""
    identity = {
        "data": data.model_dump(exclude={"max_bad", "seed", "benchmarks"}),
        "sources": [list(stamp) for stamp in stamps],
        "processor": _digest(path for path in processor.iterdir() if path.suffix in (".json", ".jinja", ".model")),
        "code": CodeIndex().fingerprint("prepare", __name__),
    }
    for section in identity["data"]["sources"]:
        del section["weight"]
    known = parts / "made_from.json"
    try:
        if read_json(known) == identity:
            return
    except GraceError:
        pass
    shutil.rmtree(parts, ignore_errors=True)
    write_json(known, identity)


def _digest(paths: Iterator[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(json.dumps([path.name, hashlib.sha256(path.read_bytes()).hexdigest()]).encode())
    return digest.hexdigest()


def _write_parts(data: FilesData, opened: list[Files], processor: Path, parts: Path, workers: int) -> list[Path]:
    """Every part, in order; those that are there already are checked and kept."""
    limits = [section.limit for section in data.sources]
    counts = [source.count() for source in opened]
    total = sum(min(count, limit or count) for count, limit in zip(counts, limits, strict=True))
    written: list[Path] = []
    with (
        submitting(workers, "grace.data.tokenise", "grace.data.examples", "grace.models") as submit,
        progress("reading conversations", total) as advance,
    ):
        running: deque[tuple[Future | None, int]] = deque()

        def finish() -> None:
            future, records = running.popleft()
            if future is not None:
                try:
                    future.result()
                except BrokenProcessPool:
                    raise GraceError(
                        "a worker of `grace prepare` was killed, most likely for want of memory; give the job more "
                        "(resources.prepare.mem_mb) or fewer cpus, and run again: finished parts are kept"
                    ) from None
            advance(records)

        for task in _tasks(data, opened, processor, parts):
            written.append(task.target)
            kept = read_part(task.target, len(task.records))
            running.append((None if kept else submit(make_part, task), len(task.records)))
            while len(running) > 2 * workers:
                finish()
        while running:
            finish()
    return written


def _tasks(data: FilesData, opened: list[Files], processor: Path, parts: Path) -> Iterator[Task]:
    for source, (section, files) in enumerate(zip(data.sources, opened, strict=True)):
        for number, (first, records) in enumerate(_chunks(files.records(), section.limit)):
            yield Task(data, processor, source, first, records, parts / f"{source:03d}-{number:06d}.arrow")


def _chunks(records: Iterator[Any], limit: int | None) -> Iterator[tuple[int, list[Any]]]:
    """(number of the first, records) of each part."""
    first, chunk, size = 0, [], 0
    for number, record in enumerate(records):
        if number == limit:
            break
        chunk.append(record)
        size += _encoded_bytes(record)
        if len(chunk) == ROWS or size >= BYTES:
            yield first, chunk
            first, chunk, size = number + 1, [], 0
    if chunk:
        yield first, chunk


def _encoded_bytes(record: Any) -> int:
    """Bytes of the images and long texts that a record itself holds, one level down."""
    if not isinstance(record, dict):
        return 0
    inside = [value for item in record.values() for value in (item if isinstance(item, list) else [item])]
    inside += [value for item in inside if isinstance(item, dict) for value in item.values()]
    return sum(len(value) for value in inside if isinstance(value, (bytes, str)))
