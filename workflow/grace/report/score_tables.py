"""Tables 1 to 4 and the outlier table: which rows stand where, what is tested, and what is marked."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from grace.report.paper import (
    ARXIV,
    GRACE,
    PARTS,
    canonical,
    label,
    paper_model,
    paper_numbers,
    paper_value,
    row_role,
    what_was_run,
)
from grace.report.read import BASELINE, TEACHER, Results, Row
from grace.report.render import Cell, Line, Table, number
from grace.report.stats import (
    ALPHA,
    POWER,
    Comparison,
    Estimate,
    Scores,
    compare,
    holm,
    minimum_detectable_difference,
)

AVERAGE = "average"
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


def score_table(results: Results, name: str, title: str, number_: str, groups: list[Group], known: dict) -> Table:
    """Score every row of `groups` on every benchmark and their average, test, mark, and write the footnotes."""
    tests = Family(results, known)
    columns = [*results.benchmarks, AVERAGE]
    for group in groups:
        ranked = [row for row in group.rows if row not in group.unranked]
        for column in columns:
            order = _order(results, ranked, column)
            for a, b in list(pairwise(order))[:2]:
                tests.show(a, b, column)
        for row in group.rows:
            if group.reference and row != group.reference:
                tests.show(row, group.reference, AVERAGE)
    adjusted = tests.adjusted()
    table = Table(name, title, ["Model", "Bits"], [*map(_heading(results), columns), "Δ average"])
    for group in groups:
        marks = _marks(results, group, columns, adjusted)
        table.lines += [_line(results, group, row, number_, columns, marks, tests, adjusted) for row in group.rows]
    if groups:
        table.lines.append(_detectable(results, groups, columns, tests))
    table.notes = _notes(results, number_, groups, tests)
    return table


def _order(results: Results, rows: Iterable[Row], column: str) -> list[Row]:
    """Best first; equal scores keep the table's order."""
    return sorted(rows, key=lambda row: -_estimate(results, row, column).value)


def _marks(results: Results, group: Group, columns: list[str], adjusted: dict) -> dict[tuple[Row, str], str]:
    """The paper's rule (bold best, underlined second), each only where it beats the next row significantly."""
    marks = {}
    ranked = [row for row in group.rows if row not in group.unranked]
    for column in columns:
        order = _order(results, ranked, column)
        for mark, a, b in zip(("best", "second"), order, order[1:], strict=False):
            if adjusted[a, b, column] < ALPHA:
                marks[a, column] = mark
    return marks


def _line(results, group, row, number_, columns, marks, tests, adjusted) -> Line:
    experiment = results.experiment
    cells = []
    for column in columns:
        found = _estimate(results, row, column)
        wanted = AVERAGE if column == AVERAGE else canonical(results.mirrors.get(column, column))
        paper = paper_value(experiment, number_, row_role(experiment, row), row.precision, wanted)
        cells.append(Cell(found.value, found.stderr, paper, marks.get((row, column), "")))
    if group.reference and row != group.reference:
        found = tests.compare(row, group.reference, AVERAGE)
        mark = "significant" if adjusted[row, group.reference, AVERAGE] < ALPHA else ""
        cells.append(Cell(found.difference, found.stderr, mark=mark, signed=True))
    else:
        cells.append(Cell(text="reference" if group.reference else "–"))
    rounded = row not in (TEACHER, BASELINE) and experiment.recipes[row.recipe].post_training is not None
    run = what_was_run(experiment, results.seeds[row]) + ("; rounded, not trained" if rounded else "")
    return Line([label(experiment, row), row.precision.removesuffix("-outliers")], cells, group.title, run)


def _detectable(results: Results, groups: list[Group], columns: list[str], tests: Family) -> Line:
    """The last row: how large a difference must be for this table to find it."""
    cells = []
    for column in columns:
        errors = [
            tests.compare(row, group.reference, column).stderr
            for group in groups
            if group.reference
            for row in group.rows
            if row != group.reference
        ]
        cells.append(Cell(minimum_detectable_difference(float(np.median(errors))) if errors else None))
    return Line(["Detectable difference", ""], [*cells, Cell(text="–")], "", "see notes")


def _heading(results: Results):
    """`colour (GQA)` for a benchmark that imitates one of the paper's, `GQA` for the paper's own."""

    def heading(column: str) -> str:
        mirrored = results.mirrors.get(column, column)
        own = canonical(column) == canonical(mirrored)
        return mirrored if own else f"{column} ({mirrored})"

    return heading


def _notes(results: Results, number_: str, groups: list[Group], tests: Family) -> list[str]:
    experiment, model = results.experiment, paper_model(results.experiment, number_)
    if not groups:
        return [f"The experiment `{experiment.experiment}` ran nothing that belongs here."]
    notes = [
        f"Points, mean over seeds ± standard error. The error is clustered by picture and holds the variance between seeds "
        f"where there are several; a single seed's error covers the questions alone. Questions: {_sizes(results)}.",
    ]
    if experiment.data.source == "demo":
        notes.append(
            f"“paper” is {ARXIV}'s number for {model}, on the benchmark in brackets. The demo's models, pictures and "
            "questions are other and far smaller ones: compare directions, not values."
        )
    else:
        notes.append(f"“paper” is {ARXIV}'s number for {model}.")
    if any(canonical(mirrored) == "MME" for mirrored in results.mirrors.values()):
        notes.append(
            "MME: the paper's number is MME's score (up to 2,000), ours the share of right answers, in percent."
        )
    if len(tests.shown):
        notes.append(
            f"Bold: best of its block, underlined: second best, each only where it beats the next at {ALPHA:.0%} after "
            f"Holm's correction over this table's {len(tests.shown)} test{'s' * (len(tests.shown) > 1)} (Δ average included; * marks its "
            "significant ones). One benchmark: McNemar's exact mid-p test, clustered by picture. Average: paired bootstrap "
            "over pictures. With several seeds also a t test with the variance between seeds, and the larger p counts."
        )
    references = [f"{label(experiment, g.reference)} {g.reference.precision}" for g in groups if g.reference]
    if references:
        notes.append(
            f"Δ average: difference of the averages from {', '.join(dict.fromkeys(references))}, paired by question and by the seeds "
            f"that both have, ± its standard error. Detectable difference: what a comparison with that row finds with {POWER:.0%} power at "
            f"{ALPHA:.0%}, uncorrected (median over the rows)."
        )
    if any(TEACHER in group.rows for group in groups):
        notes.append("The teacher is not ranked. The average is the plain mean of the benchmarks.")
    else:
        notes.append("The average is the plain mean of the benchmarks.")
    return notes + _elsewhere(experiment, number_)


def _sizes(results: Results) -> str:
    counts = {b: results.scores(next(iter(results.seeds)), b).values.shape[1] for b in results.benchmarks}
    if len(set(counts.values())) == 1:
        return f"{next(iter(counts.values())):,} in each benchmark"
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _elsewhere(experiment, number_: str) -> list[str]:
    """Rows of the paper's table that are other people's methods, which this pipeline does not run."""
    if experiment.family == "qwen3_vl":
        return []
    numbers = paper_numbers()
    others = numbers[(numbers["table"] == number_) & (numbers["role"] == "") & (numbers["benchmark"] == AVERAGE)]
    listed = ", ".join(f"{row} {number(value)}" for row, value in zip(others["row"], others["value"], strict=True))
    return [f"The paper's table also lists (average): {listed}; these methods are not run here."] if listed else []


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
