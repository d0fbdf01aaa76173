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
and Miller 2011), kept from falling below C. Its degrees of freedom are Satterthwaite's, with S - 1 for B.

Where seeds matter much and a few of them agree by luck, B is small, Satterthwaite's degrees jump into the hundreds, and
that test alone would reject far too often at the small levels that Holm's correction asks for. So a second one stands
beside it: Student's t over the seeds, sqrt(B) on S - 1 degrees (Welch's where two sides have seeds of their own). The
larger p and the wider interval count. Simulated, equal methods are then rejected at most 1.2 times as often as the level
says, from 5% down to 0.1%, with three and with five seeds (tests/benchmarks/false_positives.py).

A mean over benchmarks is handled alike: u then sums (x - m) / (K Q_k) over all K benchmarks, and m[s] is a seed's mean
over benchmarks, because a good seed is good on all of them.
"""

import math
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
        return _half_width(self, alpha)


@dataclass(frozen=True)
class Comparison:
    """Model A less model B on the same questions, in points."""

    difference: float
    stderr: float
    p: float  # the larger of the two below: a difference counts when it holds over questions and over seeds
    p_questions: float  # these very models, other questions: McNemar or paired bootstrap
    p_seeds: float  # other seeds too: the larger of the two t tests; 1 seed: equal to p_questions
    test: str
    seeds: int
    questions: int
    gained: int  # answers (seed x question) where A scores above B
    lost: int
    question_stderr: float
    df: float  # degrees of freedom of `stderr`
    seed_stderr: float = 0.0  # from the seeds alone, sqrt(B); 0 with one seed
    seed_df: float = np.inf  # and its degrees of freedom
    flip_variance: float = 0.0  # I: the part of `question_stderr`^2 that more seeds average out

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Confidence interval of the difference at 1 - `alpha`, in points."""
        half = _half_width(self, alpha)
        return self.difference - half, self.difference + half

    def detectable(self, alpha: float = ALPHA, power: float = POWER) -> float:
        """The true difference, in points, that this pair with these seeds finds with probability `power`."""
        return max(
            minimum_detectable_difference(self.stderr, self.df, alpha, power),
            minimum_detectable_difference(self.seed_stderr, self.seed_df, alpha, power),
        )


def _half_width(found: "Estimate | Comparison", alpha: float) -> float:
    both = ((found.stderr, found.df), (found.seed_stderr, found.seed_df))
    return max(float(stats.t.isf(alpha / 2, df)) * stderr for stderr, df in both)


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
        seed_stderr=float(np.sqrt(between)),
        seed_df=seeds - 1 if seeds > 1 else np.inf,
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


def swap_test(differences: np.ndarray) -> float:
    """Two-sided p of a sum under swapping A and B image by image: `mcnemar` for differences that are no whole numbers.

    `differences` [images] float: what each image adds to the mean difference. The distribution of the sum of +-d comes
    from its characteristic function, the product of cos(d t), on a grid finer than 1/64 of a typical d; sums that the
    grid cannot tell from the observed one count as reached. Beyond 7 standard deviations Hoeffding's bound stands.
    """
    typical = float(np.sqrt(np.mean(differences**2)))
    differences = differences[np.abs(differences) > 1e-9 * typical]
    if not len(differences):
        return 1.0
    n_images, deviation = len(differences), float(np.sqrt((differences**2).sum()))
    z = abs(float(differences.sum())) / deviation
    if z > 7:
        return 2 * math.exp(-(z**2) / 2)
    steps = np.rint(differences * ((64 + 4096 / n_images) * n_images**0.5 / deviation)).astype(int)
    reach = int(min(np.abs(steps).sum(), 9 * np.sqrt((steps**2).sum()) + 1))  # farther sums have a chance below 1e-17
    size = 1 << (2 * reach + 1).bit_length()
    frequencies = 2 * np.pi * np.arange(size // 2 + 1) / size
    turns = np.ones(size // 2 + 1)
    for value, count in zip(*np.unique(np.abs(steps), return_counts=True), strict=True):
        turns *= np.cos(value * frequencies) ** int(count)
    chances = np.fft.irfft(turns, size).clip(0)  # [sums]: 0, 1, ... reach, ..., -1
    observed = abs(int(steps.sum())) - math.ceil(n_images**0.5 / 2)
    return float(min(1.0, 2 * chances[observed : reach + 1].sum())) if observed > 0 else 1.0


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
    significant" whatever the data. It never falls below `swap_test`: what few answers that flipped allow is exact.
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
    asked_in_all = counts.sum(axis=0, dtype=np.float64)  # [parts]
    swapped = swap_test((sums / asked_in_all).mean(axis=1, dtype=np.float64))
    return stderr, max(_p(observed, stderr, max(len(labels) - 1, 1)), swapped)


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

    return [part.only(shared) for part in a], [part.only(shared) for part in b], True


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
        groups = [(*_seed_parts(*_influence(differences)), len(differences[0].seeds))]
    else:
        differences = [
            Scores(x.values.mean(axis=0, keepdims=True) - y.values.mean(axis=0, keepdims=True), x.images)
            for x, y in zip(a, b, strict=True)
        ]
        groups = [(*_seed_parts(*_influence(side)), len(side[0].seeds)) for side in (a, b)]
    found = estimate(differences)
    questions = found.question_stderr**2
    total = questions + sum(max(0.0, between - chance) for between, chance, _ in groups)
    between = [(b_, n) for b_, _, n in groups]
    seeds_alone = sum(b_ for b_, _ in between)
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
    stderr, df = float(np.sqrt(total)), _degrees(total, questions, found.n_images, between)
    seed_stderr, seed_df = float(np.sqrt(seeds_alone)), _degrees(seeds_alone, 0.0, found.n_images, between)
    p_seeds = p_questions
    if seeds > 1:
        p_seeds = max(_p(found.value, stderr, df), _p(found.value, seed_stderr, seed_df))
    return Comparison(
        difference=found.value,
        stderr=stderr,
        p=max(p_questions, p_seeds),
        p_questions=p_questions,
        p_seeds=p_seeds,
        test=f"{test} and t" if seeds > 1 else test,
        seeds=seeds,
        questions=found.questions,
        gained=int(sum((part > 0).sum() for part in every)),
        lost=int(sum((part < 0).sum() for part in every)),
        question_stderr=found.question_stderr,
        df=df,
        seed_stderr=seed_stderr,
        seed_df=seed_df,
        flip_variance=sum(chance for _, chance, _ in groups),
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
