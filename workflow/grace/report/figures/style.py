"""How figures look and how they are saved: one style, readable in greyscale, the same bytes every time."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import unescape
from itertools import product
from pathlib import Path
from typing import Any

from grace.report.paper import DEMO, label
from grace.results.read import Results, Row

DPI = 150
WIDE, HALF = 7.0, 3.4  # inches: a page's text and one of its columns
# told apart by lightness, marker and line style, so that print and colour blindness lose nothing
COLOURS = ("#1b1b1b", "#b2461e", "#2f6f9f", "#8a8a8a", "#6aa84f", "#c9a227", "#7b5ea7", "#4db6ac")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 1, 2)))
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "grace",
    "svg.fonttype": "path",
    "path.simplify": False,
}


@contextmanager
def style() -> Iterator:
    """Yield matplotlib's pyplot under this project's style, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: dict[Any, Any] = {**matplotlib.rcParamsDefault, "backend": "Agg", **_STYLE}
    with matplotlib.rc_context(settings):
        yield pyplot
        pyplot.close("all")


def plain(text: str) -> str:
    """Text for a figure, in which matplotlib takes no part between dollar signs for a formula."""
    return text.replace(r"\$", "$").replace("$", r"\$")


def headline(figure, results: Results, finding: str, detail: str = "") -> None:
    """Title: what the figure shows, computed from the data. Below: how it was drawn and of what models."""
    inches = figure.get_size_inches()[0]
    figure.suptitle(textwrap.fill(plain(finding), int(inches * 12)), x=0.01, ha="left", weight="bold")
    demo = DEMO if results.experiment.data.source == "demo" else ""
    said = "; ".join(part for part in (detail, demo) if part)
    figure.supxlabel(textwrap.fill(plain(said), int(inches * 15)), x=0.01, ha="left", fontsize=8, color="#555555")


def named(results: Results, row: Row) -> str:
    """A row's name in figures."""
    return f"{label(results.experiment, row)} {row.precision}"


def nothing(plt, text: str):
    """A figure that says why there is none."""
    figure, axis = plt.subplots(figsize=(WIDE, 1.2))
    axis.axis("off")
    axis.text(0, 0.5, "\n".join(textwrap.wrap(plain(text), 95)), va="center")
    figure.suptitle("Not drawn", x=0.01, ha="left")
    return figure


_SIDES = (
    (1, 0, "left", "center"), (-1, 0, "right", "center"), (0, 1, "center", "bottom"), (0, -1, "center", "top"),
    (1, 1, "left", "bottom"), (1, -1, "left", "top"), (-1, 1, "right", "bottom"), (-1, -1, "right", "top"),
)  # fmt: skip


def place_labels(axis, points: Sequence[tuple[float, float]], texts: Sequence[str], radii: Sequence[float]) -> None:
    """Write `texts` beside points (in data units), each where it covers no bubble (`radii` in points) and no
    other text.
    """
    figure = axis.figure
    figure.canvas.draw()
    scale = figure.dpi / 72
    at = [axis.transData.transform(point) for point in points]
    taken = [(x - r * scale, y - r * scale, x + r * scale, y + r * scale) for (x, y), r in zip(at, radii, strict=True)]
    inside = axis.get_window_extent()
    for point, text, radius in zip(points, texts, radii, strict=True):
        best = None
        for far, (dx, dy, ha, va) in product((1, 2.5), _SIDES):
            off = radius * (1 if dx == 0 or dy == 0 else 0.75) + 4 * far**2
            drawn = axis.annotate(
                text,
                point,
                (dx * off, dy * off),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=8,
                zorder=5,
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1},
            )
            drawn.set_in_layout(False)  # or the axis would shrink for it, and all places with it
            box = drawn.get_window_extent()
            clash = sum(_overlap((box.x0, box.y0, box.x1, box.y1), other) for other in taken)
            clash += 10 * (box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1)
            if best is None or clash < best[0]:
                if best is not None:
                    best[1].remove()
                best = (clash, drawn)
            else:
                drawn.remove()
        assert best is not None, "there are places to try"
        box = best[1].get_window_extent()
        taken.append((box.x0, box.y0, box.x1, box.y1))


def _overlap(a: tuple, b: tuple) -> float:
    """Share of box a that box b covers."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(wide, 0) * max(high, 0) / ((a[2] - a[0]) * (a[3] - a[1]))


def save(figure, folder: Path, name: str) -> None:
    """Write `name`.svg and `name`.png with the figure's title inside.

    Equal figures make equal bytes: no date, fixed ids, fonts as outlines.
    """
    title = " ".join(figure.get_suptitle().replace(r"\$", "$").split())
    figure.savefig(folder / f"{name}.svg", metadata={"Title": title, "Date": None, "Creator": None})
    figure.savefig(folder / f"{name}.png", dpi=DPI, metadata={"Title": title, "Software": None})


def title_of(svg: str) -> str:
    """The title that `save` put into an SVG file, or nothing."""
    found = re.search(r"<dc:title>(.*?)</dc:title>", svg, re.DOTALL)
    return unescape(found[1]) if found else ""
