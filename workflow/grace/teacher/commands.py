"""The subcommands of `grace cache`. Only `write` needs transformers, so only it imports them."""

from pathlib import Path

from grace.teacher.manifest import read_cache_manifest
from grace.teacher.reader import check_files
from grace.teacher.summary import summary


def write(run: Path, teacher: Path, data: Path, out: Path, shard: int | None = None) -> None:
    """See `grace.teacher.writer.write`."""
    from grace.teacher.writer import write as write_shards

    write_shards(run, teacher, data, out, shard)


def finish(run: Path, teacher: Path, data: Path, out: Path) -> None:
    """See `grace.teacher.finalize.finish`."""
    from grace.teacher.finalize import finish as finish_cache

    finish_cache(run, teacher, data, out)


def info(cache: Path) -> None:
    """Print what a cache holds, its sizes, and what the audit found; damaged shards do not matter here."""
    print(summary(cache, read_cache_manifest(cache)))


def verify(cache: Path) -> None:
    """Re-hash every file of a cache; a `GraceError` names every bad one."""
    check_files(cache, read_cache_manifest(cache))
