"""From scored answers to a benchmark's numbers, as the literature defines them.

A row is one question with its `score` in 0..1. The first number of every metric is the mean score, which standard
errors and paired tests are about; the others are what the benchmark's paper reports beside or instead of it.

Sources: POPE, Li et al. 2023; MME, Fu et al. 2023; circular evaluation, MMBench, Liu
et al. 2023; HallusionBench, Guan et al. 2024. Where the harnesses differ from the papers it is said at the function.
"""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd


def all_right(scores: pd.Series, groups: pd.Series) -> pd.Series:
    """Of each group, by its label, whether its questions are all answered fully: pairs, circular shifts,
    question sets.
    """
    return (scores == 1).groupby(groups).all()


def _share_right(scores: pd.Series, groups: pd.Series) -> float:
    """The share of groups that `all_right` finds, without a table of them: a jackknife asks this a thousand times."""
    codes, labels = pd.factorize(groups)
    named = codes >= 0
    wrong = np.bincount(codes[named], scores.to_numpy()[named] != 1, minlength=len(labels))
    return float((wrong == 0).mean()) if len(labels) else math.nan


def accuracy(rows: pd.DataFrame) -> dict[str, float]:
    """The mean score."""
    return {"accuracy": float(rows["score"].mean())}


COGNITION = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
"""MME's sub-tasks that are not perception."""


def in_perception(rows: pd.DataFrame) -> pd.Series:
    """MME's rows that its printed score is over: all but cognition; all where there is nothing else."""
    perception = ~rows["group"].isin(COGNITION)
    return perception if perception.any() else ~perception


def circular_questions(rows: pd.DataFrame) -> pd.Series:
    """The question that each row of MMBench is one order of: the others add a multiple of 1,000,000 to its id."""
    return rows["sample_id"].astype(int) % 1_000_000


def hallusion_groups(rows: pd.DataFrame) -> pd.DataFrame:
    """HallusionBench's `set`, `figure` and `question` of each row, named within its sub-category.

    `sample_id` ends in `_{set}_{figure}_{question}`; `group` is the sub-category.
    """
    ends = rows["sample_id"].str.rsplit("_", n=3)
    sets = rows["group"].astype(str) + "/" + ends.str[-3]
    return pd.DataFrame({"set": sets, "figure": sets + "/f" + ends.str[-2], "question": sets + "/q" + ends.str[-1]})


def _parts(rows: pd.DataFrame) -> list[np.ndarray]:
    """The places of the rows of each group, in the order of the groups' names."""
    codes, labels = pd.factorize(rows["group"], sort=True)
    return [np.flatnonzero(codes == code) for code in range(len(labels))]


def _yes(rows: pd.DataFrame) -> tuple[float, float, float]:
    """Precision, recall and F1 of the answer yes; 0 where one is not defined."""
    return _f1((rows["extracted"] == "yes").to_numpy(bool), (rows["target"].str.lower() == "yes").to_numpy(bool))


def _f1(said: np.ndarray, true: np.ndarray) -> tuple[float, float, float]:
    hits = float((said & true).sum())
    precision, recall = hits / max(float(said.sum()), 1.0), hits / max(float(true.sum()), 1.0)
    return precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0


def pope(rows: pd.DataFrame) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 of "yes", the mean F1 of the polls, and the share of answers that say yes.

    An answer that is neither counts as not yes, as in VLMEvalKit. LLaVA-1.5's paper prints the mean F1 of the polls.
    """
    said, true = (rows["extracted"] == "yes").to_numpy(bool), (rows["target"].str.lower() == "yes").to_numpy(bool)
    precision, recall, f1 = _f1(said, true)
    polls = [_f1(said[part], true[part])[2] for part in _parts(rows)] if "group" in rows else []
    return {
        **accuracy(rows),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "f1_of_polls": sum(polls) / len(polls) if polls else f1,
        "yes_ratio": float(said.mean()),
    }


def pope_lmms(rows: pd.DataFrame) -> dict[str, float]:
    """The same as lmms-eval counts it: its recall leaves out answers that are neither, its yes_ratio counts targets."""
    precision, recall, f1 = _yes(rows)
    read = rows[rows["extracted"].isin(["yes", "no"])]
    recall = _yes(read)[1] if len(read) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    ratio = float((rows["target"].str.lower() == "yes").mean())
    return {**accuracy(rows), "precision": precision, "recall": recall, "f1": f1, "yes_ratio": ratio}


def mme(rows: pd.DataFrame) -> dict[str, float]:
    """Accuracy, and MME's score over perception: per sub-task 100 (accuracy + share of images with every answer right).

    MME asks two questions of each image, one whose answer is yes and one whose answer is no. `cognition` is the same
    over the other four sub-tasks, where they were asked beside.
    """

    def total(part: pd.DataFrame) -> float:
        scores, images = part["score"], part["image_id"]
        return sum(
            100 * (float(scores.iloc[task].mean()) + _share_right(scores.iloc[task], images.iloc[task]))
            for task in _parts(part)
        )

    printed = in_perception(rows)
    also = {} if printed.all() else {"cognition": total(rows[~printed])}
    return {**accuracy(rows), "score": total(rows[printed]), **also}


def circular(rows: pd.DataFrame) -> dict[str, float]:
    """Accuracy, and MMBench's circular accuracy: a question counts when it is right under every order of
    its options.
    """
    return {**accuracy(rows), "circular": _share_right(rows["score"], circular_questions(rows))}


def hallusion(rows: pd.DataFrame) -> dict[str, float]:
    """Accuracy over questions, and the share of figures and of question pairs that are wholly right.

    A row without an image belongs to no figure (its `image_id` is empty); question pairs span both kinds.
    """
    groups, shown = hallusion_groups(rows), rows["image_id"] != ""
    return {
        **accuracy(rows),
        "figure": _share_right(rows["score"][shown], groups["figure"][shown]) if shown.any() else math.nan,
        "question_pair": _share_right(rows["score"], groups["question"]),
    }


def mean_of_groups(rows: pd.DataFrame) -> dict[str, float]:
    """Accuracy, and the plain mean of the groups' accuracies, which lmms-eval prints for MMStar."""
    return {**accuracy(rows), "mean_of_groups": float(rows.groupby("group")["score"].mean().mean())}


def by_modality(rows: pd.DataFrame) -> dict[str, float]:
    """Accuracy, and that of the questions with an image and without one, where there are both."""
    shown = rows["image_id"] != ""
    parts = {"with_image": rows[shown], "without_image": rows[~shown]}
    return {**accuracy(rows), **{name: float(part["score"].mean()) for name, part in parts.items() if len(part)}}


METRICS: dict[str, Callable[[pd.DataFrame], dict[str, float]]] = {
    "exact_match": accuracy,
    "vqa_accuracy": accuracy,
    "contains": accuracy,
    "pope": pope,
    "pope_lmms": pope_lmms,
    "mme": mme,
    "circular": circular,
    "hallusion": hallusion,
    "mean_of_groups": mean_of_groups,
    "by_modality": by_modality,
}
"""By the protocol's `metric`; rows have the columns of a predictions file."""
