"""Figure 2: the teacher's entropy against its error."""

import numpy as np

from grace.report.entropy import BINS, binned, correlation, entropy_error, entropy_numbers
from grace.report.figures.style import COLOURS, WIDE, headline, nothing
from grace.results.read import Results


def entropy(results: Results, plt):
    """Bins of equally many questions, and the correlation within each benchmark."""
    numbers = entropy_numbers(results)
    if numbers is None:
        return nothing(
            plt,
            f"{results.folder.name}: the teacher's predictions carry no entropies, it never errs, or its questions are "
            "few",
        )
    data = entropy_error(results)
    bins = binned(data)
    stderr = bins["stderr"].replace(np.inf, np.nan)  # a bin of one image has none
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 3.5), width_ratios=(1.25, 1))
    slope, start = np.polyfit(bins["entropy"], bins["error"], 1)
    across = np.array([bins["entropy"].min(), bins["entropy"].max()])
    left.plot(across, 100 * (slope * across + start), color="#8a8a8a", ls="--", lw=1, label="line through the bins")
    left.errorbar(
        bins["entropy"], 100 * bins["error"], yerr=100 * stderr, color=COLOURS[0], marker="o", ms=4, ls="",
        capsize=2.5, lw=1, label=f"{BINS} bins of {len(data) // BINS:,} questions",
    )  # fmt: skip
    left.set_xlabel("teacher's entropy at the answer (nats)")
    left.set_ylabel("teacher's error (%)")
    left.set_ylim(bottom=min(0, 100 * (bins["error"] - stderr.fillna(0)).min()))
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
