"""What tables with a line for each model have in common: that line, and the mean score over some of its questions."""

import numpy as np
import pandas as pd

from grace.report.paper import label, what_was_run
from grace.report.tables.table import Cell, Line
from grace.results.read import Results, Row
from grace.results.statistics import Scores, estimate


def model_line(results: Results, row: Row, cells: list[Cell]) -> Line:
    """The cells of a model behind its name and precision."""
    run = what_was_run(results.experiment, results.seeds[row])
    return Line([label(results.experiment, row), row.precision], cells, run=run)


def mean_score(results: Results, row: Row, frames: list[pd.DataFrame], files: tuple[str, ...]) -> Cell:
    """100 × the mean of `score` over `frames`, one for each seed, with the same questions in the same order."""
    values = 100 * np.stack([frame["score"].to_numpy(dtype=float) for frame in frames])  # [seeds, questions]
    images = pd.factorize(frames[0]["image_id"])[0]
    found = estimate([Scores(values, images, results.seed_names(row))])
    return Cell(found.value, found.stderr, files=files)
