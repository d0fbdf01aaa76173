"""The table of claims: each claim of the paper, its verdict, what was measured for it here, and why."""

from grace.report.claims import Finding, Measured, findings, measured, savings, sides
from grace.report.comparisons import files_compared
from grace.report.formatting import p_text
from grace.report.paper import ARXIV, AVERAGE, seed_range, what_was_run
from grace.report.tables.footnotes import gaps
from grace.report.tables.table import Cell, Line, Table
from grace.report.verdicts import CLOSE, LEAST_SEEDS, MARGIN, METHOD_SEEDS
from grace.results.read import TEACHER, Results
from grace.results.statistics import ALPHA, POWER


def claims_table(results: Results, known: dict | None = None) -> Table:
    """Every claim with its verdict, the paper's difference, ours and its tests."""
    table = Table(
        "claims",
        "Claims: what the paper says and what was measured here",
        ["Claim", "Verdict", "Compared", "Why"],
        ["paper", "here", "p, questions", "p, seeds too"],
    )
    found = findings(results, known)
    table.lines = [_line(results, item) for item in found]
    for item in measured(results):
        line = _measured(results, item)
        line.cells += [Cell(text="–"), Cell(text="–")]
        line.group = "Measured values"
        table.lines.append(line)
    sizes = {group: sum(item.claim.group == group for item in found) for group in _groups(found)}
    table.notes = [
        f"Differences are of the plain mean over {len(results.averaged)} benchmarks, in points, paired by question and "
        "by the seeds that both sides have, ± standard error. Whatever they show stands here.",
        f"Holds: p, seeds too below {ALPHA:.0%}, at least {MARGIN:g} points, on at least {LEAST_SEEDS} seeds "
        f"({METHOD_SEEDS} for GRACE and its parts). Fails: the reverse is as sure, or the whole interval lies below "
        f"{MARGIN:g} points. “Close” holds where the interval lies within {CLOSE:g} points. All else is not decided; "
        f"what it would take finds the difference seen here with {POWER:.0%} power.",
        "p, questions: paired bootstrap over images, about these very models. p, seeds too: the largest of that and "
        "two t tests that hold the variance between seeds, about the method; a dash with one seed, which cannot tell. "
        "p values (Holm) and the intervals that verdicts are made by (Bonferroni; those shown are single ones) are "
        f"corrected over the claims of a group ({', '.join(f'{g}: {n}' for g, n in sizes.items())}).",
        f"Paper: {ARXIV}, difference of its averages (Tables 1 and 2, LLaVA-1.5), or, where a row has none, over the "
        "benchmarks that both rows have (Tables 3 and 4, Qwen2-VL). A dash: the paper has no such pair; it has no rows "
        "at INT3, INT2 or under the outlier transform.",
        *gaps(results),
    ]
    return table


def savings_table(results: Results) -> Table:
    """What the paper says that INT4 saves, and what was measured of it."""
    heads = ["Claim", "Verdict", "Compared", "Why"]
    table = Table(
        "savings",
        "Savings: what the paper says of speed and memory, and what was measured here",
        heads,
        ["paper", "here"],
    )
    table.lines = [_measured(results, item) for item in savings(results)]
    table.notes = [
        f"Paper: {ARXIV}. Compared: INT4 over the bf16 baseline in one run, at the largest batch that was timed."
    ]
    return table


def _measured(results: Results, item: Measured) -> Line:
    cells = [Cell(item.paper, digits=2), Cell(item.value, item.stderr, digits=2, files=item.files)]
    heads = [item.text, item.decision.verdict, item.what, item.decision.reason]
    return Line(heads, cells, "", what_was_run(results.experiment))


def _groups(found: list[Finding]) -> list[str]:
    return list(dict.fromkeys(item.claim.group for item in found))


def _line(results: Results, item: Finding) -> Line:
    claim = item.claim
    a, b = results.seeds[claim.a], results.seeds[claim.b]
    seeds = b if claim.a == TEACHER else tuple(seed for seed in a if seed in b) or a
    files = files_compared(results, claim.a, claim.b, AVERAGE)
    cells = [
        Cell(item.paper, signed=True),
        Cell(item.comparison.difference, item.comparison.stderr, signed=True, files=files),
        *(
            Cell(p, text="–" if p is None else p_text(p).removeprefix("p = ").removeprefix("p "), files=files)
            for p in (item.p_questions, item.p)
        ),
    ]
    heads = [claim.text, item.decision.verdict, " − ".join(sides(results, claim)), item.decision.reason]
    return Line(heads, cells, claim.group, f"{what_was_run(results.experiment)}; {seed_range(seeds)}")
