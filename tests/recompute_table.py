"""Recompute every number of Table 1 from the Parquet files, without the pipeline's code.

`python tests/recompute_table.py results/demo` prints the largest deviation from tables/table1.csv. For experiments
whose benchmarks are all scored by the mean over questions (the demo's are).
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd


def read(folder: Path, benchmarks: list[str]) -> dict[str, pd.DataFrame]:
    """Scores in points of one model: a column per seed, a row per question (benchmark, sample_id, image_id)."""
    seeds = {}
    for path in [folder / "predictions"] if folder.name == "teacher" else sorted(folder.glob("seed*/predictions")):
        parts = [pd.read_parquet(path / f"{name}.parquet").assign(benchmark=name) for name in benchmarks]
        frame = pd.concat(parts).set_index(["benchmark", "sample_id", "image_id"])["score"].sort_index()
        seeds[path.parent.name] = 100 * frame
    return pd.DataFrame(seeds)


def aggregate(scores: pd.DataFrame) -> tuple[float, float, float, float]:
    """Mean of means, variance from the images, and the two parts (between, chance) of the variance from the seeds."""
    by = scores.groupby("benchmark")
    deviation = (scores - by.transform("mean")) / by.transform("size").to_frame().to_numpy() / by.ngroups
    pull = deviation.groupby("image_id").sum()
    images, seeds = pull.shape
    means = by.mean().mean()
    questions = images / (images - 1) * (pull.mean(axis=1) ** 2).sum()
    if seeds == 1:
        return means.mean(), questions, 0.0, 0.0
    off = pull.sub(pull.mean(axis=1), axis=0)
    chance = images / (images - 1) * (off**2).to_numpy().sum() / seeds / (seeds - 1)
    return means.mean(), questions, means.var() / seeds, chance


def stderr(parts: tuple[float, float, float, float]) -> float:
    return float(np.sqrt(parts[1] + max(0.0, parts[2] - parts[3])))


def deviation(results: Path) -> float:
    """Largest absolute difference between tables/table1.csv and what is recomputed here, in points."""
    config = json.loads((results / "config" / "experiment.json").read_text())
    names = config["evaluation"]["benchmarks"]
    plain = {"Teacher": "teacher", "Baseline": "students/baseline/bf16"}
    for recipe, about in config["recipes"].items():
        if not about.get("post_training"):
            label = {(None, False): "Fine-tuning", ("plain", False): "Fine-tuning + KD", ("gated", True): "GRACE"}
            kd, whole = about.get("kd") or None, bool(about.get("rcka") and about.get("controller"))
            if bool(about.get("rcka") or about.get("controller")) == whole:
                plain.setdefault(label.get((None if kd == "none" else kd, whole), ""), f"students/{recipe}/bf16")
    models = {label: read(results / below, names) for label, below in plain.items() if (results / below).is_dir()}
    base, worst = models["Baseline"], 0.0
    for _, line in pd.read_csv(results / "tables" / "table1.csv").iterrows():
        if line["Model"] not in models:
            continue
        own = models[line["Model"]]
        for column in [*names, "average"]:
            found = aggregate(own if column == "average" else own.loc[[column]])
            key = next(key for key in line.index if key.split(" (")[0] == column)
            worst = max(worst, abs(line[key] - found[0]), abs(line[f"{key} stderr"] - stderr(found)))
        if line["Model"] == "Baseline":
            continue
        shared = [seed for seed in own.columns if seed in base.columns]
        if shared:
            found = aggregate(own[shared] - base[shared])
        else:  # the teacher against every seed of the baseline
            found = aggregate((own.mean(axis=1) - base.mean(axis=1)).to_frame())
            found = (*found[:2], *aggregate(base)[2:])
        worst = max(worst, abs(float(line["Δ average"]) - found[0]), abs(line["Δ average stderr"] - stderr(found)))
    return worst


if __name__ == "__main__":
    print(f"largest deviation: {deviation(Path(sys.argv[1])):.2g} points")
