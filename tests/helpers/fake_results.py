"""A results folder in the pipeline's layout with simulated predictions, for tests of what reads results."""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from grace.config.schema import Experiment
from grace.files import sha256, write_json, write_manifest

MIRRORS = {"colour": "GQA", "presence": "POPE", "pairs": "MME"}
# mean share of right answers by role and precision
LEVELS = {
    ("teacher", "bf16"): 0.85, ("baseline", "bf16"): 0.62, ("qat", "bf16"): 0.63, ("kd", "bf16"): 0.68,
    ("grace", "bf16"): 0.74,
    ("gdkd", "bf16"): 0.70, ("rcka", "bf16"): 0.66, ("ib", "bf16"): 0.68,
    ("rtn", "int4"): 0.61, ("awq", "int4"): 0.61, ("qat", "int4"): 0.62, ("kd", "int4"): 0.67, ("grace", "int4"): 0.72,
    ("rtn", "int2"): 0.35, ("qat", "int2"): 0.5, ("kd", "int2"): 0.55, ("grace", "int2"): 0.57,
    ("rtn", "int4-outliers"): 0.4, ("grace", "int4-outliers"): 0.7,
}  # fmt: skip


def experiment(seeds=(0, 1, 2), benchmarks=tuple(MIRRORS)) -> Experiment:
    """A demo experiment with the rows of LEVELS."""
    train = {"steps": 10, "learning_rate": 0.001}
    shape = {"hidden_size": 64, "intermediate_size": 128, "layers": 2, "heads": 2}
    recipes = {
        "rtn": {"post_training": "rtn"},
        "awq": {"post_training": "awq"},
        "qat": {},
        "kd": {"kd": "plain"},
        "gdkd": {"kd": "gated"},
        "rcka": {"rcka": True},
        "ib": {"kd": "plain", "controller": True},
        "grace": {"kd": "gated", "rcka": True, "controller": True},
    }
    students = [key for key in LEVELS if key[0] not in ("teacher", "baseline")]
    runs = [{"recipes": [r], "precisions": [p], "seeds": list(seeds)} for r, p in students]
    return Experiment.model_validate(
        {
            "experiment": "fake",
            "data": {"source": "demo"},
            "teacher": {"architecture": shape, "train": train},
            "student": {"architecture": shape, "train": train},
            "quantization": {"group_size": 32},
            "finetune": train,
            "recipes": recipes,
            "runs": runs,
            "baseline_seeds": list(seeds),
            "evaluation": {"benchmarks": list(benchmarks)},
        }
    )


def simulate(level: float, seed: int, difficulty: np.ndarray, own: int, spread: float = 0.3) -> np.ndarray:
    """0/1 scores: questions are hard for every model alike, and each model has its own luck and its seed's."""
    random = np.random.default_rng([own, seed])
    shift = random.normal(0, 0.05)
    wish = np.log(level / (1 - level)) + shift + difficulty + random.normal(0, spread, len(difficulty))
    return (wish + random.logistic(0, 0.3, len(difficulty)) > 0).astype(float)


