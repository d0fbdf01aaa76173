"""A table in Markdown, CSV and LaTeX: the same numbers, marks and labels in each."""

import csv
import re

import pytest

from grace.report.tables.table import Cell, Line, Table, aligned, comma_separated, latex, markdown
from grace.report.tables.write import NAMES, write_tables


def test_written_forms_agree(tmp_path, results):
    write_tables(results, tmp_path / "tables")
    written = {path.name for path in (tmp_path / "tables").iterdir()}
    assert written == {f"{name}.{end}" for name in NAMES for end in ("md", "csv", "tex")} | {
        "cells.jsonl",
        "manifest.json",
        "environment.json",
    }
    with open(tmp_path / "tables" / "table1.csv") as file:
        rows = {row["Model"]: row for row in csv.DictReader(file)}
    assert float(rows["Baseline"]["average"]) == pytest.approx(65, abs=10)
    assert float(rows["Baseline"]["average stderr"]) > 0
    assert rows["GRACE"]["colour (GQA) paper"] == ""
    for name in NAMES:
        _check_latex((tmp_path / "tables" / f"{name}.tex").read_text())
    assert "demo models, not LLaVA-1.5" in (tmp_path / "tables" / "table1.md").read_text()
    assert "Holm" in (tmp_path / "tables" / "table1.md").read_text()


def _check_latex(text: str) -> None:
    """Braces and environments close, every row has the columns that the tabular declares, no bare special character."""
    assert text.count("{") == text.count("}")
    assert re.findall(r"\\begin{(\w+\*?)}", text) == re.findall(r"\\end{(\w+\*?)}", text)[::-1]
    if r"\begin{tabular}" not in text:  # an empty table: its notes say why
        assert any(f"tab:{name}" in text for name in ("language", "protocols", "overlap"))
        return
    declared = re.search(r"\\begin{tabular}{(.+)}\n", text)
    columns = len(re.sub(r"p{\d+cm}", "p", declared[1]))
    rows = [line for line in text.splitlines() if line.endswith(r" \\") and "multicolumn" not in line]
    assert len(rows) > 2 and all(len(re.findall(r"(?<!\\)&", row)) == columns - 1 for row in rows), columns
    assert not re.search(r"(?<!\\)[_%#]", re.sub(r"{!}{%|\\label{.*}", "", text))
    assert text.isascii() or not re.search("[±−×“”Δ²]", text)


def test_marks_in_each_written_form():
    cells = [
        Cell(71.04, 0.5, 61.2, "best"),
        Cell(70.0, 0.5, mark="second"),
        Cell(-1.25, 0.2, mark="significant", signed=True),
    ]
    table = Table("t", "T", ["Model"], ["a_1", "b", "Δ"], [Line(["x & y"], cells, "", "demo")], ["Note < 5%."])
    assert "| x & y | **71.0** ± 0.5<br>paper 61.2 | <u>70.0</u> ± 0.5 | −1.2 ± 0.2* | demo |" in markdown(table)
    text = latex(table)
    assert r"x \& y & \textbf{71.0} $\pm$ 0.5 & \underline{70.0} $\pm$ 0.5 & $-$1.2 $\pm$ 0.2* & demo" in text
    assert r"\quad paper & \emph{61.2}\phantom{ $\pm$ 0.5} &  &" in text and r"a\_1" in text
    assert (
        comma_separated(table)
        .splitlines()[1]
        .startswith(",x & y,71.04,0.5,61.2,best,70,0.5,,second,-1.25,0.2,,significant")
    )


def test_a_label_is_shown_as_it_is_in_each_written_form():
    label_ = "[5pt] $x$ <script>a|b* _c_ `d`"
    table = Table("t", "T", ["Model"], ["a"], [Line([label_], [Cell(1.0)], label_, label_)], [label_])
    text = markdown(table)
    assert "<script" not in text and text.count(r"\[5pt] \$x\$ &lt;script>a\|b\* \_c\_ \`d\`") == 3
    tex = latex(table)
    assert not re.search(r"^\s*[\[*]", tex, re.MULTILINE) and r"{[}5pt] \$x\$ $<$script$>$a|b{*} \_c\_" in tex
    assert next(csv.reader(comma_separated(table).splitlines()[1:]))[1] == label_


def test_numbers_of_a_column_stand_under_each_other():
    cells = [Cell(5.0, 1.5, mark="significant"), Cell(15.0, 10.5), Cell(7.0), Cell(text="reference")]
    table = Table("t", "T", ["Model"], ["a"], [Line(["x"], [cell]) for cell in cells])
    texts = [line[0] for line in aligned(table)]
    assert [(text.before_error, text.after) for text in texts] == [("0", ""), ("", "*"), ("", " ± 10.5*"), ("", "")]
