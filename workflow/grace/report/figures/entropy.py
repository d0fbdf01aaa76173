"""Figure 2: the teacher's entropy against its error."""

import numpy as np
import pandas as pd

from grace.report.figures.style import COLOURS, WIDE, headline, nothing
from grace.results.read import TEACHER, Results
from grace.results.statistics import Scores, estimate

BINS = 10
REPLICATES = 400


def entropy_error(results: Results) -> pd.DataFrame:
    """Teacher's entropy of the first answer token (nats) and error (1 - score): benchmark, image_id, entropy, error."""
    frames = []
    for benchmark in results.benchmarks if TEACHER in results.seeds else ():
        if not results.has(TEACHER, benchmark):
            continue
        frame = results.predictions(TEACHER, results.seeds[TEACHER][0], benchmark)
        if "entropy" in frame:
            kept = frame[["image_id", "entropy"]].assign(benchmark=benchmark, error=1 - frame["score"])
            frames.append(kept)
    columns = {"benchmark": [], "image_id": [], "entropy": [], "error": []}
    every = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns)
    return every.dropna(subset=["entropy"])


def binned(data: pd.DataFrame, bins: int = BINS) -> pd.DataFrame:
    """Equally large bins by entropy: mean entropy, mean error, its standard error clustered by image, count."""
    rank = np.argsort(np.argsort(data["entropy"].to_numpy(), kind="stable"), kind="stable")
    lines = []
    for _, part in data.groupby(rank * bins // len(data)):
        found = estimate([Scores(part["error"].to_numpy()[None], pd.factorize(part["image_id"])[0])])
        lines.append((part["entropy"].mean(), found.value, found.stderr, len(part)))
    return pd.DataFrame(lines, columns=["entropy", "error", "stderr", "count"])


def correlation(data: pd.DataFrame) -> tuple[float, float]:
    """Pearson r of entropy and error, and its standard error by a bootstrap over images; nan where one is constant."""
    if len(data) < 3 or data["entropy"].nunique() < 2 or data["error"].nunique() < 2:
        return float("nan"), float("nan")
    x, y = data["entropy"].to_numpy(float), data["error"].to_numpy(float)
    x, y = x - x.mean(), y - y.mean()
    codes, labels = pd.factorize(data["image_id"])
    moments = np.stack(
        [np.bincount(codes, each, minlength=len(labels)) for each in (np.ones_like(x), x, y, x * x, y * y, x * y)],
        axis=1,
    )
    random = np.random.default_rng(0)
    drawn = random.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=REPLICATES) @ moments
    n, sx, sy, sxx, syy, sxy = drawn.T
    spread = np.clip(n * sxx - sx**2, 0, None) * np.clip(n * syy - sy**2, 0, None)
    r = (n * sxy - sx * sy)[spread > 0] / np.sqrt(spread[spread > 0])  # a draw without any error has no r
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())), float(np.std(r, ddof=1))


def entropy_numbers(results: Results) -> dict[str, float] | None:
    """Pearson r over questions, its error, and R² over the bins (paper, ScienceQA: 0.484, 0.901); None without entropies."""
    data = entropy_error(results)
    if len(data) < 2 * BINS or data["error"].nunique() < 2 or data["entropy"].nunique() < 2:
        return None
    bins = binned(data)
    r, stderr = correlation(data)
    r2 = float(np.corrcoef(bins["entropy"], bins["error"])[0, 1] ** 2)
    return {"r": r, "stderr": stderr, "r2": r2, "questions": len(data)}


def entropy(results: Results, plt):
    """Bins of equally many questions, and the correlation within each benchmark."""
    numbers = entropy_numbers(results)
    if numbers is None:
        return nothing(plt, f"{results.folder.name}: the teacher's predictions carry no entropies, or it never errs")
    data = entropy_error(results)
    bins = binned(data)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 3.5), width_ratios=(1.25, 1))
    slope, start = np.polyfit(bins["entropy"], bins["error"], 1)
    across = np.array([bins["entropy"].min(), bins["entropy"].max()])
    left.plot(across, 100 * (slope * across + start), color="#8a8a8a", ls="--", lw=1, label="line through the bins")
    left.errorbar(
        bins["entropy"], 100 * bins["error"], yerr=100 * bins["stderr"], color=COLOURS[0], marker="o", ms=4, ls="",
        capsize=2.5, lw=1, label=f"{BINS} bins of {len(data) // BINS:,} questions",
    )  # fmt: skip
    left.set_xlabel("teacher's entropy at the answer (nats)")
    left.set_ylabel("teacher's error (%)")
    left.set_ylim(bottom=min(0, 100 * (bins["error"] - bins["stderr"]).min()))
    left.legend(loc="upper left")
    left.margins(y=0.25)
    left.set_title(f"binned R² = {numbers['r2']:.2f}")
    each = {name: correlation(part) for name, part in data.groupby("benchmark", sort=False)}
    names = sorted(each, key=lambda name: np.nan_to_num(each[name][0], nan=-2))
    shown = [name for name in names if np.isfinite(each[name][0])]
    values, spread = [each[n][0] for n in shown], [1.96 * each[n][1] for n in shown]
    right.errorbar(values, shown, xerr=spread, color=COLOURS[0], marker="o", ms=4, ls="", capsize=2.5, lw=1)
    right.axvline(0, color="black", lw=0.8)
    right.margins(y=0.08)
    right.set_xlabel("r within the benchmark (95% interval)")
    surely = sum(each[name][0] > 1.96 * each[name][1] for name in shown)
    right.set_title(f"r is above 0 in {surely} of {len(each)} benchmarks")
    paper = "" if results.experiment.family == "qwen3_vl" else "; the paper on ScienceQA: r = 0.484, binned R² = 0.901"
    headline(figure, results, _finding(numbers), f"{numbers['questions']:,} questions{paper}")
    return figure


def _finding(numbers: dict[str, float]) -> str:
    r, stderr = numbers["r"], numbers["stderr"]
    said = f"Pearson r = {r:.2f} ± {stderr:.2f}"
    if abs(r) < 1.96 * stderr:
        return f"Entropy says nothing sure about the teacher's errors: {said}"
    if r < 0:
        return f"An unsure teacher errs less often: {said}"
    return f"An unsure teacher errs more often{'' if r > 0.1 else ', a little'}: {said}"
