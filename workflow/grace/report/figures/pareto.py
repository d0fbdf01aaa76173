"""Figure 1: average score against decoding throughput, memory as the bubble's area."""

from grace.report.decoding import decode_rows
from grace.report.figures.style import COLOURS, MARKERS, WIDE, headline, named, nothing, place_labels, plain
from grace.report.formatting import number
from grace.report.paper import GRACE, row_role
from grace.results.paired import compare
from grace.results.read import BASELINE, Results, Row
from grace.results.statistics import ALPHA

LARGEST = 26  # radius of the largest bubble, in points


def pareto(results: Results, plt):
    """At the largest batch that was measured, keys and values in 16 bits;
    the line joins the models that no other beats on both axes.
    """
    measured = [
        (row, record) for row, record in decode_rows(results) if results.has_average(row) and record["cache"] == 16
    ]
    if not measured:
        return nothing(plt, f"{results.folder.name}: decoding was not measured (bench/decode.csv)")
    batch = max(record["batch"] for _, record in measured)
    kept = [(row, record) for row, record in measured if record["batch"] == batch]
    points = [(record["tokens_per_second"], results.estimate(row).value) for row, record in kept]
    errors = [results.estimate(row).stderr for row, _ in kept]
    memory = [record["peak_mib"] for _, record in kept]
    radii = [LARGEST * (each / max(memory)) ** 0.5 for each in memory]
    figure, axis = plt.subplots(figsize=(WIDE, 3.8))
    front = sorted(p for p in points if not any(o != p and o[0] >= p[0] and o[1] >= p[1] for o in points))
    axis.plot(*zip(*front, strict=True), color="#8a8a8a", ls=":", lw=1.2, zorder=1)
    for place, ((x, y), error, radius) in enumerate(zip(points, errors, radii, strict=True)):
        colour = COLOURS[place % len(COLOURS)]
        axis.scatter(x, y, s=(2 * radius) ** 2, color=colour, alpha=0.35, edgecolor="black", lw=0.8, zorder=2)
        axis.errorbar(x, y, yerr=error, color="black", capsize=3, lw=1, zorder=3)
        axis.scatter(
            x, y, s=24, marker=MARKERS[place % len(MARKERS)], color=colour, edgecolor="white", lw=0.5, zorder=4
        )
    axis.margins(0.22, 0.28)
    if max(points)[0] > 8 * min(points)[0]:
        axis.set_xscale("log")
    device = kept[0][1]["device"]
    axis.set_xlabel(f"decoded tokens per second ({device}, batch {int(batch)})")
    axis.set_ylabel("average score (points)")
    headline(
        figure,
        results,
        _finding(results, kept),
        "bars: ± 1 standard error; area: peak memory; dotted: the Pareto front",
    )
    texts = [f"{plain(named(results, row))}\n{_memory(each)}" for (row, _), each in zip(kept, memory, strict=True)]
    place_labels(axis, points, texts, radii)
    return figure


def _memory(mib: float) -> str:
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.1f} MiB"


def _finding(results: Results, kept: list[tuple[Row, dict]]) -> str:
    base = next((record for row, record in kept if row == BASELINE), None)
    ours = [p for p in kept if row_role(results.experiment, p[0]) == GRACE and p[0].precision != "bf16"]
    if base is None or not ours:
        return f"Accuracy, throughput and memory of {len(kept)} models"
    row, record = max(ours, key=lambda p: p[1]["tokens_per_second"])
    found = compare(results.all_scores(row), results.all_scores(BASELINE))
    gap = (
        f"{number(abs(found.difference))} ± {number(found.stderr)} points "
        f"{'above' if found.difference > 0 else 'below'}"
    )
    noise = "" if found.p < ALPHA else " (within noise)"
    speed = record["tokens_per_second"] / base["tokens_per_second"]
    memory = record["peak_mib"] / base["peak_mib"]
    return (
        f"{named(results, row)} is {gap} the bf16 baseline{noise}, at {speed:.2f} × its throughput and {memory:.2f} × "
        "its memory"
    )
