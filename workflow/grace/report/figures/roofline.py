"""The INT4 GEMM's rate against its roof: bandwidth and matrix rate that the same benchmark run measured."""

import pandas as pd

from grace.report.figures.style import COLOURS, MARKERS, WIDE, headline, nothing
from grace.results.read import Results

NEEDED = ("out_features", "in_features", "group_size", "floor_microseconds", "dense_microseconds")
ABOVE = 1.05  # times the roof: more than timing noise
BYTES = 2  # of an activation, and of a scale


def work(kernel: pd.DataFrame) -> pd.DataFrame:
    """Adds to bench/kernel.csv: intensity (FLOP per byte) and rates of the INT4 and the dense GEMM and the
    roof (GFLOP/s).
    """
    n, k, m = kernel["out_features"], kernel["in_features"], kernel["m"]
    flops = 2.0 * m * n * k
    moved = n * k / 2 + BYTES * n * k / kernel["group_size"] + BYTES * m * (k + n)
    rates = {name: flops / kernel[f"{name}microseconds"] / 1e3 for name in ("", "dense_", "floor_")}
    return kernel.assign(intensity=flops / moved, packed=rates[""], dense=rates["dense_"], roof=rates["floor_"])


def roofline(results: Results, plt):
    """Left: rate over arithmetic intensity, under the roof. Right: speed-up over the dense GEMM by activation rows."""
    if results.kernel is None:
        return nothing(plt, f"{results.folder.name}: the kernel benchmark was not run (bench/kernel.csv)")
    if not set(NEEDED) <= set(results.kernel):
        return nothing(plt, f"{results.folder.name}: bench/kernel.csv is of an older version; run the benchmark again")
    data = work(results.kernel)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 3.4))
    roof = data.sort_values("intensity").groupby("intensity")["roof"].max()
    left.plot(roof.index, roof, color="black", lw=1.2, label="roof (measured)")
    left.scatter(data["intensity"], data["dense"], s=14, facecolor="none", edgecolor="#8a8a8a", label="dense GEMM")
    for place, (backend, part) in enumerate(data.groupby("backend")):
        style = {"color": COLOURS[(place + 1) % len(COLOURS)], "marker": MARKERS[(place + 1) % len(MARKERS)]}
        left.scatter(part["intensity"], part["packed"], s=16, label=backend, **style)
        by = part.groupby("m")["speedup"].agg(["median", "min", "max"])
        error = [by["median"] - by["min"], by["max"] - by["median"]]
        right.errorbar(by.index, by["median"], yerr=error, capsize=2.5, lw=1.2, ms=4, label=backend, **style)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
    left.set_xlabel("FLOP per byte of the INT4 GEMM")
    left.set_ylabel("GFLOP/s")
    left.legend()
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    right.axhline(1, color="black", lw=0.8)
    right.set_xlabel("M, activation rows")
    right.set_ylabel("times as fast as the dense GEMM")
    right.set_title("median, least and most over shapes")
    right.set_xticks(sorted(data["m"].unique()), [str(m) for m in sorted(data["m"].unique())])
    device = ", ".join(data["device"].unique())
    headline(figure, results, _finding(data), f"{data['shape'].nunique()} shapes, {device}")
    return figure


def _finding(data: pd.DataFrame) -> str:
    above = data["floor_share"].max()
    if above > ABOVE:
        return (
            f"NOT TO BE TRUSTED: a GEMM stands at {above:.2f} times the measured roof, so something else ran "
            "meanwhile; run the kernel benchmark again on an idle machine"
        )
    few, many = data["m"].min(), data["m"].max()
    best = data[data["m"] == few].groupby("backend")["speedup"].median().idxmax()
    own = data[data["backend"] == best]
    at = own.groupby("m").agg(speedup=("speedup", "median"), share=("floor_share", "median"))
    said = " and ".join(f"{at.at[m, 'speedup']:.2f} × at M = {m}" for m in dict.fromkeys((few, many)))
    share = " and ".join(f"{at.at[m, 'share']:.0%}" for m in dict.fromkeys((few, many)))
    return f"{best} against the dense GEMM: {said} (medians), {share} of the roof"
