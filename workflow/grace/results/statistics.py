"""Standard errors, paired tests and their correction: the statistics behind every table and diff.

Scores are 100 x the mean over questions, so everything here is in points.

Two things are random: which questions were asked, and which seed a model was trained with. Questions about one image
move together, so the image is the unit that is sampled (Liang and Zeger's cluster-robust variance). With x[s, q] the
score of seed s on question q, m[s] a seed's mean and u[s, g] the sum of (x[s, q] - m[s]) / Q over the questions of
image g, of which there are G:

    questions   C = G/(G-1) sum_g (mean_s u[s, g])^2                           error of a mean over seeds from the questions
    seeds       B = 1/(S (S-1)) sum_s (m[s] - mean m)^2                        what the seeds' means vary by
    chance      I = G/(G-1) / (S (S-1)) sum_{s,g} (u[s, g] - mean_s u[s, g])^2 the part of B that is questions flipping
    variance    C + max(0, B - I)

This is the unbiased estimate of the two-way random-effects model (equal to the two-way clustering of Cameron, Gelbach
and Miller 2011), kept from falling below C. Its degrees of freedom are Satterthwaite's, with S - 1 for B: three seeds
that disagree make a test with little power, as they should. With one seed B is unknown and the error covers the
questions alone. Simulated, a test at 5% rejects equal methods in 1% to 6% with five seeds, up to 8% with three and up
to 12% with two, the most where seeds matter far more than questions: two seeds are too few to claim a method by.

A mean over benchmarks is handled alike: u then sums (x - m) / (K Q_k) over all K benchmarks, and m[s] is a seed's mean
over benchmarks, because a good seed is good on all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import signal, stats

from grace.errors import GraceError

REPLICATES, ALPHA, POWER = 1000, 0.05, 0.8


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


@dataclass(frozen=True)
class Comparison:
    """Model A less model B on the same questions, in points."""

    difference: float
    stderr: float
    p: float  # the larger of the two below: a difference counts when it holds over questions and over seeds
    p_questions: float  # these very models, other questions: McNemar or paired bootstrap
    p_seeds: float  # other seeds too: t test on the standard error above; 1 seed: equal to p_questions
    test: str
    seeds: int
    questions: int
    gained: int  # answers (seed x question) where A scores above B
    lost: int
    question_stderr: float
    df: float  # degrees of freedom of `stderr`

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the difference, in points."""
        half = float(stats.t.isf((1 - level) / 2, self.df)) * self.stderr
        return self.difference - half, self.difference + half


def _influence(parts: Sequence[Scores]) -> tuple[np.ndarray, np.ndarray]:
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


def _seed_parts(means: np.ndarray, pull: np.ndarray) -> tuple[float, float]:
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


def _degrees(total: float, questions: float, n_images: int, seed_parts: Sequence[tuple[float, int]]) -> float:
    """Satterthwaite's degrees of freedom of C + (B - I), with (B, seeds) per independent group of seeds."""
    spread = questions**2 / max(n_images - 1, 1) + sum(b**2 / (seeds - 1) for b, seeds in seed_parts if seeds > 1)
    return max(total**2 / spread, 1.0) if spread > 0 else float("inf")


def estimate(parts: Sequence[Scores]) -> Estimate:
    """The mean of `parts` (one per benchmark) with the standard error of this module's formula.

    Raises GraceError where parts have different seeds.
    """
    means, pull = _influence(parts)
    seeds, n_images = pull.shape
    questions = _over_images((pull.mean(axis=0) ** 2).sum(), n_images)
    between, chance = _seed_parts(means, pull)
    total = questions + max(0.0, between - chance)
    return Estimate(
        value=float(means.mean()),
        stderr=float(np.sqrt(total)),
        df=_degrees(total, questions, n_images, [(between, seeds)]),
        seeds=seeds,
        questions=sum(part.values.shape[1] for part in parts),
        n_images=n_images,
        question_stderr=float(np.sqrt(questions)),
    )


def mcnemar(differences: np.ndarray) -> float:
    """Two-sided p of McNemar's exact test, generalised to images with several questions or seeds.

    `differences` [images] int: answers right in A and wrong in B, less the reverse. Under the null hypothesis A and B
    may swap names image by image, so the sum is a sum of +-|d|, whose distribution is computed exactly. With one
    question per image that is the binomial test of McNemar; with more it is Durkalski's (2003) clustered form without
    its normal approximation.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]).astype(int), return_counts=True)
    if not len(sizes):
        return 1.0
    chances = np.ones(1)  # of the sum, from its smallest to its largest value in steps of 1
    for size, count in zip(sizes, counts, strict=True):
        flips = np.zeros(2 * size * count + 1)
        flips[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = signal.convolve(chances, flips).clip(0)  # by FFT where that is faster: right to about 1e-15
    largest = (len(chances) - 1) // 2
    observed = abs(int(differences.sum()))
    return float(min(1.0, 2 * chances[largest + observed :].sum()))


@lru_cache(maxsize=2)
def _resamples(n_images: int, replicates: int, seed: int) -> np.ndarray:
    """How often each replicate draws each image [replicates, images] fp32; the same draws for every comparison."""
    random = np.random.default_rng(seed)
    drawn = np.empty((replicates, n_images), dtype=np.float32)  # filled in place: 90,000 images are 360 MB already
    for row in drawn:
        row[:] = np.bincount(random.integers(n_images, size=n_images), minlength=n_images)
    return drawn


def paired_bootstrap(parts: Sequence[Scores], replicates: int = REPLICATES, seed: int = 0) -> tuple[float, float]:
    """Standard error and two-sided p of a mean difference, images resampled with replacement.

    `parts`: differences A - B, one per benchmark; all seeds of an image move together. The p value takes Student's
    tail at the bootstrap's standard error, with as many degrees of freedom as there are images less one: counting
    replicates cannot go below 1 / replicates, which Holm's correction of a large table would turn into "not
    significant" whatever the data. It never falls below 2^(1 - images), the least that a test by swapping A and B
    could give, so that a constant difference over a handful of images proves nothing.
    """
    labels, codes = np.unique(np.concatenate([part.images for part in parts]), return_inverse=True)
    sums, counts, start = [], [], 0
    for part in parts:
        where = codes[start : start + part.values.shape[1]]
        sums.append(np.bincount(where, part.values.mean(axis=0), minlength=len(labels)))
        counts.append(np.bincount(where, minlength=len(labels)))
        start += len(where)
    sums, counts = np.array(sums, dtype=np.float32).T, np.array(counts, dtype=np.float32).T  # [images, parts]
    weights = _resamples(len(labels), replicates, seed)
    total, asked = np.hsplit(weights @ np.hstack([sums, counts]), 2)  # the weights, 360 MB, are read once
    drawn = np.nanmean(np.divide(total, asked, out=np.full_like(asked, np.nan), where=asked > 0), axis=1)
    stderr = float(np.std(drawn, ddof=1))
    observed = float(np.mean([part.values.mean() for part in parts]))
    n_images = len(labels)
    return stderr, max(_p(observed, stderr, max(n_images - 1, 1)), 2.0 ** (1 - n_images))


def _p(difference: float, stderr: float, df: float) -> float:
    """Two-sided p of Student's t; without any spread, a difference is certain and none is none."""
    if stderr == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * stats.t.sf(abs(difference) / stderr, df))


