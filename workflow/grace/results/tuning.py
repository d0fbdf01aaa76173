"""`grace tune`: every trial's score on the development split, and the best of each recipe."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from grace.config.job_parameters import TuneRun, read_run
from grace.errors import GraceError
from grace.files import whole_file, write_json
from grace.results.paired import compare
from grace.results.read import read_predictions
from grace.results.statistics import Scores, estimate


def tune(run: Path, trials: Path, out: Path) -> None:
    """Compare the trials of each recipe; write `out` (JSON) and, for people, the same as a table in `out` with .md.

    The best is the trial with the highest mean over seeds and benchmarks, the first of equals.

    Args:
        run: a frozen `TuneRun`.
        trials: folder with `{recipe}/trial{number}/seed{seed}/predictions/{benchmark}.parquet`, numbers from 1.
        out: the record: of each trial what it changes, and in points its score by seed, their mean with its standard
            error, and how far it is below the best, paired by question and seed.

    Raises:
        GraceError: predictions are missing or damaged, or trials were asked other questions.
    """
    parameters = read_run(run, TuneRun)
    tuning = parameters.tuning
    recipes: dict[str, Any] = {}
    for recipe, tried in tuning.trials.items():
        scores = [
            [_scores(trials / recipe / f"trial{number}", tuning.seeds, name) for name in parameters.benchmarks]
            for number in range(1, len(tried) + 1)
        ]
        means = [estimate(parts) for parts in scores]
        best = int(np.argmax([mean.value for mean in means]))
        entries = []
        for number, (trial, parts, mean) in enumerate(zip(tried, scores, means, strict=True), 1):
            entry = {"trial": number, "changes": trial.changes(), "mean": mean.value, "stderr": mean.stderr}
            seeds = np.mean([part.values.mean(axis=1) for part in parts], axis=0)
            entry["seeds"] = {str(seed): float(value) for seed, value in zip(tuning.seeds, seeds, strict=True)}
            if number - 1 != best:
                _check_same(trials / recipe, parts, scores[best])
                behind = compare(scores[best], parts)
                entry |= {"below_best": behind.difference, "below_best_stderr": behind.stderr}
            entries.append(entry)
        chosen = {key: entries[best][key] for key in ("trial", "changes")}
        recipes[recipe] = {"chosen": chosen, "trials": entries}
    record = {
        "precision": tuning.precision, "seeds": tuning.seeds, "benchmarks": parameters.benchmarks, "recipes": recipes,
    }  # fmt: skip
    with whole_file(out.with_suffix(".md")) as part:
        part.write_text(table(record))
    write_json(out, record)


def _scores(trial: Path, seeds: list[int], benchmark: str) -> Scores:
    """Points [seeds, questions] of one trial on one benchmark."""
    frames = [read_predictions(trial / f"seed{seed}/predictions/{benchmark}.parquet") for seed in seeds]
    for seed, frame in zip(seeds, frames, strict=True):
        if not frame["sample_id"].equals(frames[0]["sample_id"]):
            raise GraceError(f"{trial}: seed {seed} was asked other questions of {benchmark}; delete it and tune again")
    images = pd.util.hash_array(frames[0]["image_id"].astype(str).to_numpy(dtype=object))
    return Scores(np.stack([100 * frame["score"].to_numpy(dtype=float) for frame in frames]), images, tuple(seeds))


def _check_same(recipe: Path, one: list[Scores], other: list[Scores]) -> None:
    if any(not np.array_equal(a.images, b.images) for a, b in zip(one, other, strict=True)):
        raise GraceError(f"{recipe}: its trials were asked other questions; delete it and tune again")


def table(record: dict[str, Any]) -> str:
    """The record as Markdown, one table a recipe, the chosen trial in bold."""
    every = {len(entry["trials"]) for entry in record["recipes"].values()}
    seeds = ", ".join(map(str, record["seeds"]))
    lines = [
        f"# Trials at {record['precision']}, development split",
        "",
        f"{' or '.join(map(str, sorted(every)))} trials a recipe, seeds {seeds}; points, mean of "
        f"{len(record['benchmarks'])} benchmarks ± standard error.",
    ]
    for recipe, entry in record["recipes"].items():
        lines += ["", f"## {recipe}", "", "| trial | changes | score | below the best |", "|---|---|---|---|"]
        for trial in entry["trials"]:
            said = ", ".join(f"`{key}: {value}`" for key, value in trial["changes"].items()) or "none"
            score = f"{trial['mean']:.1f} ± {trial['stderr']:.1f}"
            below = f"{trial['below_best']:.1f} ± {trial['below_best_stderr']:.1f}" if "below_best" in trial else ""
            row = [str(trial["trial"]), said, score]
            if trial["trial"] == entry["chosen"]["trial"]:
                row = [f"**{row[0]}**", said, f"**{score}**"]
            lines.append(f"| {' | '.join([*row, below])} |")
    return "\n".join(lines) + "\n"
