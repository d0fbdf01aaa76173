"""The paper's claims as rules over an experiment's results: which two rows each compares, and what is found."""

from dataclasses import dataclass

from grace.precision import INTEGERS
from grace.report.comparisons import Family
from grace.report.decoding import DECODE, decode_rows, dense_beside
from grace.report.entropy import entropy_files, entropy_numbers
from grace.report.paper import AVERAGE, GRACE, label, paper_family, paper_numbers, row_role
from grace.report.verdicts import LEAST_SEEDS, METHOD_SEEDS, Decision, decide, from_value
from grace.results.paired import Comparison, holm
from grace.results.read import BASELINE, TEACHER, Results, Row

QUANTISED = (*INTEGERS, "int4-outliers")
GROUND, METHOD, PARTS_GROUP = "What GRACE starts from", "GRACE", "GRACE's parts"
_PARTS = {"gdkd": "Gated decoupled KD", "rcka": "Relational CKA", "ib": "The controller"}
_PAIRS = {"gdkd+rcka": "without the controller", "gdkd+ib": "without relational CKA", "rcka+ib": "without GDKD"}
_SAVINGS = (
    ("INT4 decodes three times as fast as bf16", "tokens/s over bf16", "tokens_per_second", 3.0),
    ("INT4 takes 54% less memory than bf16", "peak memory over bf16", "peak_mib", 0.46),
)
_ENTROPY = "The teacher errs more often where it is unsure"


@dataclass(frozen=True)
class Claim:
    """A should be above B (`sign` 1), below it (-1), or close to it (0); Holm's correction runs over a `group`."""

    group: str
    text: str
    a: Row
    b: Row
    sign: int
    tables: tuple[str, ...] = ()  # the paper's tables that may hold both rows: the first that does counts

    @property
    def least_seeds(self) -> int:
        return LEAST_SEEDS if self.group == GROUND else METHOD_SEEDS


@dataclass(frozen=True)
class Finding:
    """A claim with its measurement on the average of all benchmarks, in points."""

    claim: Claim
    comparison: Comparison
    p: float | None  # over questions and seeds, None with one seed; after Holm's correction, like the next
    p_questions: float  # of these very models, over questions alone
    paper: float | None
    decision: Decision


@dataclass(frozen=True)
class Measured:
    """A claim about one measured value, which no two rows are compared for."""

    text: str
    what: str
    value: float
    stderr: float | None
    paper: float
    decision: Decision
    files: tuple[str, ...]  # that it is computed from, below the experiment's folder


def claims_of(results: Results) -> list[Claim]:
    """The paper's claims for which this experiment has both sides, by group."""
    experiment = results.experiment
    at = {(row_role(experiment, row), row.precision): row for row in results.rows()}
    quantised = [p for p in QUANTISED if any(key[1] == p for key in at)]

    def name(precision: str) -> str:
        return precision.upper().replace("-OUTLIERS", " under outliers")

    bf16, plain = at.get((GRACE, "bf16")), at.get(("none", "bf16"))
    wanted: list[tuple] = [(GROUND, "The teacher is above the bf16 student", TEACHER, BASELINE, 1, ("1", "3"))]
    wanted += [(GROUND, f"Rounding hurts at {name(p)}", at.get(("rtn", p)), BASELINE, -1, ("12",)) for p in quantised]
    wanted += [
        (GROUND, f"QAT recovers what rounding loses at {name(p)}", at.get(("none", p)), at.get(("rtn", p)), 1, ("2",))
        for p in quantised
    ]
    wanted += [
        (METHOD, f"GRACE is above {other} at {name(p)}", at.get((GRACE, p)), at.get((key, p)), 1, ("2", "4"))
        for key, other in (("none", "QAT"), ("kd", "QAT + KD"))
        for p in quantised
    ]
    wanted += [
        (METHOD, "GRACE is above the baseline at bf16", bf16, BASELINE, 1, ("1", "3")),
        (METHOD, "GRACE is above plain fine-tuning of the same budget at bf16", bf16, plain, 1, ("3",)),
        (METHOD, "GRACE is above plain KD of the same budget at bf16", bf16, at.get(("kd", "bf16")), 1),
        (METHOD, "GRACE at INT4 is above the bf16 baseline", at.get((GRACE, "int4")), BASELINE, 1, ("12", "34")),
        (METHOD, "GRACE at INT4 is above fine-tuning at bf16", at.get((GRACE, "int4")), plain, 1, ("34",)),
        (METHOD, "GRACE at INT4 is close to GRACE at bf16", at.get((GRACE, "int4")), bf16, 0, ("12", "34")),
    ]
    wanted += [
        (PARTS_GROUP, f"{said} alone is above plain fine-tuning at bf16", at.get((key, "bf16")), plain, 1, ("3",))
        for key, said in _PARTS.items()
    ]
    wanted += [
        (PARTS_GROUP, f"GRACE is above GRACE {said} at bf16", bf16, at.get((key, "bf16")), 1, ("3",))
        for key, said in _PAIRS.items()
    ]
    there = {row for row in results.seeds if results.has_average(row)}
    return [Claim(*claim) for claim in wanted if {claim[2], claim[3]} <= there]


