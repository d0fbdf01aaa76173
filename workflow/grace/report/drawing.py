"""How figures look and how they are saved: one style, readable in greyscale, the same bytes every time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DPI = 150
# told apart by lightness, marker and line style, so that print and colour blindness lose nothing
COLOURS = ("#1b1b1b", "#b2461e", "#2f6f9f", "#8a8a8a", "#6aa84f", "#c9a227", "#7b5ea7", "#4db6ac")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 1, 2)))
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
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

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": "Agg", **_STYLE}):
        yield pyplot
        pyplot.close("all")


def save(figure, folder: Path, name: str) -> None:
    """Write `name`.svg and `name`.png; equal figures make equal bytes (no date, fixed ids, fonts as outlines)."""
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
    figure.savefig(folder / f"{name}.png", dpi=DPI, metadata={"Software": None})