def _aligned(a: Sequence[Scores], b: Sequence[Scores]) -> tuple[list[Scores], list[Scores], bool]:
    """A and B on shared seeds where there are any; the last value says whether seeds are paired."""
    if len(a) != len(b) or any(len(x.images) != len(y.images) for x, y in zip(a, b, strict=True)):
        raise GraceError("paired tests need the same questions on both sides; align the samples first")
    shared = [seed for seed in a[0].seeds if seed in b[0].seeds]
    if not shared:
        return list(a), list(b), False

    def pick(parts: Sequence[Scores]) -> list[Scores]:
        rows = [parts[0].seeds.index(seed) for seed in shared]
        return [Scores(part.values[rows], part.images, tuple(shared)) for part in parts]

    return pick(a), pick(b), True


def compare(a: Sequence[Scores], b: Sequence[Scores], seed: int = 0) -> Comparison:
    """A less B over `parts` (one per benchmark, the same questions in the same order on both sides).

    Seeds that both sides have are paired, and only these are compared: a student's seed is also its baseline's. Sides
    without a common seed (a teacher and its students) are held against each other in every combination, and then the
    seeds' variances add up. Scores of 0 and 100 on one benchmark are tested by McNemar, all else by the paired
    bootstrap.
    """
    a, b, paired = _aligned(a, b)
    if paired:
        differences = [Scores(x.values - y.values, x.images, x.seeds) for x, y in zip(a, b, strict=True)]
        result = estimate(differences)
        difference, stderr, question_stderr, df = result.value, result.stderr, result.question_stderr, result.df
    else:
        differences = [
            Scores(x.values.mean(axis=0, keepdims=True) - y.values.mean(axis=0, keepdims=True), x.images)
            for x, y in zip(a, b, strict=True)
        ]
        questions = estimate(differences)
        groups = [(_seed_parts(*_influence(side)), len(side[0].seeds)) for side in (a, b)]
        total = questions.question_stderr**2 + sum(max(0.0, between - chance) for (between, chance), _ in groups)
        df = _degrees(total, questions.question_stderr**2, questions.n_images, [(bt, n) for (bt, _), n in groups])
        difference, stderr, question_stderr = questions.value, float(np.sqrt(total)), questions.question_stderr
    binary = len(a) == 1 and all(np.isin(side.values, (0, 100)).all() for side in (a[0], b[0]))
    every = [x.values[:, None, :] - y.values[None, :, :] for x, y in zip(a, b, strict=True)]
    if paired:
        every = [part.values[:, None, :] for part in differences]
    if binary:
        _, codes = np.unique(a[0].images, return_inverse=True)
        p_questions = mcnemar(np.bincount(codes, np.sign(every[0]).sum(axis=(0, 1))).round().astype(int))
        test = "McNemar"
    else:
        _, p_questions = paired_bootstrap(differences, seed=seed)
        test = "bootstrap"
    seeds = max(len(a[0].seeds), len(b[0].seeds))
    several = seeds > 1
    p_seeds = _p(difference, stderr, df) if several else p_questions
    return Comparison(
        difference=difference,
        stderr=stderr,
        p=max(p_questions, p_seeds),
        p_questions=p_questions,
        p_seeds=p_seeds,
        test=f"{test} and t" if several else test,
        seeds=seeds,
        questions=sum(part.values.shape[1] for part in differences),
        gained=int(sum((part > 0).sum() for part in every)),
        lost=int(sum((part < 0).sum() for part in every)),
        question_stderr=question_stderr,
        df=df,
    )


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjustment [tests] (1979): compare the result with alpha and the family's error stays below it."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def minimum_detectable_difference(
    stderr: float, df: float = np.inf, alpha: float = ALPHA, power: float = POWER
) -> float:
    """The true difference, in points, that a two-sided test at `alpha` finds with probability `power`.

    `stderr`, `df`: standard error of a paired difference and its degrees of freedom. The sum of two t quantiles is the
    usual approximation to the noncentral t; with two degrees of freedom its power is 77% instead of 80%.
    """
    return float((stats.t.isf(alpha / 2, df) + stats.t.isf(1 - power, df)) * stderr)
