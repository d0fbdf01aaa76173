"""Training curves: losses, CKA and the controller's beta over the optimiser steps."""

import pandas as pd

from grace.errors import GraceError
from grace.report.figures.style import COLOURS, LINES, WIDE, headline, named, nothing, plain
from grace.report.paper import GRACE, row_role
from grace.results.read import BASELINE, TEACHER, Results

CURVES = {
    "loss": "objective, of its own start",
    "ce": "cross-entropy (nats)",
    "plain": "KL to the teacher (nats)",
    "gated": "gated decoupled KD (nats)",
    "cka": "CKA to the teacher",
    "beta": "beta: weight of distillation",
}


def training_curves(results: Results) -> dict[str, pd.DataFrame]:
    """Logs of plain training, KD and GRACE at bf16 and INT4, first seed each, by the name in the legend."""
    curves = {}
    for row in results.seeds:
        if row in (TEACHER, BASELINE) or row.precision not in ("bf16", "int4"):
            continue
        if row_role(results.experiment, row) not in ("none", "kd", GRACE):
            continue
        try:
            log = results.training(row, results.seeds[row][0])
        except GraceError:  # partial results: predictions without the log
            continue
        if "gdkd" in log and "kd" not in log:
            log = log.assign(kd=log["gdkd"])
        if "kd" in log:  # a panel of its own per objective: their units differ
            log = log.assign(**{results.experiment.recipes[row.recipe].kd: log["kd"]})
        if len(log):  # recipes sum different terms
            log = log.assign(loss=log["loss"] / log["loss"].head(max(len(log) // 20, 1)).mean())
        curves[named(results, row)] = log.assign(cka=1 - log["rcka"]) if "rcka" in log else log
    return curves


def training(results: Results, plt):
    """One panel per quantity; smoothed, the unsmoothed values faint behind."""
    curves = training_curves(results)
    if not curves:
        return nothing(plt, f"{results.folder.name}: no training log of a student is here")
    shown = [key for key in CURVES if any(key in log and log[key].notna().any() for log in curves.values())]
    rows = len(shown) // 3 + 1  # a panel more than there are curves, for the legend
    figure, axes = plt.subplots(rows, 3, figsize=(WIDE, 2.2 * rows), squeeze=False)
    for axis, key in zip(axes.flat, shown, strict=False):
        for place, (name, log) in enumerate(curves.items()):
            if key not in log or not log[key].notna().any():
                continue
            kept = log[["step", key]].dropna()
            smooth = kept[key].ewm(span=max(len(kept) // 12, 3)).mean()
            colour, line = COLOURS[place % len(COLOURS)], LINES[place % len(LINES)]
            axis.plot(kept["step"], kept[key], color=colour, lw=0.6, alpha=0.18)
            axis.plot(kept["step"], smooth, color=colour, ls=line, lw=1.3, label=plain(name))
        axis.set_title(CURVES[key])
        axis.set_xlabel("optimiser step")
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    handles = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes.flat[len(shown)].legend(handles.values(), handles.keys(), loc="center left")
    headline(figure, results, _finding(curves), "first seed of each")
    return figure


def _finding(curves: dict[str, pd.DataFrame]) -> str:
    ours = [(name, log) for name, log in curves.items() if {"kd", "beta", "cka"} <= set(log)]
    if not ours:
        return "Training curves"
    name, log = ours[-1]
    log = log.dropna(subset=["kd", "beta", "cka"])
    tenth = max(len(log) // 10, 1)
    first, last = log.head(tenth).mean(numeric_only=True), log.tail(tenth).mean(numeric_only=True)
    return (
        f"{name}: CKA {_course(first['cka'], last['cka'])}, the distillation loss {_course(first['kd'], last['kd'])}, "
        f"beta {_course(log['beta'].iloc[0], log['beta'].iloc[-1])} (means of the first and last tenth)"
    )


def _course(first: float, last: float) -> str:
    """What a quantity did, at the two digits that are shown."""
    if f"{first:.2f}" == f"{last:.2f}":
        return f"stays at {last:.2f}"
    return f"{'rises' if last > first else 'falls'} from {first:.2f} to {last:.2f}"
