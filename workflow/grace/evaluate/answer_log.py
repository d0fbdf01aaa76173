"""Answers of a benchmark that is being asked, kept on disk as they come, so that a kill loses less than a minute of
them.

Answers do not depend on the harness: it scores them anew, which is quick, and the file of predictions that comes out
is the one that an undisturbed run writes. A part is a JSON file that is written whole, named after the questions that
it belongs to; the folder goes once the benchmark's predictions stand.
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from grace.benchmarks.extraction import Answer
from grace.errors import GraceError
from grace.files import read_json, write_json

SECONDS_BETWEEN_PARTS = 30.0


class AnswerLog:
    """The kept answers of one model to one benchmark.

    Args:
        folder: theirs alone; its name holds the key of the predictions that they will be.
        writer: number of this process, so that several write beside each other.
    """

    def __init__(self, folder: Path, writer: int = 0) -> None:
        self.folder, self.writer = folder, writer
        self._waiting: dict[int, Answer] = {}
        self._name = ""  # of the questions that the waiting answers belong to
        self._last = time.monotonic()

    def read(self, questions: str) -> dict[int, Answer]:
        """Kept answers by the question's number; unreadable parts count as not there.

        Args:
            questions: hash of all the questions that are asked together.
        """
        found: dict[int, Answer] = {}
        for path in sorted(self.folder.glob(f"{questions}-*.json")):
            try:
                found |= {number: Answer(*answer) for number, *answer in read_json(path)}
            except (GraceError, TypeError, ValueError):
                path.unlink(missing_ok=True)
        return found

    def add(self, questions: str, numbers: Sequence[int], answers: Sequence[Answer]) -> None:
        """Take the answers of a batch; write a part now and then, and before answers to other questions come."""
        if questions != self._name:  # their numbers start anew
            self._write()
            self._name = questions
        self._waiting |= dict(zip(numbers, answers, strict=True))
        if time.monotonic() - self._last >= SECONDS_BETWEEN_PARTS:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            rows = [[number, a.text, a.logprob, a.entropy] for number, a in self._waiting.items()]
            write_json(self.folder / f"{self._name}-{min(self._waiting):08d}-{self.writer}.json", rows)
        self._waiting, self._last = {}, time.monotonic()

    def drop(self) -> None:
        """Forget them all: the predictions stand."""
        shutil.rmtree(self.folder, ignore_errors=True)