def make_results(folder: Path, seeds=(0, 1, 2), questions: int = 120, change: dict | None = None) -> Path:
    """Write the folder. `change`: {(recipe, precision): level} other than LEVELS."""
    config = experiment(seeds)
    write_json(folder / "config" / "experiment.json", config.model_dump(mode="json"))
    levels = LEVELS | (change or {})
    hard = {}
    for number, name in enumerate(config.evaluation.benchmarks):
        hard[name] = np.repeat(np.random.default_rng(number).normal(0, 1.0, questions // 2), 2)
        _benchmark(folder / "data" / "benchmarks" / f"{name}.parquet", name, questions)
    everyone = [("teacher", "bf16", 0), *config.students()]
    for order, (recipe, precision, seed) in enumerate(everyone):
        own = sum(map(ord, recipe + precision))
        below = "teacher" if recipe == "teacher" else f"students/{recipe}/{precision}/seed{seed}"
        _predictions(folder / below / "predictions", levels[recipe, precision], seed, hard, own)
        if recipe not in ("rtn", "awq"):
            _training(folder / below, recipe, order)
        write_json(folder / below / "model" / "model.json", {"recipe": recipe, "precision": precision, "seed": seed})
        write_manifest(folder / below / "model", kind="model", seconds=12.5)
    _bench(folder / "bench")
    return folder


def _benchmark(path: Path, name: str, questions: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(questions):
        shade = np.random.default_rng(index // 2).integers(0, 255, (12, 12, 3), dtype=np.uint8)
        out = BytesIO()
        Image.fromarray(shade).resize((96, 96)).save(out, "PNG")
        rows.append(
            {
                "id": f"{name}-{index:04}", "image": {"bytes": out.getvalue(), "path": f"{index // 2}.png"},
                "image_id": f"{name}/{index // 2}", "question": f"what is thing {index} ?", "answer": "red",
                "options": [], "group": "", "sources": [],
            }
        )  # fmt: skip
    pd.DataFrame(rows).to_parquet(path)


def _predictions(folder: Path, level: float, seed: int, hard: dict, own: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {}
    for number, (name, difficulty) in enumerate(hard.items()):
        right = simulate(level, seed, difficulty, own + 1000 * number)
        count = len(right)
        entropy = np.clip(
            1.0 - 0.4 * difficulty + np.random.default_rng([own, seed, number]).normal(0, 0.3, count), 0.01, None
        )
        frame = pd.DataFrame(
            {
                "sample_id": [f"{name}-{index:04}" for index in range(count)],
                "image_id": [f"{name}/{index // 2}" for index in range(count)],
                "group": "", "prompt_hash": "0" * 16,
                "prediction": np.where(right > 0, "red", "blue"), "extracted": np.where(right > 0, "red", "blue"),
                "target": "red", "score": right, "logprob": -entropy, "entropy": entropy,
            }
        )  # fmt: skip
        frame.to_parquet(folder / f"{name}.parquet")
        about[name] = {
            "file": f"{name}.parquet", "sha256": sha256(folder / f"{name}.parquet"), "questions": count,
            "metric": "accuracy", "score": float(right.mean()), "stderr": 0.01, "seconds": 1.5,
        }  # fmt: skip
    write_manifest(folder, model="0" * 64, harness={"name": "lm-eval", "version": "0.4.13"}, benchmarks=about)


def _training(folder: Path, recipe: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    lines = []
    for step in range(0, 200, 10):
        fall = float(np.exp(-step / 60) + random.normal(0, 0.02))
        entry = {
            "step": step,
            "loss": 2 * fall + 0.3,
            "ce": fall + 0.2,
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
            "tokens": 100,
        }
        if recipe in ("kd", "gdkd", "ib", "grace"):
            entry |= {"gdkd" if recipe in ("gdkd", "grace") else "kd": 3 * fall, "beta": 0.5 - step / 1000}
        if recipe in ("rcka", "grace"):
            entry |= {"rcka": 0.6 * abs(fall), "omega": min(step / 50, 3)}
        lines.append(json.dumps(entry))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    timing = [json.dumps({"step": step, "seconds": 0.1}) for step in range(0, 200, 10)]
    (folder / "model").mkdir()
    (folder / "model/timing.jsonl").write_text("\n".join(timing) + "\n")


def _bench(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kernel = [
        {"backend": "cpu-int4", "device": "cpu", "dtype": "bfloat16", "shape": shape, "out_features": 64,
            "in_features": 64, "m": m,
         "group_size": 32, "microseconds": 10.0, "dense_microseconds": 14.0 + m, "speedup": (14.0 + m) / 10,
         "floor_microseconds": 5.0,
         "floor_share": 0.5, "relative_error": 0.003}
        for shape in ("q_proj", "gate_proj")
        for m in (1, 8)
    ]  # fmt: skip
    pd.DataFrame(kernel).to_csv(folder / "kernel.csv", index=False)
    decode = [
        {"model": model, "precision": precision, "device": "cpu", "batch": batch, "cache": cache, "prompt_tokens": 16,
            "new_tokens": 32, "prefill_ms": 3.0,
         "tokens_per_second": speed * batch, "weight_mib": mib, "peak_mib": mib * 1.5}
        for model, precision, speed, mib, cache in (
            ("teacher", "bf16", 300, 1.8, 16), ("baseline/bf16/seed0", "bf16", 500, 0.6, 16),
            ("grace/int4/seed0", "int4", 620, 0.3, 16), ("grace/int4/seed0", "int4", 700, 0.3, 8),
        )
        for batch in (1, 8)
    ]  # fmt: skip
    pd.DataFrame(decode).to_csv(folder / "decode.csv", index=False)


def change_rows(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Write a file of predictions again with other rows."""
    change(pd.read_parquet(path)).to_parquet(path)


@pytest.fixture(scope="session")
def results_folder(tmp_path_factory) -> Path:
    """One fake experiment for the whole test session, figures and models not included; tests only read it."""
    folder = tmp_path_factory.getbasetemp() / "fake-results"
    return folder if folder.exists() else make_results(folder, seeds=(0, 1), questions=80)
