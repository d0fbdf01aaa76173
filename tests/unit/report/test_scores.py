"""Tables of scores: what is recomputed from predictions, ranked, compared and left open."""

import shutil

import numpy as np
import pandas as pd
import pytest
import recompute_table
from fake_results import MIRRORS, change_rows, make_results

from grace.errors import GraceError
from grace.report.comparisons import Family
from grace.report.metrics import metrics
from grace.report.paper import AVERAGE
from grace.report.speed import write_speed
from grace.report.tables.scores import Group, groups_of, on_shared_seeds, score_table
from grace.report.tables.table import markdown
from grace.report.tables.write import build_tables, write_tables
from grace.results.read import Row, read_results


def test_table_cells_are_recomputable_from_predictions(tables, results_folder):
    line = next(line for line in tables["table1"].lines if line.heads[0] == "GRACE")
    of_seeds = [results_folder / f"students/grace/bf16/seed{seed}/predictions" for seed in (0, 1)]
    means = [
        np.mean([pd.read_parquet(folder / f"{name}.parquet")["score"].mean() for folder in of_seeds])
        for name in MIRRORS
    ]
    assert [cell.value for cell in line.cells[:3]] == pytest.approx([100 * mean for mean in means])
    assert line.cells[3].value == pytest.approx(100 * np.mean(means))
    assert all(cell.stderr > 0 for cell in line.cells[:4])


def test_rows_of_each_table(tables):
    names = {name: [line.heads for line in table.lines] for name, table in tables.items()}
    assert [head for head, _ in names["table1"]] == [
        "Teacher", "Baseline", "Fine-tuning", "Fine-tuning + KD", "GRACE",
    ]  # fmt: skip
    assert names["table2"][0] == ["Baseline", "bf16"]
    assert names["table2"][1:5] == [["RTN", "int4"], ["AWQ", "int4"], ["QAT", "int4"], ["GRACE", "int4"]]
    assert [h for h, _ in names["table3"]][2:7] == ["Fine-tuning", "GDKD", "RCKA", "IB", "GRACE"]
    assert names["table4"][:3] == [["QAT", "int4"], ["QAT + KD", "int4"], ["GRACE", "int4"]]
    assert {line.group for line in tables["outliers"].lines} == {"INT4 under the outlier transform"}
    assert all(line.run.startswith("demo models, not LLaVA-1.5") for t in tables.values() for line in t.lines[:1])


def test_bold_and_underline_only_where_the_next_is_beaten_after_holm(results):
    known: dict = {}
    score_table(results, "table2", "", "2", groups_of(results)["2"], known)
    for group in groups_of(results)["2"][1:]:
        order = sorted(group.rows, key=lambda row: -np.mean(results.scores(row, "colour").values))
        assert (order[0], order[1], "colour", (0, 1)) in known
    tests = Family(results, known)
    a, b = Row("grace", "int4"), Row("qat", "int4")
    for column in (AVERAGE, "colour"):
        tests.show(a, b, column)
    p = [known[a, b, column, (0, 1)].p for column in (AVERAGE, "colour")]
    assert sorted(tests.adjusted().values()) == pytest.approx(sorted([min(1, 2 * min(p)), max(max(p), 2 * min(p))]))


def test_equal_models_are_not_marked(tmp_path, results_folder):
    folder = tmp_path / "equal"
    shutil.copytree(results_folder, folder)
    for seed in (0, 1):
        shutil.rmtree(folder / f"students/grace/int4/seed{seed}")
        shutil.copytree(folder / f"students/qat/int4/seed{seed}", folder / f"students/grace/int4/seed{seed}")
    equal = read_results(folder)
    table = score_table(equal, "table4", "", "4", groups_of(equal)["4"], {})
    cells = {line.heads[0]: line.cells for line in table.lines if line.heads[1] == "int4"}
    assert [cell.value for cell in cells["GRACE"][:3]] == [cell.value for cell in cells["QAT"][:3]]
    assert cells["GRACE"][-2].value == 0 and cells["GRACE"][-2].mark == ""


