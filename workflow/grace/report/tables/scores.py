"""Tables 1 to 4 and the outlier table: which rows stand where, what is tested, and what is marked."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from grace.report.paper import (
    AVERAGE,
    GRACE,
    PARTS,
    canonical,
    label,
    paper_numbers,
    paper_value,
    row_role,
    what_was_run,
)
from grace.report.tables.footnotes import notes
from grace.report.tables.table import Cell, Line, Table
from grace.results.read import BASELINE, TEACHER, Results, Row
from grace.results.statistics import ALPHA, Comparison, Estimate, Scores, compare, holm, minimum_detectable_difference

DETECTABLE = "Detectable difference"
PRECISIONS = ("int8", "int4", "int3", "int2")
ABLATION = ("none", *PARTS, "gdkd+rcka", "gdkd+ib", "rcka+ib", GRACE)


@dataclass
class Group:
    """Rows that are ranked together, and the row that the others are held against."""

    title: str
    rows: list[Row]
    reference: Row | None = None
    unranked: tuple[Row, ...] = (TEACHER,)


@dataclass
class Family:
    """The family of tests that a table shows, corrected together once all are known."""

    results: Results
    known: dict = field(default_factory=dict)  # shared between tables
    shown: list[tuple] = field(default_factory=list)

    def compare(self, a: Row, b: Row, column: str) -> Comparison:
        """A less B in one column; computed once however many tables need it."""
        if (a, b, column) not in self.known:
            sides = [_parts(self.results, row, column) for row in (a, b)]
            self.known[a, b, column] = compare(*sides)
        return self.known[a, b, column]

    def show(self, a: Row, b: Row, column: str) -> Comparison:
        """The same, counted into the table's family."""
        key = (a, b, column)
        if key not in self.shown:
            self.shown.append(key)
        return self.compare(a, b, column)

    def adjusted(self) -> dict[tuple, float]:
        """Holm-adjusted p of every comparison shown."""
        return dict(zip(self.shown, holm([self.known[key].p for key in self.shown]), strict=True))


def _parts(results: Results, row: Row, column: str) -> list[Scores]:
    return results.all_scores(row) if column == AVERAGE else [results.scores(row, column)]


def _estimate(results: Results, row: Row, column: str) -> Estimate:
    return results.estimate(row, None if column == AVERAGE else column)


def columns_of(results: Results) -> list[str]:
    """Benchmarks in the order of the paper's tables, then those that it does not have, then the average."""
    order = {name: place for place, name in enumerate(paper_numbers()["benchmark"].unique())}
    named = {name: canonical(results.mirrors[name]) for name in results.benchmarks}
    return [*sorted(results.benchmarks, key=lambda name: order.get(named[name], len(order))), AVERAGE]


def has(results: Results, row: Row, column: str) -> bool:
    """Whether a row has a number in a column: partial results leave gaps."""
    return results.has_average(row) if column == AVERAGE else results.has(row, column)


def score_table(results: Results, name: str, title: str, number_: str, groups: list[Group], known: dict) -> Table:
    """Score every row of `groups` on every benchmark and their average, test, mark, and write the footnotes."""
    tests = Family(results, known)
    columns = columns_of(results)
    for group in groups:
        for column in columns:
            for a, b in list(pairwise(_order(results, group, column)))[:2]:
                tests.show(a, b, column)
        for row in _held(results, group, AVERAGE):
            tests.show(row, group.reference, AVERAGE)
    adjusted = tests.adjusted()
    table = Table(name, title, ["Model", "Bits"], [*(heading(results, column) for column in columns), "Δ average"])
    for group in groups:
        marks = _marks(results, group, columns, tests, adjusted)
        table.lines += [_line(results, group, row, number_, columns, marks, tests, adjusted) for row in group.rows]
    if groups:
        table.lines.append(_detectable(results, groups, columns, tests))
    table.notes = notes(results, number_, groups, tests)
    return table


def _order(results: Results, group: Group, column: str) -> list[Row]:
    """Ranked rows that have a number in the column, best first; equal scores keep the table's order."""
    rows = [row for row in group.rows if row not in group.unranked and has(results, row, column)]
    return sorted(rows, key=lambda row: -_estimate(results, row, column).value)


def _held(results: Results, group: Group, column: str) -> list[Row]:
    """The rows that are held against the group's reference in a column."""
    if group.reference is None or not has(results, group.reference, column):
        return []
    return [row for row in group.rows if row != group.reference and has(results, row, column)]


def _marks(results: Results, group: Group, columns: list[str], tests: Family, adjusted: dict) -> dict:
    """The paper's rule (bold best, underlined second), each only where it beats the next row significantly.

    Without a sure best there is no second either. Rows may share only some of their seeds, and then the ranking of their
    means may not be that of the seeds they share.
    """
    marks = {}
    for column in columns:
        order = _order(results, group, column)
        for mark, a, b in zip(("best", "second"), order, order[1:], strict=False):
            if adjusted[a, b, column] >= ALPHA or tests.compare(a, b, column).difference <= 0:
                break
            marks[a, column] = mark
    return marks


