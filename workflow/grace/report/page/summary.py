"""How the page opens: what was run, the main finding with its uncertainty, and the averages that matter most."""

from typing import Any

from grace.report.claims import METHOD, Finding, findings, measured, savings, sides
from grace.report.formatting import number, p_text
from grace.report.paper import DEMO, GRACE, label, row_role, seed_range
from grace.report.tables.footnotes import gaps
from grace.report.tables.pairs import pairs, won_and_lost
from grace.results.read import BASELINE, TEACHER, Results, Row


def page_head(results: Results, known: dict) -> dict[str, Any]:
    """What the page's head shows; `known` keeps comparisons for the tables."""
    demo = results.experiment.data.source == "demo"
    return {
        "badge": f"{DEMO}: far smaller models and questions, made here; compare directions, not values" if demo else "",
        "finding": main_finding(results, known),
        "verdicts": verdicts(results, known),
        "won_and_lost": won_and_lost(results, pairs(results, known)),
        "lacking": " ".join(gaps(results)),
        "cards": [_card(results, row) for row in _shown(results)],
        "facts": _facts(results),
    }


MARKS = {"Holds": ("yes", "✓"), "Fails": ("no", "✗"), "Not decided": ("open", "?")}


def verdicts(results: Results, known: dict) -> list[dict[str, Any]]:
    """Per group of claims: each claim in a line, with yes, no or not decided, and why."""
    found = findings(results, known)
    groups: dict[str, list] = {}
    for item in sorted(found, key=lambda item: item.claim.group != METHOD):  # what the method is good for stands first
        groups.setdefault(item.claim.group, []).append((item.claim.text, item.decision))
    for item in (*measured(results), *savings(results)):
        groups.setdefault("Measured values", []).append((item.text, item.decision))
    return [
        {
            "group": group,
            "claims": [(text, *MARKS[verdict], verdict, reason) for text, (verdict, reason) in claims],
            "count": ", ".join(
                f"{sum(decision.verdict == verdict for _, decision in claims)} {said}"
                for verdict, said in (("Holds", "hold"), ("Fails", "fail"), ("Not decided", "not decided"))
                if any(decision.verdict == verdict for _, decision in claims)
            ),
        }
        for group, claims in groups.items()
    ]


def main_finding(results: Results, known: dict | None = None) -> str:
    """The experiment in one sentence: GRACE at INT4 against QAT, or the nearest claim to that which was measured."""
    found = findings(results, known)
    order = (
        "GRACE is above QAT at INT4",
        "GRACE at INT4 is above the bf16 baseline",
        "GRACE is above the baseline at bf16",
    )
    item = next((i for text in order for i in found if i.claim.text == text), found[0] if found else None)
    if item is None:
        return "Nothing can be compared yet: the two sides of no claim have predictions."
    return _sentence(results, item)


def _sentence(results: Results, item: Finding) -> str:
    a, b = sides(results, item.claim)
    gap = item.comparison.difference
    word = {"Holds": "it holds", "Fails": "it fails", "Not decided": "not decided"}[item.decision.verdict]
    p = item.p_questions if item.p is None else item.p
    return (
        f"{a} is {number(abs(gap))} points {'above' if gap >= 0 else 'below'} {b} (paired, {p_text(p)} after "
        f"correction): “{item.claim.text}” – {word}."
    )


def _shown(results: Results) -> list[Row]:
    """Teacher, baseline, and the two sides of the comparison at the fewest bits that are usual: INT4, else bf16."""
    at = {(row_role(results.experiment, row), row.precision): row for row in results.rows()}
    wanted = [TEACHER, BASELINE, *(at.get((role, "int4")) for role in ("rtn", "none", GRACE)), at.get((GRACE, "bf16"))]
    return [row for row in wanted if row in results.seeds and results.has_average(row)]


def _card(results: Results, row: Row) -> dict[str, str]:
    found = results.estimate(row)
    seeds = "one model" if row == TEACHER else seed_range(results.seeds[row])
    return {
        "name": f"{label(results.experiment, row)} {row.precision}",
        "value": number(found.value),
        "about": f"± {number(found.stderr)}, {seeds}",
    }


def _facts(results: Results) -> list[tuple[str, str]]:
    experiment = results.experiment
    models = [
        f"{side}: {model.pretrained or _shape(model)}"
        for side, model in (("teacher", experiment.teacher), ("student", experiment.student))
    ]
    data, length = experiment.data, experiment.finetune
    if data.source == "demo":
        trained = f"{data.images:,} images made here"
        trained += f", students on {data.finetune_images:,} others" if data.finetune_images else ""
        trained += f" of whose answers {data.label_noise:.0%} are wrong" if data.label_noise else ""
    else:
        trained = ", ".join(source.path for source in data.sources)
    first = next(iter(results.seeds))
    asked = sum(results.scores(first, name).values.shape[1] for name in results.benchmarks if results.has(first, name))
    named = [name if name in results.imitations else results.mirrors[name] for name in results.benchmarks]
    harness = results.manifest(first, results.seeds[first][0]).get("harness", {})
    averaged = "all" if len(results.averaged) == len(results.benchmarks) else f"{len(results.averaged)}"
    return [
        ("Models", f"{experiment.family} family; {'; '.join(models)}"),
        ("Trained on", f"{trained}; every student {length.duration} in batches of {length.batch} from its seed's "
         "baseline" if length else "nothing: every student is a released one, or rounded"),
        ("Evaluated", f"{sum(map(len, results.seeds.values()))} models on {asked:,} questions in "
         f"{len(results.benchmarks)} benchmarks ({', '.join(named)}) by "
         f"{' '.join(str(harness[key]) for key in ('name', 'version') if key in harness) or 'an unnamed harness'}"),
        ("Numbers", "points, ± standard error (clustered by image, with the variance between seeds); the average is of "
         f"{averaged} benchmarks"),
    ]  # fmt: skip


def _shape(model) -> str:
    shape = model.architecture
    return f"made here, {shape.layers} layers of width {shape.hidden_size}" if shape else "made here"
