"""The figures that need only predictions, logs and benchmark files; looking.py draws the two that look inside models."""

from pathlib import Path

import numpy as np
import pandas as pd

from grace.files import whole_folder
from grace.report.deployment import decode_rows
from grace.report.drawing import COLOURS, LINES, MARKERS, save, style
from grace.report.paper import GRACE, label, row_role, what_was_run
from grace.report.read import BASELINE, TEACHER, Results, Row

NAMES = ("pareto", "entropy", "training", "attention", "similarity")
BINS = 10


def write_figures(results: Results, out: Path) -> None:
    """Write NAMES.{svg,png} into the folder `out`, as a whole; attention and similarity run three models on a picture."""
    from grace.report.looking import attention, similarity

    with whole_folder(out, kind="figures") as part, style() as plt:
        for name, draw in zip(NAMES, (pareto, entropy, training, attention, similarity), strict=True):
            save(draw(results, plt), part, name)


def nothing(plt, text: str):
    """A figure that says why there is none."""
    figure, axis = plt.subplots(figsize=(6, 1.5))
    axis.axis("off")
    axis.text(0, 0.5, text, va="center", wrap=True)
    return figure


def pareto(results: Results, plt):
    """Figure 1: average score against decoding throughput, memory as the bubble's area."""
    measured = decode_rows(results)
    if not measured:
        return nothing(plt, f"{results.folder.name}: decoding was not measured (bench/decode.csv)")
    batch = max(record["batch"] for _, record in measured)
    points = [(row, record, results.estimate(row)) for row, record in measured if record["batch"] == batch]
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    largest = max(record["peak_mib"] for _, record, _ in points)
    for index, (row, record, found) in enumerate(points):
        colour = COLOURS[index % len(COLOURS)]
        speed = record["tokens_per_second"]
        axis.errorbar(speed, found.value, yerr=found.stderr, color=colour, capsize=3, lw=1, zorder=2)
        axis.scatter(
            speed,
            found.value,
            s=1200 * record["peak_mib"] / largest,
            color=colour,
            alpha=0.45,
            edgecolor="black",
            zorder=3,
        )
        axis.scatter(
            speed,
            found.value,
            s=22,
            marker=MARKERS[index % len(MARKERS)],
            color=colour,
            edgecolor="white",
            lw=0.5,
            zorder=4,
        )
        text = f"{label(results.experiment, row)} {row.precision}\n{record['peak_mib']:.1f} MiB"
        axis.annotate(text, (speed, found.value), (0, 20), textcoords="offset points", fontsize=8, ha="center")
    axis.margins(0.18)
    axis.set_xlabel(f"decoded tokens per second, batch {int(batch)}, {points[0][1]['device']}")
    axis.set_ylabel(f"average of {len(results.benchmarks)} benchmarks (± 1 standard error)")
    axis.set_title(
        _pareto_title(results, points)
        + "\nbubble area: peak memory; "
        + what_was_run(results.experiment, results.seeds[points[0][0]]).split(";")[0]
    )
    return figure


def _pareto_title(results: Results, points: list) -> str:
    base = next((p for p in points if p[0] == BASELINE), None)
    ours = [p for p in points if row_role_of(results, p[0]) == GRACE and p[0].precision != "bf16"]
    if base is None or not ours:
        return "Accuracy, throughput and memory"
    row, record, found = max(ours, key=lambda p: p[1]["tokens_per_second"])
    speed = record["tokens_per_second"] / base[1]["tokens_per_second"]
    memory = record["peak_mib"] / base[1]["peak_mib"]
    return (
        f"GRACE {row.precision} against the bf16 baseline:\n{found.value - base[2].value:+.1f} points, "
        f"{speed:.2f} × throughput, {memory:.2f} × memory"
    )


def row_role_of(results: Results, row: Row) -> str:
    """The role of a row of this experiment."""
    return row_role(results.experiment, row)


def entropy_error(results: Results) -> pd.DataFrame:
    """Teacher's entropy of the first answer token (nats) and error (1 - score) per question: benchmark, entropy, error."""
    frames = []
    for benchmark in results.benchmarks:
        frame = results.predictions(TEACHER, results.seeds[TEACHER][0], benchmark)
        if "entropy" in frame:
            frames.append(
                pd.DataFrame({"benchmark": benchmark, "entropy": frame["entropy"], "error": 1 - frame["score"]})
            )
    every = pd.concat(frames) if frames else pd.DataFrame({"benchmark": [], "entropy": [], "error": []})
    return every.dropna(subset=["entropy"])


