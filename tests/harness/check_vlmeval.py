"""VLMEvalKit for real, on small local data: in the environment of `envs/vlmeval.txt`,
`VLMEVAL_CHECKOUT=folder pytest tests/harness/check_vlmeval.py`. The data are made here, so its MD5 pins are lifted.
"""

import base64
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from evaluate_models import make_image, write_asked

from grace.benchmarks.protocols import PROTOCOLS, spec
from grace.evaluate import harness_vlmeval
from grace.evaluate.commands import evaluate
from grace.results.predictions import read_rows

MME = ["OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene",
    "code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"]  # fmt: skip


def _image(seed: int) -> str:
    return base64.b64encode(make_image(seed)).decode()


def _choice(i: int, shift: int = 0) -> dict:
    return {
        "index": i + shift * 1_000_000, "image": _image(i), "question": "which is", "hint": None, "A": "red",
        "B": "blue",
        "C": "dress", "D": None, "answer": "ABC"[(i + shift) % 3], "category": "c", "split": "dev", "l2-category": "l",
    }  # fmt: skip


def _row(i: int, **more) -> dict:
    return {"index": i, "image": _image(i // 2), "question": "what is the bag", "answer": "red", **more}


ANSWERS = str(["red"] * 6 + ["blue"] * 4)
TABLES = {
    "pope": [_row(i, answer=("Yes", "No")[i % 2], category="random") for i in range(8)],
    "mme": [
        _row(2 * j + i, answer=("Yes", "No")[i], category=name, image_path=f"{name}/{j}.png")
        for j, name in enumerate(MME) for i in range(2)
    ],
    "mmbench": [_choice(i, shift) for i in range(3) for shift in range(3)],
    "mmstar": [_choice(i) for i in range(5)],
    "ai2d": [_choice(i) for i in range(5)],
    "scienceqa-img": [_choice(i) for i in range(5)],
    "seed-bench": [_choice(i) for i in range(5)],
    "mmmu": [
        {**_choice(i), "id": f"validation_Math_{i}", "split": ("dev", "validation")[i > 0],
         "question": "which <image 1> or <image 2>" if i == 2 else "which",
         "image": str([_image(i), _image(9)]) if i == 2 else _image(i)} for i in range(5)
    ],
    "gqa": [_row(i) for i in range(5)],
    "textvqa": [_row(i, answer=ANSWERS) for i in range(5)],
    "vizwiz": [_row(i, answers=ANSWERS) for i in range(5)],
    "ocrbench": [_row(i, answer="['red']", category="Regular Text Recognition") for i in range(5)],
    "hallusionbench": [
        {"index": f"VS_chart_0_{s}_{f}_{q}", "image": _image(f), "question": "is the bag red",
            "answer": ("Yes", "No")[q],
         "category": "VS", "l2-category": "chart"} for s in range(2) for f in range(2) for q in range(2)
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("vlmeval")
    write_asked(made)
    for name, table in TABLES.items():
        pd.DataFrame(table).to_csv(made / f"data/benchmarks/{name}.tsv", sep="\t", index=False)
    return made


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, table in TABLES.items():
        rows = len(table) - (name == "mmmu")  # one of its rows is no validation row
        monkeypatch.setitem(PROTOCOLS["vlmevalkit"], name, replace(spec("vlmevalkit", name), size=rows))


def _run(folder, harness: str, *names: str) -> dict:
    evaluation = {
        "benchmarks": list(names), "batch": 8, "max_new_tokens": 3, "harness": harness,
        "vlmeval_checkout": os.environ["VLMEVAL_CHECKOUT"],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({"family": "llava", "evaluation": evaluation}))
    evaluate(folder / "run.json", folder / "model", folder / "data", folder / harness)
    return json.loads((folder / harness / "manifest.json").read_text())


def test_demo_and_official_data_sets(folder, monkeypatch):
    real = harness_vlmeval._all_kinds

    def unpinned(kind):
        for found in real(kind):
            found.DATASET_MD5 = {}
        return real(kind)

    monkeypatch.setattr(harness_vlmeval, "_all_kinds", unpinned)
    entries = _run(folder, "vlmeval", "colour", "presence", *TABLES)["benchmarks"]
    for name, table in TABLES.items():  # and no score differed, which would have been an error
        assert entries[name]["questions"] == len(table) - (name == "mmmu"), name
    _run(folder, "lm-eval", "colour", "presence")
    same = ["sample_id", "image_id", "group", "prediction", "extracted", "target", "score"]
    for name in ("colour", "presence"):
        one, other = (read_rows(folder / harness / f"{name}.parquet") for harness in ("vlmeval", "lm-eval"))
        assert one[same].equals(other[same])
