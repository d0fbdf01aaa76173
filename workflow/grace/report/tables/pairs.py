"""Each comparison of the claims benchmark by benchmark: what was won and lost, and what could have been found."""

from collections.abc import Iterable
from dataclasses import dataclass

from grace.report.claims import METHOD, Claim, claims_of, sides
from grace.report.comparisons import Family, files_compared
from grace.report.formatting import number
from grace.report.paper import AVERAGE, seed_range, what_was_run
from grace.report.tables.footnotes import gaps
from grace.report.tables.scores import columns_of, heading
from grace.report.tables.table import Cell, Line, Table
from grace.results.paired import Comparison, holm
from grace.results.read import BASELINE, TEACHER, Results
from grace.results.statistics import ALPHA, POWER


@dataclass(frozen=True)
class Pair:
    """A claim's two rows on every benchmark, corrected over these.

    Attributes:
        sure: columns that differ for other seeds too.
        these: columns that differ for these very models, by the questions alone.
    """

    claim: Claim
    found: dict[str, Comparison]
    sure: frozenset[str]
    these: frozenset[str]

    def said(self, results: Results, sign: int, columns: Iterable[str]) -> str:
        """On which of `columns` A is above (`sign` 1) or below B, as `name (difference ± error)`."""
        return ", ".join(
            f"{heading(results, column)} ({'+' if each.difference > 0 else ''}{number(each.difference)} ± "
            f"{number(each.stderr)})"
            for column, each in self.found.items()
            if column in columns and column != AVERAGE and each.difference * sign > 0
        )


def pairs(results: Results, known: dict) -> list[Pair]:
    """Every two students that a claim about GRACE compares, with their significant columns."""
    tests, columns = Family(results, known), columns_of(results)
    claims: dict[tuple, Claim] = {}
    for claim in claims_of(results):
        if claim.group == METHOD and {TEACHER, BASELINE}.isdisjoint({claim.a, claim.b}) and claim.sign > 0:
            claims.setdefault((claim.a, claim.b), claim)
    made = []
    for claim in claims.values():
        found = {column: tests.compare(claim.a, claim.b, column) for column in columns}
        kinds = (holm([getattr(each, kind) for each in found.values()]) for kind in ("p", "p_questions"))
        sure, these = (frozenset(c for c, p in zip(columns, kind, strict=True) if p < ALPHA) for kind in kinds)
        if all(each.seeds == 1 for each in found.values()):
            sure = frozenset()  # one seed is about these very models alone
        made.append(Pair(claim, found, sure, these | sure))
    return made


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
            mark = "significant" if column in pair.sure else ""
            files = files_compared(results, a, b, column)
            differences.append(Cell(each.difference, each.stderr, mark=mark, signed=True, files=files))
            least.append(Cell(each.detectable() or None, files=files))
        table.lines += [
            Line([name, "difference"], differences, name, run),
            Line([name, "detectable"], least, name, run),
        ]
    if not compared:
        table.notes = ["No two students that a claim about GRACE compares have predictions.", *gaps(results)]
        return table
    table.notes = [
        "Difference: paired by question and by the seeds that both sides have (column Run), ± standard error; * "
        f"differs at {ALPHA:.0%} for other seeds too, after Holm's correction over this pair's {len(columns)} tests, "
        f"whichever side it favours. Detectable: the true difference that this very comparison, with its seeds, finds "
        f"with {POWER:.0%} power at {ALPHA:.0%}, uncorrected.",
        *won_and_lost(results, compared),
        *gaps(results),
    ]
    return table


def won_and_lost(results: Results, compared: list[Pair]) -> list[str]:
    """Every significant win and loss on a benchmark, as plainly: for other seeds too,
    and for these very models alone.
    """
    said = []
    for sign, word in ((1, "above"), (-1, "below")):
        tiers = []
        for tier in ("sure", "these"):
            found = []
            for pair in compared:
                columns = pair.sure if tier == "sure" else pair.these - pair.sure
                where = pair.said(results, sign, columns)
                found += [f"{f' {word} '.join(sides(results, pair.claim))} on {where}"] if where else []
            tiers.append("; ".join(found) or "nowhere")
        side = "better" if sign > 0 else "worse"
        said.append(f"Significantly {side}: {tiers[0]}. Of these very models alone: {tiers[1]}.")
    return said