def _line(results, group, row, number_, columns, marks, tests, adjusted) -> Line:
    experiment, cells = results.experiment, []
    for column in columns:
        wanted = AVERAGE if column == AVERAGE else canonical(results.mirrors.get(column, column))
        tables = (number_, "1") if row in (TEACHER, BASELINE) else (number_,)
        role = row_role(experiment, row)
        found = (paper_value(experiment, table, role, row.precision, wanted) for table in tables)
        cell = Cell(paper=next((value for value in found if value is not None), None))
        if has(results, row, column):
            mean = _estimate(results, row, column)
            cell.value, cell.stderr, cell.mark = mean.value, mean.stderr, marks.get((row, column), "")
        cells.append(cell)
    if row in _held(results, group, AVERAGE):
        found = tests.compare(row, group.reference, AVERAGE)
        mark = "significant" if adjusted[row, group.reference, AVERAGE] < ALPHA else ""
        cells.append(Cell(found.difference, found.stderr, mark=mark, signed=True))
    else:
        cells.append(Cell(text="reference" if row == group.reference else "–"))
    rounded = row not in (TEACHER, BASELINE) and experiment.recipes[row.recipe].post_training is not None
    run = what_was_run(experiment, results.seeds[row]) + ("; rounded, not trained" if rounded else "")
    return Line([label(experiment, row), row.precision.removesuffix("-outliers")], cells, group.title, run)


def _detectable(results: Results, groups: list[Group], columns: list[str], tests: Family) -> Line:
    """The last row: how large a difference must be for this table to find it."""
    cells = []
    for column in columns:
        found = [
            tests.compare(row, group.reference, column) for group in groups for row in _held(results, group, column)
        ]
        # models that answer alike everywhere say nothing about how much others vary
        least = [minimum_detectable_difference(each.stderr, each.df) for each in found if each.stderr > 0]
        cells.append(Cell(float(np.median(least)) if least else None))
    return Line([DETECTABLE, ""], [*cells, Cell(text="–")], "", "see notes")


def heading(results: Results, column: str) -> str:
    """`colour (GQA)` for a benchmark that imitates one of the paper's, `GQA` for the paper's own."""
    mirrored = results.mirrors.get(column, column)
    return f"{column} ({mirrored})" if column in results.imitations else mirrored


def groups_of(results: Results) -> dict[str, list[Group]]:
    """Rows of each table: `1` full precision, `2` quantised, `3` ablation, `4` what distillation adds, `outliers`."""
    experiment = results.experiment

    def pick(wanted: Iterable[str], precision: str) -> list[Row]:
        by_role = {}
        for row in results.rows(precision):
            by_role.setdefault(row_role(experiment, row), []).append(row)
        return [row for name in wanted for row in by_role.get(name, [])]

    first = [row for row in (TEACHER, BASELINE) if row in results.seeds]
    base = BASELINE if BASELINE in results.seeds else None
    full = [*first, *pick(("none", "kd", GRACE, "variant"), "bf16")]
    ablation = [*first, *pick(ABLATION, "bf16")]
    plain = next((row for row in ablation if row_role(experiment, row) == "none"), None)
    tables = {
        "1": [Group("", full, base)],
        "3": [Group("", ablation, plain or base)] if len(ablation) > len(first) else [],
    }
    tables["2"] = _blocks(
        experiment, {p: pick(("rtn", "awq", "gptq", "none", GRACE, "variant"), p) for p in PRECISIONS}, base
    )
    if tables["2"] and base:
        tables["2"].insert(0, Group("bf16, where they start", [base], base, (base,)))
    tables["4"] = _blocks(experiment, {p: pick(("none", "kd", GRACE), p) for p in PRECISIONS}, None)
    outliers = sorted({row.precision for row in results.rows() if row.precision.endswith("-outliers")}, reverse=True)
    everything = ("rtn", "awq", "gptq", "none", "kd", *ABLATION[1:], "variant")
    tables["outliers"] = _blocks(experiment, {p: pick(everything, p) for p in outliers}, base)
    return tables


def _blocks(experiment, rows: dict[str, list[Row]], reference: Row | None) -> list[Group]:
    """A block per precision; without a reference of its own, each is held against its QAT row."""
    blocks = []
    for precision, found in rows.items():
        if not found:
            continue
        own = reference or next((row for row in found if row_role(experiment, row) == "none"), None)
        blocks.append(Group(precision.upper().replace("-OUTLIERS", " under the outlier transform"), found, own))
    return blocks
