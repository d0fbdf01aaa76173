"""lmms-eval for real: the demo's benchmarks, and official tasks on local copies of their data in small.

`bash workflow/setup.sh test` installs it (envs/lmms-eval.txt).
"""

import inspect
import json
from collections import Counter
from dataclasses import replace
from functools import cache

import datasets
import numpy as np
import pytest
from evaluate_models import make_image, rows, write_asked, write_benchmark
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from official_rows import OFFICIAL as rows_of

import grace.evaluate.harness_lmms_eval as harness
from grace.benchmarks.extraction import Answer
from grace.benchmarks.items import MARK, show
from grace.benchmarks.metrics import METRICS
from grace.benchmarks.protocols import PROTOCOLS, spec
from grace.benchmarks.registry import benchmark
from grace.errors import GraceError
from grace.evaluate.commands import evaluate
from grace.evaluate.rows import _item
from grace.results.predictions import read_rows

IMAGE = datasets.Image()


@cache
def _manager() -> TaskManager:
    return TaskManager(verbosity="ERROR")


@pytest.fixture(autouse=True)
def one_manager(monkeypatch):
    """Every other would read the files of all of lmms-eval's tasks again, which takes seconds."""
    monkeypatch.setattr(harness, "TaskManager", lambda verbosity: _manager())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("lmms")
    write_asked(made)
    _local(made, "pope", [
        {"question_id": str(i), "question": "is the dress red", "answer": ("yes", "no")[i % 2],
            "image_source": f"{i // 2}",
         "category": "random", "image": _image(i // 2)} for i in range(8)
    ])  # fmt: skip
    _local(made, "mme", [
        {"question_id": f"{c}/{i // 2}.png", "question": "is a bag blue Please answer yes or no.",
            "answer": ("Yes", "No")[i % 2],
         "category": c, "image": _image(i // 2)} for c in ("color", "OCR", "code_reasoning") for i in range(4)
    ])  # fmt: skip
    _local(made, "textvqa", [
        {"question_id": i, "question": "what is the bag", "answers": ["red"] * 6 + ["blue"] * 4, "image": _image(i),
         "ocr_tokens": ["red"]} for i in range(4)
    ])  # fmt: skip
    _local(made, "mmbench", [
        {"index": i + shift * 1_000_000, "question": "which", "hint": "nan", "A": "red", "B": "blue", "C": "nan",
            "D": "nan",
         "answer": "AB"[(i + shift) % 2], "category": "c", "source": "s", "split": "dev", "L2-category": "l",
         "image": _image(i)} for i in range(3) for shift in range(2)
    ])  # fmt: skip
    return made


def _image(seed: int) -> dict:
    return {"bytes": make_image(seed), "path": f"{seed}.png"}


def _local(folder, name: str, made: list[dict]) -> None:
    (folder / "data/benchmarks").mkdir(parents=True, exist_ok=True)
    kept = datasets.Dataset.from_list(made).cast_column("image", IMAGE)
    kept.to_parquet(folder / f"data/benchmarks/{name}.parquet")


def _run(folder, *names: str, out: str = "out") -> dict:
    evaluation = {"benchmarks": list(names), "batch": 4, "max_new_tokens": 3, "limit": 100}
    for asker in ("lmms-eval", "lm-eval"):
        run = {"family": "llava", "evaluation": {**evaluation, "harness": asker}}
        (folder / f"{asker}.json").write_text(json.dumps(run))
    evaluate(folder / "lmms-eval.json", folder / "model", folder / "data", folder / out)
    return json.loads((folder / out / "manifest.json").read_text())


def test_the_demo_scores_as_under_lm_eval(folder):
    _run(folder, "colour", "presence", out="lmms")
    evaluate(folder / "lm-eval.json", folder / "model", folder / "data", folder / "lm")
    for name in ("colour", "presence"):
        one, other = read_rows(folder / f"lmms/{name}.parquet"), read_rows(folder / f"lm/{name}.parquet")
        same = ["sample_id", "image_id", "group", "prediction", "extracted", "target", "score"]
        assert one[same].equals(other[same])
        assert (one["logprob"] - other["logprob"]).abs().max() < 0.1  # bf16; batches are cut alike, images re-encoded


def test_official_tasks_run_on_local_data(folder):
    manifest = _run(folder, "pope", "mme", "textvqa", "mmbench")
    assert {name: entry["questions"] for name, entry in manifest["benchmarks"].items()} == {
        "pope": 8, "mme": 12, "textvqa": 4, "mmbench": 6,
    }  # fmt: skip
    assert set(manifest["benchmarks"]["pope"]["also"]) == {"accuracy", "precision", "recall", "f1", "yes_ratio"}
    assert 0 <= manifest["benchmarks"]["mme"]["also"]["score"] <= 600
    assert "circular" in manifest["benchmarks"]["mmbench"]["also"]
    assert read_rows(folder / "out/mme.parquet")["image_id"].nunique() == 6  # by name, as MME pairs its questions


def test_data_of_another_form_is_named(folder):
    write_benchmark(folder / "data/benchmarks/gqa.parquet", [])
    write_benchmark(folder / "data/benchmarks/scienceqa-img.parquet", rows(2))
    with pytest.raises(GraceError, match=r"gqa\.parquet: has no rows.*scienceqa-img\.parquet: .*has no options"):
        _run(folder, "gqa", "scienceqa-img", out="bad")


class Scripted:
    """A model that says what it is told to, question by question."""

    def __init__(self, says: list[str]) -> None:
        self.says = says

    def render(self, messages) -> str:
        return messages[0]["content"][1]["text"]

    def answer(self, questions, advance) -> list[Answer]:
        return [Answer(text, -1.0, 0.5) for text in self.says]


OFFICIAL = {
    "pope": lambda r: {
        "pope_accuracy": r["accuracy"], "pope_precision": r["precision"], "pope_recall": r["recall"],
        "pope_f1_score": r["f1"], "pope_yes_ratio": r["yes_ratio"],
    },
    "mme": lambda r: {"mme_perception_score": r["score"], "mme_cognition_score": r["cognition"]},
    "textvqa": lambda r: {"exact_match": r["accuracy"]},
    "mmbench": lambda r: {"gpt_eval_score": 100 * r["circular"]},
}  # fmt: skip
"""What lmms-eval reports of a task, from our metrics."""
SAID = {
    "pope": ["yes", "no", "Yes.", "maybe"],
    "mme": ["Yes", "no", "perhaps"],
    "textvqa": ["red", "Blue.", "green"],
    "mmbench": ["A", "B.", "C"],
}
DOCUMENTS = {
    "pope": lambda i: {
        "question_id": str(i), "question": "is it red", "answer": ("yes", "no")[i % 2], "image_source": f"{i // 2}",
        "category": ("random", "popular")[i % 2], "image": _image(i // 2),
    },
    "mme": lambda i: {
        "question_id": f"{i // 2}.png", "question": "is it blue Please answer yes or no.",
        "answer": ("Yes", "No")[i % 2],
        "category": ("color", "OCR", "code_reasoning")[i % 6 // 2], "image": _image(i // 2),
    },
    "textvqa": lambda i: {
        "question_id": i, "question": "what", "answers": ["red"] * (i % 11) + ["blue"] * (10 - i % 11),
        "image": _image(i),
        "ocr_tokens": ["red"],
    },
    "mmbench": lambda i: {
        "index": i // 3 + i % 3 * 1_000_000, "question": "which", "hint": "nan", "A": "red", "B": "blue", "C": "green",
        "D": "nan", "answer": "ABC"[(i // 3 + i % 3) % 3], "category": "c", "source": "s", "split": "dev",
        "L2-category": "l",
        "image": _image(i // 3),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_our_metrics_are_lmms_evals_on_the_same_predictions(tmp_path, monkeypatch, name):
    """Our numbers come from the rows that are kept, lmms-eval's from its own documents, over one set of answers."""
    asked = [DOCUMENTS[name](i) for i in range(36)]
    _local(tmp_path, name, asked)
    random = np.random.default_rng(1)
    says = [str(random.choice(SAID[name])) for _ in asked]
    if name == "mmbench":  # some questions must be right under every order
        says = [row["answer"] if row["index"] % 1_000_000 % 2 else text for row, text in zip(asked, says, strict=True)]
    reported, real = {}, harness.evaluate

    def spy(*arguments, **settings):
        found = real(*arguments, **settings)
        reported.update(found["results"][benchmark(name).tasks["lmms-eval"]])
        return found

    monkeypatch.setattr(harness, "evaluate", spy)
    model = harness.RunnerLMM(Scripted(says))
    path = tmp_path / f"data/benchmarks/{name}.parquet"
    kept = harness.predict(
        model,
        _manager(),
        benchmark(name),
        path,
        replace(spec("lmms-eval", name), size=len(asked)),
        None,
    )
    assert kept["prediction"].tolist() == says
    theirs = {key.split(",")[0]: value for key, value in reported.items() if isinstance(value, float)}
    ours = OFFICIAL[name](METRICS[spec("lmms-eval", name).metric](kept))
    assert ours == {key: pytest.approx(theirs[key], abs=1e-9) for key in ours}
    assert 0 < kept["score"].mean() < 1


CUT = {"bytes": make_image(0)[: len(make_image(0)) // 2], "path": "3.png"}


@pytest.mark.parametrize(
    "damage", [None, {"bytes": b"no image", "path": "3.png"}, CUT], ids=["no image", "broken", "cut short"]
)
def test_a_document_without_a_image_is_named(tmp_path, damage):
    asked = [DOCUMENTS["pope"](i) for i in range(4)]
    asked[3]["image"] = damage
    _local(tmp_path, "pope", asked)
    model, path = harness.RunnerLMM(Scripted(["yes"] * 4)), tmp_path / "data/benchmarks/pope.parquet"
    with pytest.raises(GraceError, match=r"pope\.parquet: .*document 3 has no readable image .*; mend that row"):
        harness.predict(model, _manager(), benchmark("pope"), path, spec("lmms-eval", "pope"), 4)


@pytest.mark.parametrize("name", PROTOCOLS["lmms-eval"])
def test_prompts_are_lmms_evals(name):
    entry, how = benchmark(name), spec("lmms-eval", name)
    config = load_yaml_config(_manager()._task_index[entry.tasks["lmms-eval"]]["yaml_path"], mode="full")
    settings = config.get("lmms_eval_specific_kwargs") or {}
    given = [settings.get("default", settings)] if len(inspect.signature(config["doc_to_text"]).parameters) > 1 else []
    for place, said in enumerate(("what IS the Thing?", "Is it?  Please answer yes or no.", " two\nlines ")):
        raw = rows_of[name](place)
        raw["question"] = said + " <image 1>" * (name == "mmmu")
        doc = {"L2-category": "l", "source": "s", "split": "dev", **raw}
        text, _ = show(how.prompt, how.placing, _item(raw, place, how, Counter()))
        assert text.replace(MARK, "") == config["doc_to_text"](doc, *given)