def test_partial_results_make_tables_with_gaps(tmp_path, results_folder):
    folder = tmp_path / "part"
    shutil.copytree(results_folder, folder)
    shutil.rmtree(folder / "teacher")
    shutil.rmtree(folder / "students/rtn/int4")
    (folder / "students/grace/int4/seed1/predictions/colour.parquet").unlink()
    with pytest.raises(GraceError, match="no such file"):
        read_results(folder)
    part = read_results(folder, partial=True)
    assert part.missing == ["teacher", "rtn int4 seed 0", "rtn int4 seed 1", "grace int4 on colour"]
    tables = {table.name: table for table in build_tables(part)}
    assert [line.heads[0] for line in tables["table1"].lines[:2]] == ["Baseline", "Fine-tuning"]
    grace = next(line for line in tables["table2"].lines if line.heads == ["GRACE", "int4"])
    values = dict(zip(tables["table2"].columns, [cell.value for cell in grace.cells], strict=True))
    assert values["colour (GQA)"] is None and values["average"] is None and values["presence (POPE)"] > 0
    assert "Partial results: 4 sets of predictions are not here (teacher, rtn int4" in markdown(tables["table2"])
    assert not any("INT4" in line.heads[0] and "GRACE" in line.heads[0] for line in tables["claims"].lines)
    assert "average" not in metrics(part)["scores"]["grace"]["int4"]


def test_one_seed_and_no_students_make_tables_too(tmp_path):
    folder = make_results(tmp_path / "one", seeds=(0,), questions=20)
    tables = {table.name: table for table in build_tables(read_results(folder))}
    compared = [line for line in tables["claims"].lines if line.group != "Measured values"]
    assert {line.cells[3].text for line in compared} == {"–"}
    assert {line.heads[1] for line in compared} == {"Not decided"}
    assert all("seeds, there is one" in line.heads[3] for line in compared)
    shutil.rmtree(folder / "students" / "grace")
    for name in ("qat", "kd", "gdkd", "rcka", "ib", "rtn", "awq"):
        shutil.rmtree(folder / "students" / name)
    tables = {table.name: table for table in build_tables(read_results(folder, partial=True))}
    assert [line.heads[0] for line in tables["table1"].lines] == ["Teacher", "Baseline"]
    assert not tables["table2"].lines and "ran nothing" in markdown(tables["table2"])


def test_a_block_never_mixes_seeds(tmp_path, results_folder):
    """RTN has but one, good seed, so that its mean is the highest; on that seed QAT is better, significantly."""
    folder = tmp_path / "lucky"
    shutil.copytree(results_folder, folder)
    shutil.rmtree(folder / "students/rtn/int4/seed1")
    for recipe, seed, right in (("rtn", 0, 60), ("qat", 0, 79), ("qat", 1, 4)):
        for name in MIRRORS:
            path = folder / f"students/{recipe}/int4/seed{seed}/predictions/{name}.parquet"
            change_rows(path, lambda f, right=right: f.assign(score=(np.arange(len(f)) < right) * 1.0))
    lucky = read_results(folder, partial=True)
    rows = [Row("rtn", "int4"), Row("qat", "int4")]
    (group,) = on_shared_seeds(lucky, [Group("", rows)])
    assert (group.seeds, group.apart) == ((0,), ())
    table = score_table(lucky, "t", "", "2", [group], {})
    assert [line.cells[0].value for line in table.lines] == [75.0, 98.75]
    assert table.lines[1].cells[0].mark == "best" and "seed 0 (also run: seed 1)" in table.lines[1].run
    more = [*rows, Row("kd", "int4"), Row("grace", "int4")]
    (group,) = on_shared_seeds(lucky, [Group("", more, more[1])])
    assert (group.seeds, group.apart) == ((0, 1), (rows[0],))  # 2 x 2 comparisons, not 3 x 1
    table = score_table(lucky, "t", "", "2", [group], {})
    assert table.lines[0].cells[0].mark == "" and table.lines[0].cells[-2].text == "–"
    assert "NOT COMPARED: lacks seed 1" in table.lines[0].run and "neither ranked nor compared" in markdown(table)
    (group,) = on_shared_seeds(lucky, [Group("", more, more[0])])
    assert group.seeds == (0,) and not group.apart  # the reference has no other


def test_every_table_is_what_a_script_without_our_code_computes(tmp_path, results_folder):
    folder = tmp_path / "again"
    shutil.copytree(results_folder, folder)
    write_tables(read_results(folder), folder / "tables")
    write_speed(read_results(folder), folder / "speed")
    found = recompute_table.deviations(folder)
    assert all(each.count > 3 and each.largest < 1e-3 for each in found.values()), vars(found["pairs"])
    for name, old, new in (
        ("table1", "Baseline,bf16,6", "Baseline,bf16,5"), ("pairs", ",detectable,1", ",detectable,3"),
    ):  # fmt: skip
        text = (folder / f"tables/{name}.csv").read_text()
        assert old in text, name
        (folder / f"tables/{name}.csv").write_text(text.replace(old, new))
        assert recompute_table.deviations(folder)[name].largest > 1
