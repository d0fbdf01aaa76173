"""Paired tests of two models on the same questions, and their correction;
`statistics` has the formula of the errors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import signal, stats

from grace.errors import GraceError
from grace.results.statistics import ALPHA, POWER, Scores, degrees, estimate, half_width, influence, seed_parts

REPLICATES = 1000  # of the bootstrap


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
        half = half_width(alpha, (self.stderr, self.df), (self.seed_stderr, self.seed_df))
        return self.difference - half, self.difference + half

    def detectable(self, alpha: float = ALPHA, power: float = POWER) -> float:
        """The true difference, in points, that this pair with these seeds finds with probability `power`."""
        return max(
            minimum_detectable_difference(self.stderr, self.df, alpha, power),
            minimum_detectable_difference(self.seed_stderr, self.seed_df, alpha, power),
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
        groups = [(*seed_parts(*influence(differences)), len(differences[0].seeds))]
    else:
        differences = [
            Scores(x.values.mean(axis=0, keepdims=True) - y.values.mean(axis=0, keepdims=True), x.images)
            for x, y in zip(a, b, strict=True)
        ]
        groups = [(*seed_parts(*influence(side)), len(side[0].seeds)) for side in (a, b)]
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
    stderr, df = float(np.sqrt(total)), degrees(total, questions, found.n_images, between)
    seed_stderr, seed_df = float(np.sqrt(seeds_alone)), degrees(seeds_alone, 0.0, found.n_images, between)
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
    """Holm's step-down adjustment [tests] (1979): compare the result with alpha and the family's error
    stays below it.
    """
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
