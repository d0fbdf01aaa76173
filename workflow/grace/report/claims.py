"""tables/claims.md: each claim of the paper, what was measured for it here, and a verdict in plain words."""

from dataclasses import dataclass

from grace.report.paper import ARXIV, GRACE, label, paper_numbers, row_role, what_was_run
from grace.report.read import BASELINE, TEACHER, Results, Row
from grace.report.render import Cell, cell_texts, number, p_text
from grace.report.score_tables import AVERAGE, Family
from grace.report.stats import ALPHA, Comparison, holm, minimum_detectable_difference


@dataclass(frozen=True)
class Claim:
    """A should be above B (`sign` 1), below it (-1), or the paper only says by how much (0)."""

    text: str
    a: Row
    b: Row
    sign: int
    tables: str = ""  # the paper's tables that hold both rows


@dataclass(frozen=True)
class Finding:
    """A claim with its measurement on the average of all benchmarks."""

    claim: Claim
    comparison: Comparison
    p: float  # over questions and seeds; after Holm's correction over the page, like the next
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

    wanted = [("The teacher is above the bf16 student", TEACHER, BASELINE, 1, "1")]
    wanted += [(f"Rounding hurts at {name(p)}", at.get(("rtn", p)), BASELINE, -1, "12") for p in quantised]
    wanted += [
        (f"QAT recovers what rounding loses at {name(p)}", at.get(("none", p)), at.get(("rtn", p)), 1, "2")
        for p in quantised
    ]
    wanted += [
        (f"GRACE is above {other} at {name(p)}", at.get((GRACE, p)), at.get((key, p)), 1, "4")
        for key, other in (("none", "QAT"), ("kd", "QAT + KD"))
        for p in quantised
    ]
    bf16 = at.get((GRACE, "bf16"))
    wanted += [
        ("GRACE is above the baseline at bf16", bf16, BASELINE, 1, "1"),
        ("GRACE is above plain fine-tuning of the same budget at bf16", bf16, at.get(("none", "bf16")), 1, "3"),
        ("GRACE is above plain KD of the same budget at bf16", bf16, at.get(("kd", "bf16")), 1, ""),
        ("GRACE at INT4 is above the bf16 baseline", at.get((GRACE, "int4")), BASELINE, 1, "12"),
        ("GRACE at INT4 is close to the distilled bf16 control", at.get((GRACE, "int4")), bf16, 0, "12"),
    ]
    return [Claim(*claim) for claim in wanted if claim[1] in results.seeds and claim[2] in results.seeds]


def findings(results: Results, known: dict | None = None) -> list[Finding]:
    """Measure every claim; p values are corrected over all of them."""
    tests = Family(results, {} if known is None else known)
    claims = claims_of(results)
    measured = [tests.show(claim.a, claim.b, AVERAGE) for claim in claims]
    both, questions = (holm([getattr(each, key) for each in measured]) for key in ("p", "p_questions"))
    return [
        Finding(claim, each, float(p), float(q), _paper_difference(results, claim), _verdict(claim, each, p, q))
        for claim, each, p, q in zip(claims, measured, both, questions, strict=True)
    ]


def _verdict(claim: Claim, found: Comparison, p: float, p_questions: float) -> str:
    """Plain words; the two p values are corrected for the other claims."""
    low, high = found.interval()
    span = f"95% interval {number(low)} to {number(high)}"
    seeds = "one seed" if found.seeds == 1 else f"{found.seeds} seeds"
    if claim.sign == 0:
        holds = "A difference is left"
    else:
        holds = "Holds" if found.difference * claim.sign > 0 else "The reverse holds"
    if p < ALPHA:
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
    source = "release" if results.experiment.family == "qwen3_vl" else "paper"
    numbers = numbers[(numbers["source"] == source) & numbers["table"].isin(list(claim.tables))]
    sides = []
    for row in (claim.a, claim.b):
        role = row_role(results.experiment, row)
        found = numbers[(numbers["role"] == role) & (numbers["precision"] == row.precision)]
        sides.append(found.drop_duplicates("benchmark").set_index("benchmark")["value"])
    shared = sides[0].index.intersection(sides[1].index)
    if AVERAGE in shared:
        return float(sides[0][AVERAGE] - sides[1][AVERAGE])
    shared = shared.drop("MME", errors="ignore")  # MME counts up to 2,000, the others up to 100
    return float((sides[0][shared] - sides[1][shared]).mean()) if len(shared) else None


def claim_texts(results: Results, item: Finding) -> dict[str, str]:
    """A finding as the texts of one row."""
    names = (f"{label(results.experiment, row)} {row.precision}" for row in (item.claim.a, item.claim.b))
    return {
        "text": item.claim.text,
        "sides": " − ".join(names),
        "paper": "".join(cell_texts(Cell(item.paper, signed=True))),
        "here": "".join(cell_texts(Cell(item.comparison.difference, item.comparison.stderr, signed=True, digits=2))),
        "p_questions": p_text(item.p_questions).removeprefix("p = ").removeprefix("p "),
        "p": p_text(item.p).removeprefix("p = ").removeprefix("p "),
        "verdict": item.verdict,
    }


def claims_page(results: Results, known: dict | None = None) -> str:
    """The page as Markdown."""
    experiment = results.experiment
    run = what_was_run(experiment, tuple(experiment.baseline_seeds))
    lines = [
        "# The paper's claims, measured here",
        "",
        f"Experiment `{experiment.experiment}`: {run}. Differences are of the plain mean over {len(results.benchmarks)} "
        "benchmarks, in points, paired by question and by the seeds that both sides have, ± standard error. Whatever they show stands here.",
        "",
        "| Claim | Compared | Paper | Here | p, questions | p, questions and seeds | Verdict |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    found = findings(results, known)
    for item in found:
        texts = claim_texts(results, item)
        lines.append("| " + " | ".join(texts.values()) + " |")
    lines += [
        "",
        f"1. p over questions: paired bootstrap over pictures, about these very models. p over questions and seeds: also a t "
        f"test that holds the variance between seeds, about the method; the larger counts. Both after Holm's correction over the "
        f"{len(found)} claims of this page; “holds” means below {ALPHA:.0%}. With one seed the two are the same.",
        f"2. Paper: {ARXIV}, difference of its averages (LLaVA-1.5), or over the benchmarks that both rows have (Qwen2-VL, Tables 3 and 4). "
        "A dash: the paper has no such pair.",
        "3. The paper has no rows at INT3, INT2 or under the outlier transform.",
    ]
    return "\n".join(lines) + "\n"
