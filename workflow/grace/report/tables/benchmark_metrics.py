"""The literature's own measures beside accuracy: POPE's F1, MME's score, MMBench's circular accuracy,
HallusionBench's.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from grace.report.paper import ARXIV, canonical, paper_beside, paper_family, row_role
from grace.report.tables.models import model_line
from grace.report.tables.table import Cell, Table
from grace.results.read import Results, Row

FOLDS = 10
# of imitations, whose points are the mean score, and of the paper's own, whose points are counted as
# `question_points.SAID` says
IMITATED = {"pope": ("f1",), "mme": ("score",), "circular": ("circular",), "hallusion": ("figure", "question_pair")}
OWN = {
    "pope": ("f1",),
    "pope_lmms": ("f1",),
    "mme": ("accuracy",),
    "circular": ("accuracy",),
    "hallusion": ("accuracy", "figure", "question_pair"),
}
_COLUMNS = ["sample_id", "image_id", "group", "extracted", "target", "score"]
_PAPER = {("mme", "score"): "MME"}  # what the paper prints of them


def jackknife(seeds: Sequence[pd.DataFrame], measure: Callable[[pd.DataFrame], float]) -> tuple[float, float]:
    """Mean over seeds of `measure(rows)` and its standard error, by leaving out one of FOLDS groups of images at a
    time.

    `seeds`: the same questions in the same order, `image_id` a number. These measures are no means of single questions,
    so that the clustered formula does not apply to them. Images are dealt to the groups by their number. With v the
    jackknife variance (k-1)/k sum (value without group - mean of these)^2: C is v of the mean over seeds, I = (mean of
    single seeds' v - C) / (S - 1), B the variance between seeds over S, and the variance C + max(0, B - I), as in
    `results.statistics`.
    """
    values = np.array([measure(rows) for rows in seeds])
    dealt = seeds[0]["image_id"].to_numpy() % FOLDS
    groups = len(np.unique(dealt))
    if groups == 1:  # one image, from which nothing can be generalised
        return float(values.mean()), float("inf")
    each = np.array(
        [[measure(rows[dealt != group]) for group in np.unique(dealt)] for rows in seeds]
    )  # [seeds, groups]
    questions = (groups - 1) * each.mean(axis=0).var()
    if len(seeds) == 1:
        return float(values[0]), float(np.sqrt(questions))
    single = (groups - 1) * each.var(axis=1).mean()
    chance = max(0.0, (single - questions) / (len(seeds) - 1))
    between = values.var(ddof=1) / len(seeds)
    return float(values.mean()), float(np.sqrt(questions + max(0.0, between - chance)))


def measures_table(results: Results) -> Table:
    """Every row on every benchmark that the literature measures otherwise than by the share of right answers."""
    from grace.benchmarks.metrics import METRICS

    wanted = [
        (name, metric, key)
        for name, metric in results.metrics.items()
        for key in (IMITATED if name in results.imitations else OWN).get(metric, ())
    ]
    columns = [f"{name} {key.replace('_', ' ').replace('f1', 'F1')}" for name, _, key in wanted]
    table = Table("measures", "Measures: the literature's own, beside accuracy", ["Model", "Bits"], columns)
    for row in results.seeds if wanted else ():
        cells = [
            _cell(results, row, name, METRICS[metric], metric, key) if results.has(row, name) else Cell()
            for name, metric, key in wanted
        ]
        table.lines.append(model_line(results, row, cells))
    table.notes = [
        "Mean over seeds ± standard error: a jackknife over images and, with several seeds, the variance between them. "
        "All but scores in percent; F1 is that of the answer yes. MME's score adds 100 x (accuracy + share of images "
        "with all answers right) over its sub-tasks: 200 for each. Nothing is tested here."
    ]
    if any(cell.paper is not None for line in table.lines for cell in line.cells):
        table.notes.append(
            f"“paper” is {ARXIV}'s number for {paper_family(results.experiment)}; its MME has ten sub-tasks."
        )
    if not wanted:
        table.notes = ["No benchmark of this experiment has such a measure."]
    return table


def _cell(results: Results, row: Row, name: str, measure: Callable, metric: str, key: str) -> Cell:
    frames = [results.predictions(row, seed, name, _COLUMNS) for seed in results.seeds[row]]
    # Numbers compare faster, and plain strings faster than Arrow's.
    plain = {column: object for column in frames[0].columns if column != "score"}
    frames = [rows.astype(plain).assign(image_id=pd.factorize(rows["image_id"])[0]) for rows in frames]
    value, stderr = jackknife(frames, lambda rows: measure(rows)[key])
    paper = None
    if _PAPER.get((metric, key)) == canonical(results.mirrors.get(name, name)):
        paper = paper_beside(
            results.experiment, "1", row_role(results.experiment, row), row.precision, _PAPER[metric, key]
        )
    scale = 1 if (metric, key) in _PAPER else 100
    return Cell(scale * value, scale * stderr, paper, files=results.files(row, name))
