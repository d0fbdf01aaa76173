"""Models of an experiment that wait to be asked, for a job that asks them on the way (`grace.cluster.ahead`).

It writes their predictions and sums them up; the manifest is left to their own job, which takes the sums over where
they hold (`grace.evaluate.summed_up`).
"""

from collections.abc import Iterator
from pathlib import Path

from grace.files import MANIFEST
from grace.precision import split_precision


def pending(results: Path) -> Iterator[tuple[Path, Path]]:
    """(model, where its predictions go) of every model below `results` that is whole and has no predictions yet.

    Looks again before each, for other jobs ask too.
    """
    for folder in [results / "teacher", *sorted(results.glob("students/*/*/seed*"))]:
        bits, _ = (0, False) if folder.name == "teacher" else split_precision(folder.parent.name)
        model, predictions = folder / ("packed" if bits else "model"), folder / "predictions"
        if (model / MANIFEST).is_file() and not predictions.exists():
            yield model, predictions
