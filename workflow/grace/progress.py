"""Progress of long work: a live bar with the time left on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0


class _Lines:
    """What stands in for the bar when standard error is a file: one line every half minute."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done, self.note = title, total, 0, ""
        self.start = self.last = time.monotonic()

    def __call__(self, steps: int = 1, note: str = "") -> None:
        self.done, self.note = self.done + steps, note
        now = time.monotonic()
        if now - self.last >= SECONDS_BETWEEN_LINES:
            self.last = now
            left = (now - self.start) / max(self.done, 1) * (self.total - self.done)
            print(
                f"{self.title}: {self.done}/{self.total}, about {left:.0f} s left {self.note}".rstrip(), file=sys.stderr
            )


@contextmanager
def progress(title: str, total: int) -> Iterator:
    """Yield `advance(steps=1, note="")`. Live on a terminal, sparse lines elsewhere (a job's log, CI)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(title, total)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as live:
        task = live.add_task(title, total=total, note="")
        yield lambda steps=1, note="": live.update(task, advance=steps, note=note)
