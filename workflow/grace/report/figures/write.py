"""Every figure of an experiment: drawn one by one, written as a whole."""

from pathlib import Path

from grace.files import whole_folder
from grace.report.figures.attention import attention, similarity
from grace.report.figures.entropy import entropy
from grace.report.figures.pareto import pareto
from grace.report.figures.roofline import roofline
from grace.report.figures.style import save, style
from grace.report.figures.training import training
from grace.results.read import Results

DRAWN = {
    "pareto": pareto,
    "entropy": entropy,
    "training": training,
    "attention": attention,
    "similarity": similarity,
    "roofline": roofline,
}
NAMES = tuple(DRAWN)


def write_figures(results: Results, out: Path) -> None:
    """Write NAMES.{svg,png} into the folder `out`, as a whole; attention and similarity run three models on an image."""
    with whole_folder(out, kind="figures") as part, style() as plt:
        for name, draw in DRAWN.items():
            save(draw(results, plt), part, name)
            plt.close("all")
