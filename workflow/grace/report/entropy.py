"""The teacher's entropy and its errors, question by question: what the paper weighs distillation by."""

import numpy as np
import pandas as pd

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


def entropy_files(results: Results) -> tuple[str, ...]:
    """The predictions that `entropy_error` reads, below the experiment's folder."""
    there = [name for name in results.benchmarks if TEACHER in results.seeds and results.has(TEACHER, name)]
    return tuple(file for name in there for file in results.files(TEACHER, name))


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
    """Pearson r over questions, its error, and R² over the bins (paper, ScienceQA: 0.484, 0.901).

    None without entropies or errors, and where there are too few questions or images for these numbers.
    """
    data = entropy_error(results)
    if len(data) < 2 * BINS or data["error"].nunique() < 2 or data["entropy"].nunique() < 2:
        return None
    bins = binned(data)
    if data["image_id"].nunique() < 3 or bins["error"].nunique() < 2:
        return None
    r, stderr = correlation(data)
    r2 = float(np.corrcoef(bins["entropy"], bins["error"])[0, 1] ** 2)
    return {"r": r, "stderr": stderr, "r2": r2, "questions": len(data)} if np.isfinite([r, stderr, r2]).all() else None
