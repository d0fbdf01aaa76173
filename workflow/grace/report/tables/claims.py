"""The table of claims: each claim of the paper, what was measured for it here, and a verdict in plain words."""

from dataclasses import dataclass

from grace.report.paper import ARXIV, AVERAGE, GRACE, label, paper_numbers, row_role, what_was_run
from grace.report.tables.footnotes import gaps
from grace.report.tables.scores import Family
from grace.report.tables.table import Cell, Line, Table, number, p_text
from grace.results.read import BASELINE, TEACHER, Results, Row
from grace.results.statistics import ALPHA, Comparison, holm, minimum_detectable_difference


@dataclass(frozen=True)
class Claim:
    """A should be above B (`sign` 1), below it (-1), or the paper only says by how much (0)."""

    text: str
    a: Row
    b: Row
    sign: int
    tables: tuple[str, ...] = ()  # the paper's tables that may hold both rows: the first that does counts


@dataclass(frozen=True)
class Finding:
    """A claim with its measurement on the average of all benchmarks."""

    claim: Claim
    comparison: Comparison
    p: float | None  # over questions and seeds, None with one seed; after Holm's correction, like the next
    p_questions: float  # of these very models, over questions alone
    paper: float | None
    verdict: str


def claims_of(results: Results) -> list[Claim]:
    """The paper's claims for which this experiment has both sides."""
    experiment = results.experiment
    at = {(row_role(experiment, row), row.precision): row for row in results.rows()}
    quantised = [p for p in ("int8", "int4", "int3", "int2", "int4-outliers") if any(key[1] == p for key in at)]

    def name(precision: str) -> str:
        return precision.upper().replace("-OUTLIERS", " under outliers")

    wanted = [("The teacher is above the bf16 student", TEACHER, BASELINE, 1, ("1", "3"))]
    wanted += [(f"Rounding hurts at {name(p)}", at.get(("rtn", p)), BASELINE, -1, ("12",)) for p in quantised]
    wanted += [
        (f"QAT recovers what rounding loses at {name(p)}", at.get(("none", p)), at.get(("rtn", p)), 1, ("2",))
        for p in quantised
    ]
    wanted += [
        (f"GRACE is above {other} at {name(p)}", at.get((GRACE, p)), at.get((key, p)), 1, ("2", "4"))
        for key, other in (("none", "QAT"), ("kd", "QAT + KD"))
        for p in quantised
    ]
    bf16 = at.get((GRACE, "bf16"))
    wanted += [
        ("GRACE is above the baseline at bf16", bf16, BASELINE, 1, ("1", "3")),
        ("GRACE is above plain fine-tuning of the same budget at bf16", bf16, at.get(("none", "bf16")), 1, ("3",)),
        ("GRACE is above plain KD of the same budget at bf16", bf16, at.get(("kd", "bf16")), 1),
        ("GRACE at INT4 is above the bf16 baseline", at.get((GRACE, "int4")), BASELINE, 1, ("12", "34")),
        ("GRACE at INT4 is close to the distilled bf16 control", at.get((GRACE, "int4")), bf16, 0, ("12", "34")),
    ]
    there = {row for row in results.seeds if results.has_average(row)}
    return [Claim(*claim) for claim in wanted if {claim[1], claim[2]} <= there]


def findings(results: Results, known: dict | None = None) -> list[Finding]:
    """Measure every claim; p values are corrected over all of them."""
    tests = Family(results, {} if known is None else known)
    claims = claims_of(results)
    measured = [tests.show(claim.a, claim.b, AVERAGE) for claim in claims]
    questions = holm([each.p_questions for each in measured])
    several = [place for place, each in enumerate(measured) if each.seeds > 1]
    both = dict(zip(several, holm([measured[place].p for place in several]), strict=True))
    found = []
    for place, (claim, each, q) in enumerate(zip(claims, measured, questions, strict=True)):
        p = float(both[place]) if place in both else None
        paper = _paper_difference(results, claim)
        found.append(Finding(claim, each, p, float(q), paper, _verdict(claim, each, p, float(q))))
    return found


def _verdict(claim: Claim, found: Comparison, p: float | None, p_questions: float) -> str:
    """Plain words; the two p values are corrected for the other claims."""
    low, high = found.interval()
    span = f"95% interval {number(low)} to {number(high)}"
    seeds = "one seed" if found.seeds == 1 else f"{found.seeds} seeds"
    if claim.sign == 0:
        holds = "A difference is left"
    else:
        holds = "Holds" if found.difference * claim.sign > 0 else "The reverse holds"
    if p is not None and p < ALPHA:
        return f"{holds} ({span}, {seeds})."
    if p_questions < ALPHA:
        return f"{holds} for these very models, but {seeds} cannot say it of the method ({span})."
    if claim.sign == 0:
        return f"No difference is found ({span}, {seeds})."
    if found.p < ALPHA:
        return f"Not shown: it does not stand beside so many other claims ({span}, {seeds})."
    least = minimum_detectable_difference(found.stderr, found.df)
    return f"Not shown: within noise ({span}, {seeds}); about {number(least)} points would have been found."


