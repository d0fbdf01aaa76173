"""A short run of tests/fuzz/benchmarks.py."""

import runpy
from pathlib import Path

FUZZ = runpy.run_path(str(Path(__file__).parents[2] / "fuzz" / "benchmarks.py"))


def test_damaged_tables_and_tasks_are_refused_in_a_sentence():
    assert FUZZ["survive"](range(60), seed=0) == []
