"""Where a benchmark's rows lie, and under which names their columns are known."""

from pathlib import Path

ANSWERS = ("answers", "answer", "gt_answer")
"""Columns that hold the right answer, the first that a row has."""


def benchmark_file(folder: Path, protocol: str, name: str) -> Path | None:
    """A benchmark's file in the protocol's own folder, or beside the others: Parquet, TSV, or a folder of shards."""
    for place in (folder / protocol, folder):
        for path in (place / f"{name}.parquet", place / f"{name}.tsv", place / name):
            if path.is_file() or (path.is_dir() and any(path.glob("*.parquet"))):
                return path
    return None
