"""lmms-eval for real: official tasks on local data. `pip install --no-deps -r envs/lmms-eval.txt`, then `pytest` this file."""

import json
import sys
from pathlib import Path

import datasets
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from evaluate_models import picture, rows, write_benchmark, write_model
from grace.errors import GraceError
from grace.evaluate.predictions import read_rows
from grace.evaluate.verbs import evaluate

IMAGE = datasets.Image()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("lmms")
    write_model(made / "model")
    write_benchmark(made / "data/benchmarks/colour.parquet", rows(12))
    write_benchmark(made / "data/benchmarks/presence.parquet", rows(12, ("yes", "no"), 1))
    _local(made, "pope", [
        {"question_id": str(i), "question": "is the dress red", "answer": ("yes", "no")[i % 2], "image_source": f"{i // 2}",
         "category": "random", "image": _image(i // 2)} for i in range(8)
    ])  # fmt: skip
    _local(made, "mme", [
        {"question_id": f"{c}/{i // 2}.png", "question": "is a bag blue Please answer yes or no.", "answer": ("Yes", "No")[i % 2],
         "category": c, "image": _image(i // 2)} for c in ("color", "OCR", "code_reasoning") for i in range(4)
    ])  # fmt: skip
    _local(made, "textvqa", [
        {"question_id": i, "question": "what is the bag", "answers": ["red"] * 6 + ["blue"] * 4, "image": _image(i),
         "ocr_tokens": ["red"]} for i in range(4)
    ])  # fmt: skip
    _local(made, "mmbench", [
        {"index": i + shift * 1_000_000, "question": "which", "hint": "nan", "A": "red", "B": "blue", "C": "nan", "D": "nan",
         "answer": "AB"[(i + shift) % 2], "category": "c", "source": "s", "split": "dev", "L2-category": "l",
         "image": _image(i)} for i in range(3) for shift in range(2)
    ])  # fmt: skip
    return made


def _image(seed: int) -> dict:
    return {"bytes": picture(seed), "path": f"{seed}.png"}


def _local(folder, name: str, made: list[dict]) -> None:
    kept = datasets.Dataset.from_list(made).cast_column("image", IMAGE)
    kept.to_parquet(folder / f"data/benchmarks/{name}.parquet")


def _run(folder, *names: str, out: str = "out") -> dict:
    evaluation = {"benchmarks": list(names), "batch": 4, "max_new_tokens": 3}
    for harness in ("lmms-eval", "lm-eval"):
        run = {"family": "llava", "evaluation": {**evaluation, "harness": harness}}
        (folder / f"{harness}.json").write_text(json.dumps(run))
    evaluate(folder / "lmms-eval.json", folder / "model", folder / "data", folder / out)
    return json.loads((folder / out / "manifest.json").read_text())


def test_the_demo_scores_as_under_lm_eval(folder):
    _run(folder, "colour", "presence", out="lmms")
    evaluate(folder / "lm-eval.json", folder / "model", folder / "data", folder / "lm")
    for name in ("colour", "presence"):
        one, other = read_rows(folder / f"lmms/{name}.parquet"), read_rows(folder / f"lm/{name}.parquet")
        same = ["sample_id", "image_id", "group", "prediction", "extracted", "target", "score", "prompt_hash"]
        assert one[same].equals(other[same])
        assert (one["logprob"] - other["logprob"]).abs().max() < 0.1  # bf16; batches are cut alike, pictures re-encoded


def test_official_tasks_run_on_local_data(folder):
    manifest = _run(folder, "pope", "mme", "textvqa", "mmbench")
    assert {name: entry["questions"] for name, entry in manifest["benchmarks"].items()} == {
        "pope": 8, "mme": 12, "textvqa": 4, "mmbench": 6,
    }  # fmt: skip
    assert set(manifest["benchmarks"]["pope"]["also"]) == {"accuracy", "precision", "recall", "f1", "yes_ratio"}
    assert 0 <= manifest["benchmarks"]["mme"]["also"]["score"] <= 600
    assert "circular" in manifest["benchmarks"]["mmbench"]["also"]
    assert read_rows(folder / "out/mme.parquet")["image_id"].nunique() == 2


def test_data_of_another_form_is_named(folder):
    write_benchmark(folder / "data/benchmarks/gqa.parquet", [])
    write_benchmark(folder / "data/benchmarks/scienceqa-img.parquet", rows(2))
    with pytest.raises(GraceError, match=r"gqa\.parquet: has no rows.*scienceqa-img\.parquet: .*needs column 'hint'"):
        _run(folder, "gqa", "scienceqa-img", out="bad")
