"""Standard errors of scores: the statistics behind every table and diff; `paired` has the tests that go with them.

Scores are 100 x the mean over questions, so everything here is in points.

Two things are random: which questions were asked, and which seed a model was trained with. Questions about one image
move together, so the image is the unit that is sampled (Liang and Zeger's cluster-robust variance). With x[s, q] the
score of seed s on question q, m[s] a seed's mean and u[s, g] the sum of (x[s, q] - m[s]) / Q over the questions of
image g, of which there are G:

    questions  C = G/(G-1) sum_g (mean_s u[s, g])^2                           error of a mean over seeds from questions
    seeds      B = 1/(S (S-1)) sum_s (m[s] - mean m)^2                        what the seeds' means vary by
    chance     I = G/(G-1) / (S (S-1)) sum_{s,g} (u[s, g] - mean_s u[s, g])^2 the part of B that is questions flipping
    variance   C + max(0, B - I)

This is the unbiased estimate of the two-way random-effects model (equal to the two-way clustering of Cameron, Gelbach
and Miller 2011), kept from falling below C. Its degrees of freedom are Satterthwaite's, with S - 1 for B.

Where seeds matter much and a few of them agree by luck, B is small, Satterthwaite's degrees jump into the hundreds, and
that test alone would reject far too often at the small levels that Holm's correction asks for. So a second one stands
beside it: Student's t over the seeds, sqrt(B) on S - 1 degrees (Welch's where two sides have seeds of their own). The
larger p and the wider interval count. Simulated, equal methods are then rejected at most 1.2 times as often as the
level says, from 5% down to 0.1%, with three and with five seeds (tests/benchmarks/false_positives.py).

A mean over benchmarks is handled alike: u then sums (x - m) / (K Q_k) over all K benchmarks, and m[s] is a seed's mean
over benchmarks, because a good seed is good on all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grace.errors import GraceError

ALPHA, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Scores:
    """One model on one benchmark."""

    values: np.ndarray  # [seeds, questions] float, points: 0 to 100 where an answer is right or wrong
    images: np.ndarray  # [questions] image of each question: any labels; equal labels are one image
    seeds: tuple = (0,)  # [seeds] which seed each row of `values` is; equal labels in two models are paired

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape != (len(self.seeds), len(self.images)):
            raise GraceError(
                f"scores of shape {self.values.shape} do not fit {len(self.seeds)} seeds x {len(self.images)} questions"
            )
        if self.values.size == 0:
            raise GraceError("no scores: a benchmark needs at least one question and one seed")

    def only(self, seeds: Sequence) -> "Scores":
        """The same on some of its seeds, in that order; a `GraceError` names one that it lacks."""
        lacking = [seed for seed in seeds if seed not in self.seeds]
        if lacking:
            raise GraceError(f"no scores of seed {lacking[0]}; there are {', '.join(map(str, self.seeds))}")
        return Scores(self.values[[self.seeds.index(seed) for seed in seeds]], self.images, tuple(seeds))


@dataclass(frozen=True)
class Estimate:
    """A mean over questions, seeds and benchmarks, in points."""

    value: float
    stderr: float
    df: float  # degrees of freedom of the standard error
    seeds: int
    questions: int
    n_images: int
    question_stderr: float  # the part of `stderr` that comes from the questions
    seed_stderr: float = 0.0  # from the seeds alone, sqrt(B); 0 with one seed
    seed_df: float = np.inf  # and its degrees of freedom

    def half_width(self, alpha: float = ALPHA) -> float:
        """Half the confidence interval at 1 - `alpha`, in points: the wider of the two."""
        return half_width(alpha, (self.stderr, self.df), (self.seed_stderr, self.seed_df))


def half_width(alpha: float, *errors: tuple[float, float]) -> float:
    """Half the widest confidence interval at 1 - `alpha` of several (standard error, degrees of freedom)."""
    from scipy import stats  # half a second, which means and standard errors can do without

    return max(float(stats.t.isf(alpha / 2, df)) * stderr for stderr, df in errors)


def influence(parts: Sequence[Scores]) -> tuple[np.ndarray, np.ndarray]:
    """A seed's mean [seeds] over the parts, and each image's pull on it [seeds, images]."""
    labels, codes = np.unique(np.concatenate([part.images for part in parts]), return_inverse=True)
    seeds = len(parts[0].seeds)
    means, pull, start = np.zeros(seeds), np.zeros((seeds, len(labels))), 0
    for part in parts:
        if part.seeds != parts[0].seeds:
            raise GraceError(f"benchmarks were run with different seeds: {part.seeds} and {parts[0].seeds}")
        questions = part.values.shape[1]
        where = codes[start : start + questions]
        mean = part.values.mean(axis=1)
        means += mean / len(parts)
        for row, deviation in zip(pull, part.values - mean[:, None], strict=True):
            row += np.bincount(where, deviation, minlength=len(labels)) / (len(parts) * questions)
        start += questions
    return means, pull


def seed_parts(means: np.ndarray, pull: np.ndarray) -> tuple[float, float]:
    """B and I of the module's formula; both 0 with one seed."""
    seeds, n_images = pull.shape
    if seeds == 1:
        return 0.0, 0.0
    between = means.var(ddof=1) / seeds
    chance = _over_images(((pull - pull.mean(axis=0)) ** 2).sum(), n_images) / (seeds * (seeds - 1))
    return float(between), float(chance)


def _over_images(squares: float, n_images: int) -> float:
    """A sum of squares times G/(G-1); infinite for one image, from which nothing can be generalised."""
    return float(squares) * n_images / (n_images - 1) if n_images > 1 else float("inf")


def degrees(total: float, questions: float, n_images: int, seed_parts: Sequence[tuple[float, int]]) -> float:
    """Satterthwaite's degrees of freedom of C + (B - I), with (B, seeds) per independent group of seeds."""
    spread = questions**2 / max(n_images - 1, 1) + sum(b**2 / (seeds - 1) for b, seeds in seed_parts if seeds > 1)
    return max(total**2 / spread, 1.0) if spread > 0 else float("inf")


def estimate(parts: Sequence[Scores]) -> Estimate:
    """The mean of `parts` (one per benchmark) with the standard error of this module's formula.

    Raises GraceError where parts have different seeds.
    """
    means, pull = influence(parts)
    seeds, n_images = pull.shape
    questions = _over_images((pull.mean(axis=0) ** 2).sum(), n_images)
    between, chance = seed_parts(means, pull)
    total = questions + max(0.0, between - chance)
    return Estimate(
        value=float(means.mean()),
        stderr=float(np.sqrt(total)),
        df=degrees(total, questions, n_images, [(between, seeds)]),
        seeds=seeds,
        questions=sum(part.values.shape[1] for part in parts),
        n_images=n_images,
        question_stderr=float(np.sqrt(questions)),
        seed_stderr=float(np.sqrt(between)),
        seed_df=seeds - 1 if seeds > 1 else np.inf,
    )