def findings(results: Results, known: dict | None = None) -> list[Finding]:
    """Measure every claim; p values and intervals are corrected over the claims of its group."""
    tests = Family(results, {} if known is None else known)
    claims = claims_of(results)
    found = []
    for group in dict.fromkeys(claim.group for claim in claims):
        own = [claim for claim in claims if claim.group == group]
        measured = [tests.compare(claim.a, claim.b, AVERAGE) for claim in own]
        questions = holm([each.p_questions for each in measured])
        several = [place for place, each in enumerate(measured) if each.seeds > 1]
        both = dict(zip(several, holm([measured[place].p for place in several]), strict=True))
        for place, (claim, each) in enumerate(zip(own, measured, strict=True)):
            p = float(both[place]) if place in both else None
            decision = decide(each, p, claim.sign, claim.least_seeds, len(own))
            paper = _paper_difference(results, claim)
            found.append(Finding(claim, each, p, float(questions[place]), paper, decision))
    return found


def measured(results: Results) -> list[Measured]:
    """The paper's claim about the teacher's entropy, its motivation."""
    numbers = entropy_numbers(results)
    if numbers is None or not numbers["stderr"] > 0:
        return []
    decision = from_value(numbers["r"], numbers["stderr"], 0.0)
    what, files = "Pearson r of entropy and error", entropy_files(results)
    return [Measured(_ENTROPY, what, numbers["r"], numbers["stderr"], 0.484, decision, files)]


def savings(results: Results) -> list[Measured]:
    """The paper's claims about what INT4 saves, of the largest batch that was timed."""
    found = []
    rows = decode_rows(results)
    ours = [(row, record) for row, record in rows if row.precision == "int4" and record["cache"] == 16]
    if ours:
        _, record = max(ours, key=lambda each: (row_role(results.experiment, each[0]) == GRACE, each[1]["batch"]))
        dense = dense_beside(rows, record) or {}
        for text, what, key, paper in _SAVINGS if dense else ():
            value = record[key] / dense[key]
            reached = value >= paper if paper > 1 else value <= paper
            on = f"{value:.2f} on {record['device']}, batch {int(record['batch'])}"
            decision = Decision("Holds" if reached else "Fails", on)
            if paper_family(results.experiment) is None or str(record["device"]).startswith("cpu"):
                decision = Decision("Not decided", f"{on}: it would take the paper's own models on a GPU")
            found.append(Measured(text, what, value, None, paper, decision, (DECODE,)))
    return found


def sides(results: Results, claim: Claim) -> tuple[str, str]:
    """The two sides of a claim, for people."""
    a, b = (f"{label(results.experiment, row)} {row.precision}".replace("-outliers", "") for row in (claim.a, claim.b))
    return a, b


def _paper_difference(results: Results, claim: Claim) -> float | None:
    """The paper's difference: of its averages, or, where a row has none, over the benchmarks that both rows have."""
    numbers = paper_numbers()
    numbers = numbers[numbers["source"] == ("release" if results.experiment.family == "qwen3_vl" else "paper")]
    # of two tables that hold both rows, the one about this experiment's family
    tables = claim.tables[::-1] if results.experiment.family == "qwen2_vl" else claim.tables
    for table in tables:
        found = []
        for row in (claim.a, claim.b):
            own = numbers[numbers["table"].isin(list(table)) & (numbers["precision"] == row.precision)]
            own = own[own["role"] == row_role(results.experiment, row)]
            found.append(own.drop_duplicates("benchmark").set_index("benchmark")["value"])
        shared = found[0].index.intersection(found[1].index)
        if AVERAGE in shared:
            return float(found[0][AVERAGE] - found[1][AVERAGE])
        shared = shared.drop("MME", errors="ignore")  # MME counts up to 2,000, the others up to 100
        if len(shared):
            return float((found[0][shared] - found[1][shared]).mean())
    return None
