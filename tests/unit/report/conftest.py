"""A fake experiment, read, and its tables; tests only read them."""

import pytest
from fake_results import make_results, results_folder

from grace.report.tables.write import build_tables
from grace.results.read import read_results

__all__ = ["results_folder"]  # a fixture


@pytest.fixture(scope="session")
def results(results_folder):
    return read_results(results_folder)


@pytest.fixture(scope="session")
def five(tmp_path_factory):
    """Five seeds, as claims about the method ask for."""
    return read_results(make_results(tmp_path_factory.mktemp("five") / "fake", seeds=(0, 1, 2, 3, 4), questions=80))


@pytest.fixture(scope="session")
def tables(results):
    return {table.name: table for table in build_tables(results)}
