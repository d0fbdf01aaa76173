"""Every figure of an experiment but those of what was timed (`grace.report.speed`): drawn one by one,
written as a whole.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from grace.files import whole_folder
from grace.report.figures.attention import attention, similarity
from grace.report.figures.entropy import entropy
from grace.report.figures.style import save, style
from grace.report.figures.training import training
from grace.results.read import Results

DRAWN = {
    "entropy": entropy,
    "training": training,
    "attention": attention,
    "similarity": similarity,
}
NAMES = tuple(DRAWN)


def write_figures(results: Results, out: Path) -> None:
    """Write NAMES.{svg,png} into the folder `out`, as a whole;
    attention and similarity run three models on an image.
    """
    with whole_folder(out, kind="figures") as part:
        draw(DRAWN, results, part)


def draw(figures: Mapping[str, Callable], results: Results, folder: Path) -> None:
    """Draw each figure as SVG and PNG into a folder that is there."""
    with style() as plt:
        for name, figure in figures.items():
            save(figure(results, plt), folder, name)
            plt.close("all")
