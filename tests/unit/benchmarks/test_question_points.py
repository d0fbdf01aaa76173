"""Points of benchmarks that are not counted by the mean score: their value, and their error by brute force."""

import numpy as np
import pandas as pd
import pytest

from grace.benchmarks.metrics import COGNITION, METRICS
from grace.benchmarks.question_points import points
from grace.results.paired import compare
from grace.results.statistics import Scores, estimate


def mme_rows(random, groups=(("color", 12), ("count", 30), ("posters", 60))) -> pd.DataFrame:
    """Two questions per image; sub-tasks of other sizes, as in MME."""
    rows = [
        {
            "sample_id": f"{group}{n}",
            "image_id": f"{group}{n // 2}",
            "group": group,
            "score": float(random.random() < 0.7),
        }
        for group, images in groups
        for n in range(2 * images)
    ]
    return pd.DataFrame(rows)


def circular_rows(random, questions=80) -> pd.DataFrame:
    """Questions with 2 to 4 options, each asked under as many orders."""
    rows = []
    for number in range(questions):
        for turn in range(int(random.integers(2, 5))):
            name = str(number + turn * 1_000_000)
            rows.append(
                {"sample_id": name, "image_id": str(number), "group": "", "score": float(random.random() < 0.8)}
            )
    return pd.DataFrame(rows)


def hallusion_rows(random, sets=40) -> pd.DataFrame:
    rows = []
    for number in range(sets):
        for figure in range(3):
            for question in range(2):
                name = f"VD_chart_{number}_{figure}_{question}"
                about = {"sample_id": name, "image_id": f"{number}/{figure}", "group": "chart"}
                rows.append({**about, "score": float(random.random() < 0.7)})
    return pd.DataFrame(rows)


def test_means_are_the_metrics_own_numbers():
    random = np.random.default_rng(0)
    rows = mme_rows(random)
    assert points(rows, "mme")["points"].mean() == pytest.approx(METRICS["mme"](rows)["score"])
    rows = circular_rows(random)
    assert points(rows, "circular")["points"].mean() == pytest.approx(100 * METRICS["circular"](rows)["circular"])
    rows = hallusion_rows(random)
    each = METRICS["hallusion"](rows)
    expected = 100 * np.mean([each["accuracy"], each["figure"], each["question_pair"]])
    assert points(rows, "hallusion")["points"].mean() == pytest.approx(expected)
    assert points(rows, "exact_match")["points"].tolist() == (100 * rows["score"]).tolist()


def test_mme_is_its_perception_part():
    rows = mme_rows(np.random.default_rng(1))
    other = mme_rows(np.random.default_rng(2), ((COGNITION[0], 20),))
    both = points(pd.concat([rows, other], ignore_index=True), "mme")
    assert both["points"].tolist() == points(rows, "mme")["points"].tolist()
    assert len(points(other, "mme")) == 40  # nothing but cognition: better than nothing


@pytest.mark.parametrize(
    "make, metric, number",
    [
        (mme_rows, "mme", lambda rows: METRICS["mme"](rows)["score"]),
        (circular_rows, "circular", lambda rows: 100 * METRICS["circular"](rows)["circular"]),
    ],
)
def test_errors_are_those_of_resampled_images(make, metric, number):
    """Images drawn anew within each sub-task, the number computed anew, 300 times."""
    random = np.random.default_rng(3)
    rows = make(random)
    parts = [list(part.groupby("image_id").indices.values()) for _, part in rows.groupby("group")]
    starts = np.cumsum([0] + [len(part) for _, part in rows.groupby("group")])
    assert rows["group"].is_monotonic_increasing
    drawn = []
    for _ in range(300):
        chosen = [
            start + part[n]
            for part, start in zip(parts, starts, strict=False)
            for n in random.integers(len(part), size=len(part))
        ]
        turns = [str(turn + n * 1_000_000) for turn, places in enumerate(chosen) for n in range(len(places))]
        images = np.repeat(np.arange(len(chosen)), [len(places) for places in chosen])
        drawn.append(number(rows.iloc[np.concatenate(chosen)].assign(image_id=images, sample_id=turns)))
    found = points(rows, metric)
    codes = pd.factorize(found["image_id"])[0]
    error = estimate([Scores(found["points"].to_numpy()[None], codes)]).stderr
    assert error == pytest.approx(np.std(drawn, ddof=1), rel=0.15)


def test_circular_answers_are_tested_by_mcnemar_where_all_questions_have_as_many_orders():
    random = np.random.default_rng(4)
    sides = []
    for level in (0.9, 0.6):
        rows = hallusion_rows(random).assign(score=(random.random(240) < level) * 1.0)
        rows["sample_id"] = [str(n // 4 + n % 4 * 1_000_000) for n in range(240)]
        sides.append(points(rows.assign(image_id=np.arange(240) // 4), "circular"))
    a, b = ([Scores(side["points"].to_numpy()[None], side["image_id"].to_numpy())] for side in sides)
    assert compare(a, b).test == "McNemar" and compare(a, b).p < 1e-4