def _paper_difference(results: Results, claim: Claim) -> float | None:
    """The paper's difference: of its averages, or, where a row has none, over the benchmarks that both rows have."""
    numbers = paper_numbers()
    numbers = numbers[numbers["source"] == ("release" if results.experiment.family == "qwen3_vl" else "paper")]
    # of two tables that hold both rows, the one about this experiment's family
    tables = claim.tables[::-1] if results.experiment.family == "qwen2_vl" else claim.tables
    for table in tables:
        sides = []
        for row in (claim.a, claim.b):
            found = numbers[numbers["table"].isin(list(table)) & (numbers["precision"] == row.precision)]
            found = found[found["role"] == row_role(results.experiment, row)]
            sides.append(found.drop_duplicates("benchmark").set_index("benchmark")["value"])
        shared = sides[0].index.intersection(sides[1].index)
        if AVERAGE in shared:
            return float(sides[0][AVERAGE] - sides[1][AVERAGE])
        shared = shared.drop("MME", errors="ignore")  # MME counts up to 2,000, the others up to 100
        if len(shared):
            return float((sides[0][shared] - sides[1][shared]).mean())
    return None


def names(results: Results, claim: Claim) -> tuple[str, str]:
    """The two sides of a claim, for people."""
    a, b = (f"{label(results.experiment, row)} {row.precision}".replace("-outliers", "") for row in (claim.a, claim.b))
    return a, b


def claims_table(results: Results, known: dict | None = None) -> Table:
    """Every claim with the paper's difference, ours, its tests and a verdict."""
    found = findings(results, known)
    table = Table(
        "claims",
        "Claims: what the paper says and what was measured here",
        ["Claim", "Compared", "Verdict"],
        ["paper", "here", "p, questions", "p, seeds too"],
    )
    for item in found:
        seeds = sorted({*results.seeds[item.claim.a], *results.seeds[item.claim.b]} - {""})
        if TEACHER not in (item.claim.a, item.claim.b):
            seeds = [seed for seed in results.seeds[item.claim.a] if seed in results.seeds[item.claim.b]] or seeds
        cells = [
            Cell(item.paper, signed=True),
            Cell(item.comparison.difference, item.comparison.stderr, signed=True),
            *(
                Cell(p, text="–" if p is None else p_text(p).removeprefix("p = ").removeprefix("p "))
                for p in (item.p_questions, item.p)
            ),
        ]
        heads = [item.claim.text, " − ".join(names(results, item.claim)), item.verdict]
        table.lines.append(Line(heads, cells, "", what_was_run(results.experiment, tuple(seeds))))
    table.notes = [
        f"Differences are of the plain mean over {len(results.averaged)} benchmarks, in points, paired by question and by the "
        "seeds that both sides have, ± standard error. Whatever they show stands here.",
        "p, questions: paired bootstrap over images, about these very models. p, seeds too: the larger of that and a t test "
        "that holds the variance between seeds, about the method; a dash with one seed, which cannot tell. Both after Holm's correction over "
        f"the {len(found)} claims of this table; “holds” means below {ALPHA:.0%}. The intervals are not corrected. With two or "
        "three seeds that differ much, the second errs a little more often than it says (in up to 12% or 8% instead of 5%).",
        f"Paper: {ARXIV}, difference of its averages (Tables 1 and 2, LLaVA-1.5), or, where a row has none, over the "
        "benchmarks that both rows have (Tables 3 and 4, Qwen2-VL). A dash: the paper has no such pair; it has no rows at "
        "INT3, INT2 or under the outlier transform.",
        *gaps(results),
    ]
    return table


def main_finding(results: Results, known: dict | None = None) -> str:
    """The experiment in one sentence: GRACE at INT4 against QAT, or the nearest claim to that which was measured."""
    found = findings(results, known)
    order = [
        "GRACE is above QAT at INT4",
        "GRACE at INT4 is above the bf16 baseline",
        "GRACE is above the baseline at bf16",
    ]
    item = next((i for text in order for i in found if i.claim.text == text), found[0] if found else None)
    if item is None:
        return "Nothing can be compared yet: the two sides of no claim have predictions."
    a, b = names(results, item.claim)
    rows = [results.estimate(row).value for row in (item.claim.a, item.claim.b)]
    low, high = item.comparison.interval()
    gap = item.comparison.difference
    if item.p is not None and item.p < ALPHA:
        said = "more than noise"
    elif item.p_questions < ALPHA:
        said = "true of these very models, not shown of the method"
    else:
        said = "within noise"
    side = "above" if gap > 0 else "below"
    return (
        f"{a} scores {number(rows[0])} points on average and {b} {number(rows[1])}: paired, {a} is {number(abs(gap))} {side} "
        f"(95% interval {number(low)} to {number(high)}, {p_text(item.p_questions if item.p is None else item.p)} after correction), {said}."
    )
