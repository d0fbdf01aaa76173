"""The language side: lm-eval's text-only tasks, every model beside the baseline, to see what quantisation cost."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from grace.errors import GraceError
from grace.report.tables.footnotes import gaps
from grace.report.tables.models import model_line
from grace.report.tables.table import Cell, Table
from grace.results.paired import Comparison, compare, holm
from grace.results.read import BASELINE, Results, Row
from grace.results.statistics import ALPHA, Scores, estimate

Column = tuple[str, str, str]  # task as the config names it, task in lm-eval's results, metric
# aggregates of sum(log-likelihood) / sum(weight), and their derivatives by it
_RATIOS: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "word_perplexity": (lambda r: math.exp(-r), lambda r: -math.exp(-r)),
    "byte_perplexity": (lambda r: math.exp(-r), lambda r: -math.exp(-r)),
    "perplexity": (lambda r: math.exp(-r), lambda r: -math.exp(-r)),
    "bits_per_byte": (lambda r: -r / math.log(2), lambda r: -1 / math.log(2)),
}


def text_points(values: pd.Series, metric: str) -> np.ndarray:
    """Points [texts] whose mean is lm-eval's aggregate: 100 x the score, or a perplexity plus each text's influence on
    it.

    `values`: per text a list, [score], [log-likelihood] or [log-likelihood, weight].
    """
    first = np.array([value[0] for value in values])
    if metric not in _RATIOS:
        return 100 * first
    weight = np.array([value[1] if len(value) > 1 else 1.0 for value in values])
    form, slope = _RATIOS[metric]
    ratio = float(first.sum() / weight.sum())
    return form(ratio) + slope(ratio) * (first - ratio * weight) / weight.mean()


def language_table(results: Results) -> Table:
    """Every model on every metric of the language tasks; * marks what differs from the baseline."""
    table = Table(
        "language",
        "Language: text-only tasks, which show what quantisation cost the language side",
        ["Model", "Bits"],
        [],
    )
    found = _columns(results)
    if not found:
        table.notes = ["No text-only task was run: name some under `evaluation.language`."]
        return table
    table.columns = [f"{task} {metric.replace('_', ' ')}" for _, task, metric in found]
    cells = {row: [_scores(results, row, column) for column in found] for row in results.seeds}
    tests: dict[tuple[Row, int], Comparison] = {}
    for row, scores in cells.items():
        for place, own in enumerate(scores):
            base = cells.get(BASELINE, [None] * len(found))[place]
            if row != BASELINE and own is not None and base is not None:
                tests[row, place] = compare([own], [base])
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    for row, scores in cells.items():
        line = []
        for place, own in enumerate(scores):
            mean = None if own is None else estimate([own])
            mark = "significant" if adjusted.get((row, place), 1.0) < ALPHA else ""
            digits = 2 if found[place][2] in _RATIOS else 1
            files = () if mean is None else _files(results, row, found[place][0])
            line.append(
                Cell() if mean is None else Cell(mean.value, mean.stderr, mark=mark, digits=digits, files=files)
            )
        table.lines.append(model_line(results, row, line))
    table.notes = [
        "lm-eval's own aggregates, mean over seeds ± standard error over texts (and seeds): scores in percent (higher "
        "is better), perplexities and bits per byte (lower is better).",
        f"* differs from the baseline at {ALPHA:.0%} after Holm's correction over this table's {len(tests)} tests, "
        "paired by text.",
        *gaps(results),
    ]
    return table


def _about(results: Results, row: Row, seed: int, task: str) -> dict:
    return results.manifest(row, seed).get("language", {}).get(task, {})


def _files(results: Results, row: Row, task: str) -> tuple[str, ...]:
    """The rows of a task's texts, of every seed, below the experiment's folder."""
    return tuple(
        f"{row.folder(seed)}/predictions/{_about(results, row, seed, task)['file']}" for seed in results.seeds[row]
    )


def _columns(results: Results) -> list[Column]:
    """Every task and metric that some model has, in the config's order."""
    found: dict[Column, None] = {}
    for task in results.experiment.evaluation.language:
        for row, seeds in results.seeds.items():
            for name, totals in _about(results, row, seeds[0], task).get("results", {}).items():
                found |= dict.fromkeys(
                    (task, name, key) for key in totals if "stderr" not in key and key != "sample_len"
                )
    return list(found)


def _scores(results: Results, row: Row, column: Column) -> Scores | None:
    """Points [seeds, texts] of a row; None where a seed lacks the task.
    Raises GraceError where lm-eval's number differs.
    """
    task, name, metric = column
    values, texts = [], []
    for seed in results.seeds[row]:
        about = _about(results, row, seed, task)
        path = results.folder / row.folder(seed) / "predictions" / about.get("file", "-")
        if metric not in about.get("results", {}).get(name, {}) or not path.is_file():
            return None
        rows = pd.read_parquet(path)
        rows = rows[(rows["task"] == name) & (rows["metric"] == metric)].sort_values("sample_id", kind="stable")
        if rows.empty:  # an aggregate of sub-tasks, which has no texts of its own
            return None
        points = text_points(rows["values"], metric)
        theirs = about["results"][name][metric] * (1 if metric in _RATIOS else 100)
        if not math.isclose(points.mean(), theirs, rel_tol=1e-6, abs_tol=1e-9):
            raise GraceError(
                f"{path}: {metric} of its texts is {points.mean():.6g}, lm-eval said {theirs:.6g}; evaluate again"
            )
        values.append(points)
        texts.append(tuple(rows["sample_id"]))
    if len(set(texts)) > 1:
        raise GraceError(
            f"{results.folder / row.folder(results.seeds[row][0])}: its seeds were asked different texts of {task}"
        )
    return Scores(np.stack(values), np.arange(len(texts[0])), results.seed_names(row))
