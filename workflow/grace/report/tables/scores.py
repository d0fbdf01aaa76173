"""Tables 1 to 4 and the outlier table: which rows stand where, what is tested, and what is marked."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

from grace.config.sections import PostTraining
from grace.precision import INTEGERS
from grace.report.comparisons import Family, files_compared, files_of, has, parts_of
from grace.report.paper import (
    AVERAGE,
    GRACE,
    PARTS,
    canonical,
    label,
    paper_beside,
    paper_numbers,
    row_role,
    seed_range,
    what_was_run,
)
from grace.report.tables.footnotes import notes
from grace.report.tables.table import Cell, Line, Table
from grace.results.read import BASELINE, TEACHER, Results, Row
from grace.results.statistics import ALPHA, Estimate, estimate

ROUNDINGS: tuple[str, ...] = get_args(PostTraining)
ABLATION = ("none", *PARTS, "gdkd+rcka", "gdkd+ib", "rcka+ib", GRACE)


@dataclass
class Group:
    """Rows that are ranked together, and the row that the others are held against.

    `seeds`: what its rows are shown and compared on. Rows in `apart` lack some of these; they show what they have of
    them, or their own, and are neither ranked nor compared.
    """

    title: str
    rows: list[Row]
    reference: Row | None = None
    unranked: tuple[Row, ...] = (TEACHER,)
    seeds: tuple[int, ...] = ()
    apart: tuple[Row, ...] = ()


def _shown_seeds(results: Results, group: Group, row: Row) -> tuple[int, ...]:
    """The seeds that a row of the group is shown on."""
    return tuple(seed for seed in group.seeds if seed in results.seeds[row]) or results.seeds[row]


def _estimate(results: Results, group: Group, row: Row, column: str) -> Estimate:
    return estimate(parts_of(results, row, column, _shown_seeds(results, group, row)))


def on_shared_seeds(results: Results, groups: list[Group]) -> list[Group]:
    """Each group with its seeds; groups that are held against one row share them.

    Of the sets of seeds that some row has, that one is taken which gives the most comparisons: seeds times rows that
    have them all, less one. The reference is always among these rows.
    """
    for reference in {group.reference for group in groups}:
        together = [group for group in groups if group.reference == reference]
        rows = {row for group in together for row in group.rows} | {reference}
        has_seeds: dict[Row | None, frozenset[int]] = {
            row: frozenset(results.seeds[row]) for row in rows if row is not None and row != TEACHER
        }
        if not has_seeds:
            continue
        limit = has_seeds.get(reference, frozenset().union(*has_seeds.values()))
        sets = sorted({found & limit for found in has_seeds.values()}, key=lambda each: (-len(each), sorted(each)))

        def compared(seeds: frozenset, has_seeds: dict = has_seeds) -> int:
            return len(seeds) * (sum(seeds <= found for found in has_seeds.values()) - 1)

        chosen = max(sets, key=compared)
        for group in together:
            group.seeds = tuple(sorted(chosen))
            group.apart = tuple(row for row in group.rows if row != TEACHER and not chosen <= has_seeds[row])
    return groups


def columns_of(results: Results) -> list[str]:
    """Benchmarks in the order of the paper's tables, then those that it does not have, then the average."""
    order = {name: place for place, name in enumerate(paper_numbers()["benchmark"].unique())}
    named = {name: canonical(results.mirrors[name]) for name in results.benchmarks}
    return [*sorted(results.benchmarks, key=lambda name: order.get(named[name], len(order))), AVERAGE]


def score_table(results: Results, name: str, title: str, paper_table: str, groups: list[Group], known: dict) -> Table:
    """Score every row of `groups` on every benchmark and their average, test, mark, and write the footnotes."""
    tests = Family(results, known)
    columns = columns_of(results)
    for group in groups:
        for column in columns:
            for a, b in list(pairwise(_order(results, group, column)))[:2]:
                tests.show(a, b, column, group.seeds)
        for row in _held(results, group):
            assert group.reference is not None, "rows are held against a reference"
            tests.show(row, group.reference, AVERAGE, group.seeds)
    adjusted = tests.adjusted()
    headings = [*(heading(results, column) for column in columns), "Δ average", "detectable Δ"]
    table = Table(name, title, ["Model", "Bits"], headings)
    for group in groups:
        marks = _marks(results, group, columns, tests, adjusted)
        table.lines += [_line(results, group, row, paper_table, columns, marks, tests, adjusted) for row in group.rows]
    table.notes = notes(results, paper_table, groups, tests)
    return table


