"""Paired comparisons of rows: measured once however many tables show them, corrected per table."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from grace.report.paper import AVERAGE
from grace.results.paired import Comparison, compare, holm
from grace.results.read import TEACHER, Results, Row
from grace.results.statistics import Scores


@dataclass
class Family:
    """The family of tests that a table shows, corrected together once all are known."""

    results: Results
    known: dict = field(default_factory=dict)  # shared between tables
    shown: list[tuple] = field(default_factory=list)

    def compare(self, a: Row, b: Row, column: str, seeds: tuple[int, ...] = ()) -> Comparison:
        """A less B in one column, on `seeds` (none: all that both have); computed once however many tables need it."""
        key = (a, b, column, seeds or _both(self.results, a, b))
        if key not in self.known:
            self.known[key] = compare(
                parts_of(self.results, a, column, key[-1]), parts_of(self.results, b, column, key[-1])
            )
        return self.known[key]

    def show(self, a: Row, b: Row, column: str, seeds: tuple[int, ...] = ()) -> Comparison:
        """The same, counted into the table's family."""
        key = (a, b, column, seeds or _both(self.results, a, b))
        if key not in self.shown:
            self.shown.append(key)
        return self.compare(*key)

    def adjusted(self) -> dict[tuple, float]:
        """Holm-adjusted p of every comparison shown, by (a, b, column)."""
        keys = [key[:3] for key in self.shown]
        return dict(zip(keys, holm([self.known[key].p for key in self.shown]), strict=True))


def _both(results: Results, a: Row, b: Row) -> tuple[int, ...]:
    """Seeds that two rows share; none where one is the teacher or they share none."""
    if TEACHER in (a, b):
        return ()
    return tuple(seed for seed in results.seeds[a] if seed in results.seeds[b])


def parts_of(results: Results, row: Row, column: str, seeds: tuple[int, ...] = ()) -> list[Scores]:
    parts = results.all_scores(row) if column == AVERAGE else [results.scores(row, column)]
    return [part.only(seeds) for part in parts] if seeds and row != TEACHER else parts


def files_of(results: Results, rows: Iterable[Row], column: str, seeds: tuple[int, ...] = ()) -> tuple[str, ...]:
    """The predictions of some rows in one column, on `seeds` (none: all that each has)."""
    wanted = None if column == AVERAGE else column
    return tuple(file for row in rows for file in results.files(row, wanted, seeds))


def files_compared(results: Results, a: Row, b: Row, column: str, seeds: tuple[int, ...] = ()) -> tuple[str, ...]:
    """The predictions that a comparison of two rows in one column is made of."""
    return files_of(results, (a, b), column, seeds or _both(results, a, b))


def has(results: Results, row: Row, column: str) -> bool:
    """Whether a row has a number in a column: partial results leave gaps."""
    return results.has_average(row) if column == AVERAGE else results.has(row, column)