def binned(data: pd.DataFrame, bins: int = BINS) -> pd.DataFrame:
    """Equally large bins by entropy: mean entropy, mean error, its standard error, count."""
    rank = np.argsort(np.argsort(data["entropy"].to_numpy(), kind="stable"), kind="stable")
    groups = data.assign(bin=rank * bins // len(data)).groupby("bin")
    frame = groups.agg(
        entropy=("entropy", "mean"), error=("error", "mean"), spread=("error", "std"), count=("error", "size")
    )
    return frame.assign(stderr=frame["spread"] / np.sqrt(frame["count"])).drop(columns="spread")


def entropy_numbers(results: Results) -> dict[str, float] | None:
    """Pearson r over questions and R² over the bins (the paper: 0.484 and 0.901 on ScienceQA); None without entropies."""
    data = entropy_error(results) if TEACHER in results.seeds else pd.DataFrame()
    if len(data) < 2 * BINS or data["error"].nunique() < 2 or data["entropy"].nunique() < 2:
        return None
    bins = binned(data)
    return {
        "r": float(np.corrcoef(data["entropy"], data["error"])[0, 1]),
        "r2": float(np.corrcoef(bins["entropy"], bins["error"])[0, 1] ** 2),
        "questions": len(data),
    }


def entropy(results: Results, plt):
    """Figure 2: the teacher's entropy against its error."""
    numbers = entropy_numbers(results)
    if numbers is None:
        return nothing(plt, f"{results.folder.name}: the teacher's predictions carry no entropies")
    data = entropy_error(results)
    bins = binned(data)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.8), width_ratios=(1.2, 1))
    slope, start = np.polyfit(bins["entropy"], bins["error"], 1)
    across = np.linspace(0, bins["entropy"].max(), 50)
    left.plot(across, 100 * (slope * across + start), color=COLOURS[3], ls="--", lw=1, label="line through the bins")
    left.errorbar(
        bins["entropy"],
        100 * bins["error"],
        yerr=100 * bins["stderr"],
        color=COLOURS[0],
        marker="o",
        ls="",
        capsize=3,
        label=f"{BINS} bins of {len(data) // BINS:,} questions",
    )
    left.set_xlabel("teacher's entropy at the answer (nats)")
    left.set_ylabel("teacher's error (%)")
    left.set_ylim(bottom=0)
    left.legend(loc="upper left")
    left.set_title(
        f"Pearson r = {numbers['r']:.2f}, binned R² = {numbers['r2']:.2f}\n(paper, ScienceQA: 0.484 and 0.901)"
    )
    each = {}
    for benchmark, part in data.groupby("benchmark", sort=False):
        varied = part["error"].nunique() > 1 and part["entropy"].nunique() > 1
        each[benchmark] = np.corrcoef(part["entropy"], part["error"])[0, 1] if varied else np.nan
    names = sorted(each, key=lambda name: np.nan_to_num(each[name], nan=-2))
    right.barh(names, [each[name] for name in names], color="#8a8a8a", edgecolor="black", lw=0.6)
    right.set_xlabel("Pearson r within the benchmark")
    right.axvline(0, color="black", lw=0.8)
    right.set_title(f"{sum(value > 0 for value in each.values())} of {len(each)} benchmarks have r > 0")
    finding = (
        "An unsure teacher errs more often" if numbers["r"] > 0.1 else "Entropy says little about the teacher's errors"
    )
    figure.suptitle(f"{finding} ({numbers['questions']:,} questions)", x=0.01, ha="left", fontsize=11)
    return figure


CURVES = {
    "loss": "loss",
    "ce": "cross-entropy",
    "kd": "distillation loss",
    "rcka": "1 − CKA",
    "beta": "beta",
    "omega": "omega",
}


def training_curves(results: Results) -> dict[str, pd.DataFrame]:
    """Training logs by a legend's name: of each trained recipe the first seed, at bf16 and its lowest common width."""
    curves = {}
    wanted = [row for row in results.seeds if row not in (TEACHER, BASELINE) and row.precision in ("bf16", "int4")]
    for row in wanted:
        if results.experiment.recipes[row.recipe].post_training is None and row_role_of(results, row) in (
            "none",
            "kd",
            GRACE,
        ):
            log = results.training(row, results.seeds[row][0])
            log = log.assign(kd=log["gdkd"]) if "gdkd" in log and "kd" not in log else log
            curves[f"{label(results.experiment, row)} {row.precision}"] = log
    return curves


def training(results: Results, plt):
    """Losses, beta and CKA over the optimiser steps."""
    curves = training_curves(results)
    if not curves:
        return nothing(plt, f"{results.folder.name}: no student was trained")
    shown = [key for key in CURVES if any(key in log and log[key].notna().any() for log in curves.values())]
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.4), sharex=True)
    for axis, key in zip(axes.flat, shown, strict=False):
        for index, (name, log) in enumerate(curves.items()):
            if key in log and log[key].notna().any():
                kept = log[["step", key]].dropna()
                smooth = kept[key].ewm(span=max(len(kept) // 15, 3)).mean()
                axis.plot(
                    kept["step"],
                    smooth,
                    color=COLOURS[index % len(COLOURS)],
                    ls=LINES[index % len(LINES)],
                    lw=1.4,
                    label=name,
                )
        axis.set_title(CURVES[key])
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis in axes[-1]:
        axis.set_xlabel("optimiser step")
    handles = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 6))
    figure.suptitle(_training_title(results, curves), x=0.01, ha="left", fontsize=11)
    return figure


def _training_title(results: Results, curves: dict[str, pd.DataFrame]) -> str:
    ours = [(name, log) for name, log in curves.items() if {"kd", "beta", "rcka"} <= set(log)]
    if not ours:
        return "Training curves"
    name, log = ours[-1]
    log = log.dropna(subset=["kd", "beta", "rcka"])
    tenth = max(len(log) // 10, 1)
    first, last = log.head(tenth).mean(numeric_only=True), log.tail(tenth).mean(numeric_only=True)
    return (
        f"{name}: distillation loss {first['kd']:.2f} to {last['kd']:.2f}, CKA {1 - first['rcka']:.2f} to {1 - last['rcka']:.2f}, "
        f"beta {log['beta'].iloc[0]:.2f} to {log['beta'].iloc[-1]:.2f} (means of the first and last tenth)"
    )
