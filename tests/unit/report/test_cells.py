"""From a number of a table to the files that it is computed from."""

import json

import numpy as np
import pandas as pd
import pytest
from fake_results import MIRRORS

from grace.errors import GraceError
from grace.report import speed
from grace.report.tables.cells import CELLS, find_cells, read_cells
from grace.report.tables.write import NAMES, write_tables
from grace.results.read import read_results

BOTH_SEEDS = [f"students/grace/int4/seed{seed}/predictions/colour.parquet" for seed in (0, 1)]


@pytest.fixture(scope="module")
def tables(results_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells") / "tables"
    write_tables(read_results(results_folder), folder)
    return folder


@pytest.fixture(scope="module")
def numbers(tables):
    return read_cells(tables)


def test_every_score_is_the_mean_of_the_files_it_names(numbers, results_folder):
    """All cells of the score tables but the differences, computed again from nothing but their own files."""
    checked = 0
    for number in numbers:
        if not number.table.startswith("table") or "Δ" in number.column:
            continue
        scores = {file: pd.read_parquet(results_folder / file)["score"].mean() for file in number.files}
        assert float(number.value) == pytest.approx(100 * np.mean(list(scores.values())), rel=1e-4), number
        assert number.column == "average" or len(scores) == len({file.split("/")[-3] for file in scores})
        checked += 1
    assert checked > 80


def test_every_number_of_every_table_names_files_that_are_there(tables, numbers, results_folder):
    lines = [json.loads(line) for line in (tables / CELLS).read_text().splitlines()[1:]]
    assert {line["table"] for line in lines} <= set(NAMES)
    for name in {line["table"] for line in lines}:
        with (tables / f"{name}.csv").open() as file:
            frame = pd.read_csv(file)
        values = [c for c in frame.columns if f"{c} stderr" in frame.columns and c != "paper"]
        shown = int(frame[values].notna().sum().sum() - frame[values].isin(["–", "reference", ""]).sum().sum())
        assert len([n for n in numbers if n.table == name]) >= shown, name
    assert all((results_folder / file).is_file() for number in numbers for file in number.files)
    assert not any(file.startswith("bench/") for number in numbers for file in number.files), "nothing here was timed"


def test_numbers_of_what_was_timed_name_the_times(results_folder, tmp_path):
    speed.write_speed(read_results(results_folder), tmp_path / "speed")
    numbers = read_cells(tmp_path / "speed")
    assert {number.table for number in numbers} == set(speed.TABLES)
    assert {number.files for number in numbers} == {("bench/decode.csv",), ("bench/kernel.csv",)}
    written = {path.name for path in (tmp_path / "speed").iterdir()}
    forms = [(speed.TABLES, ("md", "csv", "tex")), (speed.FIGURES, ("svg", "png"))]
    named = {f"{name}.{ending}" for names, endings in forms for name in names for ending in endings}
    assert written == named | {CELLS, "metrics.json", "manifest.json", "environment.json"}


def test_a_difference_names_both_sides_on_the_same_seeds(numbers, tables):
    (found,) = [n for n in numbers if n.table == "table1" and n.heads[0] == "GRACE" and n.column == "Δ average"]
    models = {file.partition("/predictions/")[0] for file in found.files}
    assert models == {f"students/{name}/bf16/seed{seed}" for name in ("grace", "baseline") for seed in (0, 1)}
    assert len(found.files) == 4 * len(MIRRORS)
    pair = find_cells([n for n in numbers if n.table == "pairs"], "GRACE int4 − QAT int4 difference", "pairs", tables)
    assert {file.split("/")[1] for file in pair[0].files} == {"grace", "qat"}


@pytest.mark.parametrize(
    "row, column", [("GRACE int4", "colour"), ("grace  INT4", "colour (GQA)"), ("INT4 GRACE int4", "GQA")]
)
def test_rows_and_columns_are_found_as_people_type_them(numbers, tables, row, column):
    found = find_cells([n for n in numbers if n.table == "table2"], row, column, tables)
    assert [list(n.files) for n in found] == [BOTH_SEEDS]
    assert {n.table for n in find_cells(numbers, "INT4 GRACE int4", column, tables)} == {"table2", "table4"}


def test_what_is_no_single_number_is_a_sentence(numbers, tables):
    with pytest.raises(GraceError, match="no row `GRACY`; there are Teacher bf16, Baseline bf16"):
        find_cells([n for n in numbers if n.table == "table1"], "GRACY", "colour", tables)
    with pytest.raises(GraceError, match="no number of `GRACE int4` in a column `taste`; there are colour"):
        find_cells(numbers, "GRACE int4", "taste", tables)
    with pytest.raises(
        GraceError, match=r"more than one number: .*`INT4 GRACE int4` `colour .GQA.` in table2.*; say which"
    ):
        find_cells(numbers, "GRACE", "colour", tables)


def test_a_file_of_other_tables_is_a_sentence(tables, tmp_path):
    with pytest.raises(GraceError, match="no such file; write the tables again"):
        read_cells(tmp_path)
    for path in tables.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    lines = (tmp_path / "table1.csv").read_text().splitlines(keepends=True)
    (tmp_path / "table1.csv").write_text("".join([lines[0], *lines[2:]]))
    with pytest.raises(GraceError, match=r"does not belong to the tables beside it .another row stands in table1.csv"):
        read_cells(tmp_path)
