"""Every protocol's readers and scores against its own code, on many forms of answers.

lmms-eval is called as it is installed. `protocol_values.json` holds what the originals returned: VLMEvalKit at
e8e78f05, LLaVA at c121f04, the released GRACE scripts at b73fa9b, run outside of this repository.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from grace.benchmarks import letters, open_answers, vqa, yes_no
from grace.benchmarks.extraction import extract
from grace.benchmarks.scores import FORMULAS, SCORES

STORED = json.loads((Path(__file__).parent / "protocol_values.json").read_text())
OPTIONS = STORED["options"]
LETTERS, YES_NO, VQA = ([row["text"] for row in STORED[kind]] for kind in ("letters", "yes_no", "vqa"))


def test_there_are_many_forms():
    assert min(len(LETTERS), len(YES_NO), len(VQA), len(STORED["open"])) >= 20


@pytest.mark.parametrize("row", STORED["letters"], ids=lambda row: repr(row["text"]))
def test_letters_are_the_originals(row):
    text = row["text"]
    assert letters.vlmevalkit(text, OPTIONS) == row["vlmevalkit"]
    assert letters.grace_first(text, OPTIONS) == row["grace_first"]
    assert letters.grace_last(text, OPTIONS) == row["grace_last"]
    assert letters.llava_scienceqa(text, OPTIONS) == row["llava_scienceqa"]


@pytest.mark.parametrize("row", STORED["yes_no"], ids=lambda row: repr(row["text"]))
def test_yes_and_no_are_the_originals(row):
    assert yes_no.vlmevalkit(row["text"]) == row["vlmevalkit"]
    assert yes_no.grace(row["text"]) == row["grace"]
    assert yes_no.llava_pope(row["text"]) == row["llava"]


@pytest.mark.parametrize("row", STORED["vqa"], ids=lambda row: repr(row["text"]))
def test_vlmevalkits_normalisation_is_the_original(row):
    assert vqa.vlmevalkit(row["text"]) == row["vlmevalkit"]


@pytest.mark.parametrize("row", STORED["open"], ids=lambda row: repr((row["text"], row["gold"])))
def test_open_answers_are_the_released_scripts(row):
    assert open_answers.grace_open(row["text"], row["gold"]) == row["grace"]


@pytest.mark.parametrize("row", STORED["contains"], ids=lambda row: repr(row["text"]))
def test_ocrbench_is_the_released_scripts(row):
    group = FORMULAS[0] if row["formula"] else "Regular Text Recognition"
    assert bool(SCORES["contains_grace"](row["text"], json.dumps(row["golds"]), group)) == row["grace"]


def test_lmms_evals_letters():
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks._task_utils.mmmu_mcq_utils import parse_mmmu_multi_choice_response
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator
    from lmms_eval.tasks.scienceqa.utils import sqa_process_results

    for text in LETTERS:
        assert letters.lmms_mmstar(text, OPTIONS) == extract_mcq_answer(text, choices=list("ABCD")), text
        prefetched = mmbench_evaluator.can_infer(text, dict(OPTIONS)) or extract_mcq_answer(text, choices=list("ABCD"))
        assert letters.lmms_mmbench(text, OPTIONS) == prefetched, text
        for place, target in enumerate("ABCD"):
            doc = {"choices": list(OPTIONS.values()), "answer": place}
            theirs = sqa_process_results(doc, [text])["exact_match"]
            assert (letters.lmms_scienceqa(text, OPTIONS) == target) == theirs, (text, target)
        guesses = set()
        for seed in range(8):
            random.seed(seed)
            guesses.add(parse_mmmu_multi_choice_response(text, list("ABCD"), dict(OPTIONS)))
        read = letters.lmms_mmmu(text, OPTIONS)
        assert guesses == {read} if read else len(guesses) > 1, text


def test_lmms_evals_yes_and_no():
    from lmms_eval.tasks.mme.utils import parse_pred_ans
    from lmms_eval.tasks.pope.utils import pope_process_results

    for text in YES_NO:
        assert yes_no.leading(text) == parse_pred_ans(text), text
        theirs = pope_process_results({"question_id": 0, "answer": "yes"}, [text])["pope_accuracy"]
        assert (yes_no.lower(text), float(yes_no.lower(text) == "yes")) == (theirs["prediction"], theirs["score"])


def test_lmms_evals_vqa():
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    processor = EvalAIAnswerProcessor()
    for word in (*VQA, *(key for key in EvalAIAnswerProcessor.CONTRACTIONS if key == key.lower())):
        assert vqa.evalai(word) == processor(word), word
    rng = np.random.default_rng(0)
    for text in VQA:
        answers = [str(rng.choice([text, "red", "two"])) for _ in range(10)]
        target = json.dumps(answers)
        dicts = [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers)]
        theirs = vqav2_process_results({"question_id": 0, "answers": dicts}, [text])["exact_match"]
        said = extract("vqa_challenge", text)
        assert SCORES["vqa_challenge"](said, target, "") == pytest.approx(theirs, abs=1e-9), text
        theirs = textvqa_process_results({"question_id": 0, "answers": list(answers)}, [text])["exact_match"]
        assert SCORES["vqa_evalai"](extract("vqa_evalai", text), target, "") == pytest.approx(theirs, abs=1e-9), text


def test_lmms_evals_open_questions():
    from lmms_eval.tasks.mmmu.utils import eval_open, parse_open_response

    for row in STORED["open"]:
        claims = open_answers.claims(row["text"])
        assert sorted(map(str, claims)) == sorted(map(str, parse_open_response(row["text"]))), row["text"]
        said = extract("mmmu_lmms", row["text"])
        ours = SCORES["mmmu_lmms"](said, json.dumps([row["gold"]]), "")
        assert bool(ours) == eval_open([row["gold"]], parse_open_response(row["text"])), row
