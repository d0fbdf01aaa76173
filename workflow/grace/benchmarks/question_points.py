"""Points per question, whose mean is the number that a benchmark's own paper prints: 100 x the score, or a linear form.

MME's score, MMBench's circular accuracy and HallusionBench's overall number are means over groups of questions that are
all right. Each is written here as its value plus every question's influence on it (value + influence has that value as
its mean), so that one formula gives every benchmark its standard error, and one test its comparisons.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd

COLUMNS = ("sample_id", "image_id", "group", "score")  # what the forms below read of a predictions file
COGNITION = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
SAID = {
    "mme": "its score over perception: per sub-task 100 (share right + share of images with both answers right), "
    "summed, up to 2,000; left out of the average, as in the paper",
    "circular": "circular accuracy: right under every order of the options",
    "hallusion": "the mean of its accuracies over questions, figures and question pairs",
}
UNLIKE_PERCENT = ("mme",)  # not on the scale of 0 to 100, so left out of averages


def _all_right(score: pd.Series, groups: pd.Series) -> np.ndarray:
    """Values [questions] whose mean is the share of groups that are all right; 0 or 1 where groups are equally large."""
    right = (score >= 1).groupby(groups)
    share = float(right.all().mean())
    weight = len(score) / right.ngroups / right.transform("size").to_numpy()
    return share + (right.transform("all").to_numpy(dtype=float) - share) * weight


def _mme(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows[~rows["group"].isin(COGNITION)] if (~rows["group"].isin(COGNITION)).any() else rows
    rows = rows.reset_index(drop=True)
    total, influence = 0.0, np.zeros(len(rows))
    for places in rows.groupby("group", sort=True).indices.values():
        part = rows.iloc[places]
        each = 100 * (part["score"].to_numpy(dtype=float) + _all_right(part["score"], part["image_id"]))
        total += each.mean()
        influence[places] = (each - each.mean()) * len(rows) / len(part)
    return rows.assign(points=total + influence)


def _circular(rows: pd.DataFrame) -> pd.DataFrame:
    # the other orders of a question add a multiple of 1,000,000 to its id
    return rows.assign(points=100 * _all_right(rows["score"], rows["sample_id"].astype(int) % 1_000_000))


def _hallusion(rows: pd.DataFrame) -> pd.DataFrame:
    ends = rows["sample_id"].str.rsplit("_", n=3)  # ..._{set}_{figure}_{question}
    sets = rows["group"].astype(str) + "/" + ends.str[-3]
    whole = [_all_right(rows["score"], sets + "/" + kind + ends.str[place]) for kind, place in (("f", -2), ("q", -1))]
    # a question pair spans the figures of its set, so the set is what is sampled
    return rows.assign(points=100 * (rows["score"].to_numpy(dtype=float) + sum(whole)) / 3, image_id=sets)


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
