"""metrics.json: the numbers that `dvc metrics diff` compares between two versions; speed is in `grace.report.speed`."""

from pathlib import Path
from typing import Any

from grace.files import write_json
from grace.report.claims import findings
from grace.report.entropy import entropy_numbers
from grace.report.paper import AVERAGE
from grace.results.read import BASELINE, TEACHER, Results, Row


def metrics(results: Results) -> dict[str, Any]:
    """Scores, standard errors and claims' differences in points, unrounded.

    Who shows a number rounds it, once: rounded here too, it could differ in its last digit from the tables'. Keys are
    names, never positions, so that a diff of two versions lines up.
    """
    found: dict[str, Any] = {"scores": {}}
    for row in results.seeds:
        here = found["scores"]
        for key in ("teacher",) if row == TEACHER else (row.recipe, row.precision):
            here = here.setdefault(key, {})
        here.update(_scores(results, row))
    if all(row in results.seeds and results.has_average(row) for row in (TEACHER, BASELINE)):
        gap = results.estimate(TEACHER).value - results.estimate(BASELINE).value
        found["teacher_minus_baseline"] = float(gap)
    found["claims"] = {
        item.claim.text: {
            "verdict": item.decision.verdict,
            "difference": float(item.comparison.difference),
            "stderr": float(item.comparison.stderr),
            **({} if item.p is None else {"p_holm": float(item.p)}),
            "p_holm_questions": float(item.p_questions),
        }
        for item in findings(results)
    }
    entropy = entropy_numbers(results)
    if entropy is not None:
        found["teacher_entropy"] = {"pearson_r": round(entropy["r"], 3), "binned_r2": round(entropy["r2"], 3)}
    return found


def _scores(results: Results, row: Row) -> dict[str, Any]:
    asked = [name for name in results.benchmarks if results.has(row, name)]
    found: dict[str, Any] = {"benchmarks": {name: float(results.estimate(row, name).value) for name in asked}}
    if results.has_average(row):
        average = results.estimate(row)
        found |= {AVERAGE: float(average.value), "average_stderr": float(average.stderr)}
    return found


def write_metrics(results: Results, out: Path) -> None:
    """Write `metrics(results)` to the JSON file `out`."""
    write_json(out, metrics(results))
