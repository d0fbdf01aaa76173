"""Metrics and extraction: by hand, against lm-eval where it has them, and against stored values of the other harnesses.

`harness_values.json` holds what lmms-eval 0.7.3 and VLMEvalKit e8e78f05 computed for the predictions in it.
"""

import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.metrics import exact_match_hf_evaluate

from grace.benchmarks.extraction import extract, normalise
from grace.benchmarks.metrics import all_right, circular, hallusion, mme, pope, pope_lmms
from grace.benchmarks.scores import vqa_accuracy

STORED = json.loads((Path(__file__).parent / "harness_values.json").read_text())


@given(st.text(max_size=30), st.text(max_size=30))
def test_normalised_equality_is_lm_evals_exact_match_but_for_spaces(one, other):
    one, other = " ".join(one.split()), " ".join(other.split())
    theirs = exact_match_hf_evaluate([one], [other], ignore_case=True, ignore_punctuation=True)["exact_match"]
    assert theirs <= (normalise(one) == normalise(other))


@pytest.mark.parametrize(
    ("said", "is_yes_no", "is_letter"),
    [
        ("Yes.", "yes", ""), ("no", "no", ""), ("Yes, not no", "", ""), ("nothing", "", ""), ("", "", ""),
        ("B", "", "B"), ("(C) red", "", "C"), ("D. the dog", "", "D"), ("A dog", "", ""), ("The answer is B.", "", ""),
    ],
)  # fmt: skip
def test_extraction(said, is_yes_no, is_letter):
    found = extract("yes_no", said), extract("letter", said), extract("whole", f" {said} ")
    assert found == (is_yes_no, is_letter, said)


def test_vqa_accuracy_by_hand():
    others = ["x"] * 7
    assert vqa_accuracy("red", ["red"] * 3 + others) == pytest.approx(0.9)  # 7 x 1 + 3 x 2/3
    assert vqa_accuracy("red", ["red"] * 4 + others[:6]) == 1
    assert vqa_accuracy("blue", ["red"] * 10) == 0


def test_all_right_counts_whole_groups():
    right = all_right(pd.Series([1, 1, 1, 0.99, 1]), pd.Series(["a", "a", "b", "b", "c"]))
    assert right.to_dict() == {"a": True, "b": False, "c": True}


def test_pope_by_hand():
    rows = pd.DataFrame(
        {"extracted": ["yes", "yes", "no", ""], "target": ["yes", "no", "no", "yes"], "score": [1, 0, 1, 0.0]}
    )
    assert pope(rows) == {
        "accuracy": 0.5,
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "f1_of_polls": 0.5,
        "yes_ratio": 0.5,
    }
    never = rows.assign(extracted="no")
    assert pope(never)["f1"] == 0 and pope(never)["yes_ratio"] == 0


def test_pope_is_the_harnesses():
    rows = pd.DataFrame(STORED["pope"]["rows"])
    readable = rows[rows["extracted"] != "maybe"]  # what the values of lmms-eval were stored for
    for harness, ours in (("lmms-eval", pope_lmms(readable)), ("vlmeval", pope(rows))):
        for name, value in STORED["pope"][harness].items():
            assert ours[name] == pytest.approx(value, abs=1e-9), (harness, name)


def test_the_mean_f1_of_pope_is_that_of_its_polls():
    rows = pd.DataFrame(
        {"extracted": ["yes", "no", "yes", "yes"], "target": ["yes", "no", "yes", "no"], "score": [1, 1, 1, 0.0],
         "group": ["random", "random", "popular", "popular"]}
    )  # fmt: skip
    assert pope(rows)["f1_of_polls"] == pytest.approx((1 + 2 / 3) / 2)


def test_mme_is_the_harnesses():
    ours = mme(pd.DataFrame(STORED["mme"]["rows"]))
    for harness in ("lmms-eval", "vlmeval"):  # both stored perception and cognition together
        assert ours["score"] + ours["cognition"] == pytest.approx(STORED["mme"][harness], abs=1e-9)


def test_circular_is_the_harness():
    assert circular(pd.DataFrame(STORED["circular"]["rows"]))["circular"] == pytest.approx(
        STORED["circular"]["lmms-eval"]
    )


def test_hallusion_is_the_harness():
    ours = hallusion(pd.DataFrame(STORED["hallusion"]["rows"]).assign(image_id="shown"))
    for name, value in STORED["hallusion"]["vlmeval"].items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name


def test_vqa_accuracy_is_the_harness():
    for row in STORED["vqa"]:
        assert vqa_accuracy(row["answer"], row["answers"]) == pytest.approx(row["lmms-eval"], abs=1e-9)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=20))
def test_the_share_of_images_wholly_right_is_that_of_all_right(asked):
    rows = pd.DataFrame(asked, columns=["image_id", "score"]).assign(group="existence")
    share = float(all_right(rows["score"], rows["image_id"]).mean())
    assert mme(rows)["score"] == 100 * (float(rows["score"].mean()) + share)


@given(st.lists(st.tuples(*map(st.sampled_from, ("xy", ("yes", "no", ""), ("yes", "No")))), min_size=1, max_size=20))
def test_the_f1_of_polls_is_the_mean_of_each_polls_own(asked):
    rows = pd.DataFrame(asked, columns=["group", "extracted", "target"]).assign(score=0.0)
    polls = [pope(part)["f1"] for _, part in rows.groupby("group", sort=True)]
    assert pope(rows)["f1_of_polls"] == sum(polls) / len(polls)
