"""Each comparison of the claims benchmark by benchmark: what was won and lost, and what could have been found."""

from dataclasses import dataclass

from grace.report.claims import METHOD, Claim, claims_of, sides
from grace.report.comparisons import Family
from grace.report.numbers import number
from grace.report.paper import AVERAGE, seed_range, what_was_run
from grace.report.tables.footnotes import gaps
from grace.report.tables.scores import columns_of, heading
from grace.report.tables.table import Cell, Line, Table
from grace.results.read import BASELINE, TEACHER, Results
from grace.results.statistics import ALPHA, POWER, Comparison


@dataclass(frozen=True)
class Pair:
    """A claim's two rows on every benchmark; `significant`: columns that differ after the table's correction."""

    claim: Claim
    found: dict[str, Comparison]
    significant: frozenset[str]

    def said(self, results: Results, sign: int) -> str:
        """Where A is significantly above (`sign` 1) or below B, as `name (difference ± error)`."""
        kept = [
            f"{heading(results, column)} ({'+' if each.difference > 0 else ''}{number(each.difference)} ± {number(each.stderr)})"
            for column, each in self.found.items()
            if column in self.significant and column != AVERAGE and each.difference * sign > 0
        ]
        return ", ".join(kept)


def pairs(results: Results, known: dict) -> list[Pair]:
    """Every two students that a claim about GRACE compares, corrected over all of their benchmarks."""
    tests, columns = Family(results, known), columns_of(results)
    claims = {}
    for claim in claims_of(results):
        if claim.group == METHOD and {TEACHER, BASELINE}.isdisjoint({claim.a, claim.b}) and claim.sign > 0:
            claims.setdefault((claim.a, claim.b), claim)
    found = {claim: {column: tests.show(claim.a, claim.b, column) for column in columns} for claim in claims.values()}
    adjusted = tests.adjusted()
    return [
        Pair(claim, each, frozenset(c for c in columns if adjusted[claim.a, claim.b, c] < ALPHA))
        for claim, each in found.items()
    ]


def pairs_table(results: Results, known: dict) -> Table:
    """Two lines per pair: the differences, and the differences that would have been found."""
    columns, compared = columns_of(results), pairs(results, known)
    headings = [heading(results, column) for column in columns]
    table = Table("pairs", "Pairs: GRACE against each rival, benchmark by benchmark", ["Compared", "Points"], headings)
    for pair in compared:
        a, b = pair.claim.a, pair.claim.b
        name = " − ".join(sides(results, pair.claim))
        shared = tuple(seed for seed in results.seeds[a] if seed in results.seeds[b])
        run = f"{seed_range(results.seeds[a])} against {seed_range(results.seeds[b])}"
        run = f"{what_was_run(results.experiment)}; {seed_range(shared) if shared else run}"
        differences, least = [], []
        for column in columns:
            each = pair.found[column]
            mark = "significant" if column in pair.significant else ""
            differences.append(Cell(each.difference, each.stderr, mark=mark, signed=True))
            least.append(Cell(each.detectable() or None))
        table.lines += [
            Line([name, "difference"], differences, name, run),
            Line([name, "detectable"], least, name, run),
        ]
    if not compared:
        table.notes = ["No two students that a claim about GRACE compares have predictions.", *gaps(results)]
        return table
    count = len(compared) * len(columns)
    table.notes = [
        "Difference: paired by question and by the seeds that both sides have (column Run), ± standard error; * differs at "
        f"{ALPHA:.0%} after Holm's correction over this table's {count} tests, whichever side it favours. Detectable: the true "
        f"difference that this very comparison, with its seeds, finds with {POWER:.0%} power at {ALPHA:.0%}, uncorrected.",
        won_and_lost(results, compared),
        *gaps(results),
    ]
    return table


def won_and_lost(results: Results, compared: list[Pair]) -> str:
    """Every significant win and every significant loss, as plainly."""
    said = []
    for sign, word in ((1, "above"), (-1, "below")):
        found = [(f" {word} ".join(sides(results, pair.claim)), pair.said(results, sign)) for pair in compared]
        said.append("; ".join(f"{names} on {where}" for names, where in found if where) or "nowhere")
    return f"Significantly better: {said[0]}. Significantly worse: {said[1]}."
