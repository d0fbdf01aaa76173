"""Where a benchmark's rows lie, and under which names their columns are known."""

from pathlib import Path

from grace.errors import GraceError

ANSWERS = ("answers", "answer", "gt_answer")
"""Columns that hold the right answer, the first that a row has."""


def benchmark_file(folder: Path, protocol: str, name: str) -> Path | None:
    """A benchmark's file in the protocol's own folder, or beside the others: Parquet, TSV, or a folder of shards."""
    for place in (folder / protocol, folder):
        for path in (place / f"{name}.parquet", place / f"{name}.tsv", place / name):
            if path.is_file() or (path.is_dir() and any(path.glob("*.parquet"))):
                return path
    return None


def questions_file(data: Path, name: str, protocol: str) -> Path:
    """The benchmark's file: where the protocol has one of its own, that; else the one for all."""
    folder = data / "benchmarks"
    path = benchmark_file(folder, protocol, name)
    if path is None:
        raise GraceError(
            f"{folder / name}.parquet: no such benchmark file; run `grace prepare` with it in evaluation.benchmarks"
        )
    return path