def _order(results: Results, group: Group, column: str) -> list[Row]:
    """Ranked rows that have a number in the column, best first; equal scores keep the table's order."""
    rows = [row for row in group.rows if row not in (*group.unranked, *group.apart) and has(results, row, column)]
    return sorted(rows, key=lambda row: -_estimate(results, group, row, column).value)


def _held(results: Results, group: Group) -> list[Row]:
    """The rows whose average is held against the reference's."""
    if group.reference is None or not has(results, group.reference, AVERAGE):
        return []
    rows = [row for row in group.rows if row != group.reference and row not in group.apart]
    return [row for row in rows if has(results, row, AVERAGE)]


def _marks(results: Results, group: Group, columns: list[str], tests: Family, adjusted: dict) -> dict:
    """The paper's rule (bold best, underlined second), each only where it beats the next row significantly.

    Without a sure best there is no second either.
    """
    marks = {}
    for column in columns:
        order = _order(results, group, column)
        for mark, a, b in zip(("best", "second"), order, order[1:], strict=False):
            found = tests.compare(a, b, column, group.seeds)
            if adjusted[a, b, column] >= ALPHA or found.difference <= 0:
                break
            marks[a, column] = mark
    return marks


def _line(results, group, row, paper_table, columns, marks, tests, adjusted) -> Line:
    experiment, cells = results.experiment, []
    role = row_role(experiment, row)
    for column in columns:
        wanted = AVERAGE if column == AVERAGE else canonical(results.mirrors.get(column, column))
        cell = Cell(paper=paper_beside(experiment, paper_table, role, row.precision, wanted))
        if has(results, row, column):
            mean = _estimate(results, group, row, column)
            cell.value, cell.stderr, cell.mark = mean.value, mean.stderr, marks.get((row, column), "")
            cell.files = files_of(results, [row], column, _shown_seeds(results, group, row))
        cells.append(cell)
    if row in _held(results, group):
        found = tests.compare(row, group.reference, AVERAGE, group.seeds)
        mark = "significant" if adjusted[row, group.reference, AVERAGE] < ALPHA else ""
        files = files_compared(results, row, group.reference, AVERAGE, group.seeds)
        cells += [
            Cell(found.difference, found.stderr, mark=mark, signed=True, files=files),
            Cell(found.detectable() or None, files=files),
        ]
    else:
        cells += [Cell(text="reference" if row == group.reference else "–"), Cell(text="–")]
    return Line(
        [label(experiment, row), row.precision.removesuffix("-outliers")], cells, group.title, _run(results, group, row)
    )


def _run(results: Results, group: Group, row: Row) -> str:
    """What was run, with the seeds that are shown; the others that the row has, or lacks, are said."""
    experiment, shown = results.experiment, _shown_seeds(results, group, row)
    run = what_was_run(experiment, shown)
    rest = tuple(seed for seed in results.seeds[row] if seed not in shown)
    if rest:
        run += f" (also run: {seed_range(rest)})"
    if row in group.apart:
        run += f"; NOT COMPARED: lacks {seed_range(tuple(s for s in group.seeds if s not in results.seeds[row]))}"
    rounded = row not in (TEACHER, BASELINE) and experiment.recipes[row.recipe].post_training is not None
    return run + ("; rounded, not trained" if rounded else "")


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
    tables["2"] = _blocks(experiment, {p: pick((*ROUNDINGS, "none", GRACE, "variant"), p) for p in INTEGERS}, base)
    if tables["2"] and base:
        tables["2"].insert(0, Group("bf16, where they start", [base], base, (base,)))
    tables["4"] = _blocks(experiment, {p: pick(("none", "kd", GRACE), p) for p in INTEGERS}, None)
    outliers = sorted({row.precision for row in results.rows() if row.precision.endswith("-outliers")}, reverse=True)
    everything = (*ROUNDINGS, "none", "kd", *ABLATION[1:], "variant")
    tables["outliers"] = _blocks(experiment, {p: pick(everything, p) for p in outliers}, base)
    return {paper_table: on_shared_seeds(results, groups) for paper_table, groups in tables.items()}


def _blocks(experiment, rows: dict[str, list[Row]], reference: Row | None) -> list[Group]:
    """A block per precision; without a reference of its own, each is held against its QAT row."""
    blocks = []
    for precision, found in rows.items():
        if not found:
            continue
        own = reference or next((row for row in found if row_role(experiment, row) == "none"), None)
        blocks.append(Group(precision.upper().replace("-OUTLIERS", " under the outlier transform"), found, own))
    return blocks
