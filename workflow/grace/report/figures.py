"""Every figure of an experiment: drawn one by one, written as a whole."""

from pathlib import Path

from grace.files import whole_folder
from grace.report.drawing import save, style
from grace.report.entropy import entropy
from grace.report.looking import attention, similarity
from grace.report.pareto import pareto
from grace.report.read import Results
from grace.report.roofline import roofline
from grace.report.training import training

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
    """Write NAMES.{svg,png} into the folder `out`, as a whole; attention and similarity run three models on a picture."""
    with whole_folder(out, kind="figures") as part, style() as plt:
        for name, draw in DRAWN.items():
            save(draw(results, plt), part, name)
            plt.close("all")
