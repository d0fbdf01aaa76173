"""From scored answers to a benchmark's numbers, as the literature defines them.

A row is one question with its `score` in 0..1. The first number of every metric is the mean score, which standard
errors and paired tests are about; the others are what the benchmark's paper reports beside or instead of it.

Sources: VQA accuracy, Antol et al. 2015; POPE, Li et al. 2023; MME, Fu et al. 2023; circular evaluation, MMBench, Liu
et al. 2023; HallusionBench, Guan et al. 2024. Where the harnesses differ from the papers it is said at the function.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence

import pandas as pd


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, agreements among the other annotators / 3).

    Both sides must be normalised alike. With ten annotators, three agreements with the answer give 0.9, four give 1.
    """
    agreements = sum(other == answer for other in answers)
    return sum(min(1.0, (agreements - (own == answer)) / 3) for own in answers) / len(answers)


def all_right(scores: Iterable[float], groups: Iterable[Hashable]) -> float:
    """The share of groups whose questions are all answered fully: pairs, circular shifts, question sets."""
    right: dict[Hashable, bool] = defaultdict(lambda: True)
    for score, group in zip(scores, groups, strict=True):
        right[group] &= score == 1
    return sum(right.values()) / len(right)


def clustered_stderr(scores: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of the mean score when questions about one image move together (Liang and Zeger 1986).

    sqrt(G / (G - 1) sum over images of (sum of residuals)^2) / n; NaN with a single image.
    """
    mean = sum(scores) / len(scores)
    residuals: dict[Hashable, float] = defaultdict(float)
    for score, cluster in zip(scores, clusters, strict=True):
        residuals[cluster] += score - mean
    images = len(residuals)
    if images < 2:
        return math.nan
    return math.sqrt(images / (images - 1) * sum(r * r for r in residuals.values())) / len(scores)


def accuracy(rows: pd.DataFrame) -> dict[str, float]:
    """The mean score."""
    return {"accuracy": float(rows["score"].mean())}


def pope(rows: pd.DataFrame) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 of "yes", and the share of answers that say yes.

    An answer that is neither counts as not yes, as in VLMEvalKit; lmms-eval leaves such answers out of the recall, and
    its `yes_ratio` counts the targets instead of the answers.
    """
    said, true = rows["extracted"] == "yes", rows["target"].str.lower() == "yes"
    hits = float((said & true).sum())
    precision = hits / max(float(said.sum()), 1.0)
    recall = hits / max(float(true.sum()), 1.0)
    return {
        **accuracy(rows),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": float(said.mean()),
    }


def mme(rows: pd.DataFrame) -> dict[str, float]:
    """Accuracy, and MME's score: the sum over sub-tasks of 100 (accuracy + share of images with every answer right).

    MME asks two questions of each image, one whose answer is yes and one whose answer is no.
    """
    total = 0.0
    for _, part in rows.groupby("group", sort=True):
        total += 100 * (float(part["score"].mean()) + all_right(part["score"], part["image_id"]))
    return {**accuracy(rows), "score": total}


def circular(rows: pd.DataFrame) -> dict[str, float]:
    """Accuracy, and MMBench's circular accuracy: a question counts when it is right under every order of its options.

    A question's other orders carry its number plus a multiple of 1,000,000 as `sample_id`.
    """
    return {**accuracy(rows), "circular": all_right(rows["score"], rows["sample_id"].astype(int) % 1_000_000)}


def hallusion(rows: pd.DataFrame) -> dict[str, float]:
    """Accuracy over questions, and the share of figures and of question pairs that are wholly right.

    `sample_id` ends in `_{set}_{figure}_{question}`, as in VLMEvalKit's file; `group` is the sub-category.
    """
    ends = rows["sample_id"].str.rsplit("_", n=3)
    figures = [(group, end[-3], end[-2]) for group, end in zip(rows["group"], ends, strict=True)]
    questions = [(group, end[-3], end[-1]) for group, end in zip(rows["group"], ends, strict=True)]
    return {
        **accuracy(rows),
        "figure": all_right(rows["score"], figures),
        "question_pair": all_right(rows["score"], questions),
    }


METRICS: dict[str, Callable[[pd.DataFrame], dict[str, float]]] = {
    "exact_match": accuracy,
    "vqa_accuracy": accuracy,
    "contains": accuracy,
    "pope": pope,
    "mme": mme,
    "circular": circular,
    "hallusion": hallusion,
}
"""By the registry's `metric`; rows have the columns of a predictions file."""
