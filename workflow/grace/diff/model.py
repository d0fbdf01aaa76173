"""What a comparison of two versions finds: changes of scores, flipped answers, and what else differs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from grace.results.paired import Comparison
from grace.results.read import Row
from grace.results.statistics import ALPHA


@dataclass
class Change:
    """One model on one benchmark (or on the average of those it shares), B less A.

    Attributes:
        comparison: None where the predictions are identical.
        p: after Holm's correction over everything that changed.
        before, after: scores in points over the shared questions.
        added, removed: questions that only B or only A has; `reworded` ones have another prompt, `redefined` another
            right answer (these are not compared).
    """

    row: Row
    benchmark: str
    seeds: tuple[int, ...]
    before: float
    after: float
    shared: int
    added: int = 0
    removed: int = 0
    reworded: int = 0
    redefined: int = 0
    comparison: Comparison | None = None
    p: float = 1.0

    @property
    def regressed(self) -> bool:
        """A drop that is more than noise."""
        return self.comparison is not None and self.comparison.difference < 0 and self.p < ALPHA


@dataclass(frozen=True)
class Flip:
    """A question whose score changed."""

    row: Row
    seed: int
    benchmark: str
    sample: str
    target: str
    before: str
    after: str
    change: float


@dataclass(frozen=True)
class Moved:
    """Questions whose score changed for one seed of one row: from file `a` to file `b`."""

    seed: int
    a: Path
    b: Path
    samples: np.ndarray
    targets: np.ndarray
    change: np.ndarray


@dataclass
class Difference:
    """Everything that two versions differ in; see `diff`."""

    a: str
    b: str
    changes: list[Change] = field(default_factory=list)
    flips: list[Flip] = field(default_factory=list)  # the first of `flipped`, those to look at
    flipped: int = 0
    moved: dict[tuple[Row, str], list[Moved]] = field(default_factory=dict)
    only: dict[str, list[str]] = field(default_factory=dict)  # "models in A", ... -> names
    settings: list[tuple[str, Any, Any]] = field(default_factory=list)
    environment: list[tuple[str, Any, Any]] = field(default_factory=list)
    artifacts: list[tuple[str, str]] = field(default_factory=list)  # folder, what happened to it
    speed: pd.DataFrame | None = None
    questions: dict[tuple[str, str], tuple[str, bytes]] = field(default_factory=dict)  # question and image of a flip

    @property
    def regressions(self) -> list[Change]:
        """Significant drops."""
        return [change for change in self.changes if change.regressed]
