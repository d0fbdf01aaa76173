"""Points per question, whose mean is the number that a benchmark's own paper prints: 100 x the score, or a linear form.

MME's score, MMBench's circular accuracy and HallusionBench's overall number are means over groups of questions that are
all right. Each is written here as its value plus every question's influence on it (value + influence has that value as
its mean), so that one formula gives every benchmark its standard error, and one test its comparisons.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

from grace.benchmarks.metrics import all_right, circular_questions, hallusion_groups, in_perception

COLUMNS = ("sample_id", "image_id", "group", "score")  # what the forms below read of a predictions file
SAID = {
    "mme": "its score over perception: per sub-task 100 (share right + share of images with both answers right), "
    "summed, up to 2,000; left out of the average, as in the paper",
    "circular": "circular accuracy: right under every order of the options",
    "hallusion": "the mean of its accuracies over questions, figures and question pairs",
}
UNLIKE_PERCENT = ("mme",)  # not on the scale of 0 to 100, so left out of averages


def _right_values(score: pd.Series, groups: pd.Series) -> np.ndarray:
    """Values [questions] whose mean is the share of groups that are all right;
    0 or 1 where groups are equally large.
    """
    right = all_right(score, groups)
    share = float(right.mean())
    weight = len(groups) / len(right) / groups.map(groups.value_counts()).to_numpy()
    return share + (groups.map(right).to_numpy(dtype=float) - share) * weight


def _mme(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows[in_perception(rows)].reset_index(drop=True)
    total, influence = 0.0, np.zeros(len(rows))
    for places in rows.groupby("group", sort=True).indices.values():
        part = rows.iloc[places]
        each = 100 * (part["score"].to_numpy(dtype=float) + _right_values(part["score"], part["image_id"]))
        total += each.mean()
        influence[places] = (each - each.mean()) * len(rows) / len(part)
    return rows.assign(points=total + influence)


def _circular(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(points=100 * _right_values(rows["score"], circular_questions(rows)))


def _hallusion(rows: pd.DataFrame) -> pd.DataFrame:
    groups, shown = hallusion_groups(rows), (rows["image_id"] != "").to_numpy()
    total = rows["score"].to_numpy(dtype=float) + _right_values(rows["score"], groups["question"])
    if shown.any():
        figures = _right_values(rows["score"][shown], groups["figure"][shown])
        share = figures.mean()
        total += share
        total[shown] += (figures - share) * len(rows) / shown.sum()  # influence on a mean over the rows with an image
    # a question pair spans the figures of its set, so the set is what is sampled
    return rows.assign(points=100 * total / 3, image_id=groups["set"])


_FORMS: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "mme": _mme,
    "circular": _circular,
    "hallusion": _hallusion,
}


def points(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Rows of a predictions file with `points` under a metric of the registry, `image_id` being what is sampled.

    MME's rows of cognition are left out.
    """
    return _FORMS[metric](rows) if metric in _FORMS else rows.assign(points=100 * rows["score"].to_numpy(dtype=float))
