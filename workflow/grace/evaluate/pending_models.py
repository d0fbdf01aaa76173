"""Models of an experiment that wait to be asked, for a process that has started already.

Starting (torch, transformers, the harness) costs a small model's evaluation more than its questions do. A job that was
quick with its own model therefore asks others that are whole and have no predictions yet. It writes their predictions
and sums them up; the manifest is left to their own job, which takes the sums over where they hold
(`grace.evaluate.summed_up`) and loads nothing. Were one to fail here, its own job says why.
"""

import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from grace.errors import GraceError
from grace.files import MANIFEST
from grace.precision import split_precision

QUICK = 60.0  # seconds: a model that takes longer is asked by a job of its own
ALTOGETHER = 600.0  # seconds after which no further model is begun: a cluster ends jobs that run long


def pending(results: Path) -> Iterator[tuple[Path, Path]]:
    """(model, where its predictions go) of every model below `results` that is whole and has no predictions yet.

    Looks again before each, for other jobs ask too.
    """
    for folder in [results / "teacher", *sorted(results.glob("students/*/*/seed*"))]:
        bits, _ = (0, False) if folder.name == "teacher" else split_precision(folder.parent.name)
        model, predictions = folder / ("packed" if bits else "model"), folder / "predictions"
        if (model / MANIFEST).is_file() and not predictions.exists():
            yield model, predictions


def ask_pending(results: Path, since: float, ask: Callable[[Path, Path], None]) -> None:
    """Call `ask(model, predictions)` for each waiting model while that is quick; what one raises is said and stops no
    other.

    Args:
        since: `time.monotonic()` when this process began with its own model.
    """
    last = since
    for model, predictions in pending(results):
        now = time.monotonic()
        if now - last > QUICK or now - since > ALTOGETHER:
            return
        last = now
        try:
            print(f"asking {model} too, which waits for its own job", flush=True)
            ask(model, predictions)
        except GraceError as error:
            print(f"{error}; its own job will say so", flush=True)
        except Exception:
            traceback.print_exc()
