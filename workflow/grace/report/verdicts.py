"""When a claim holds, fails or is not decided, and what it would take to decide it.

A verdict asks for three things that are stated beforehand: a margin below which a difference is of no interest, a
smallest number of seeds, and a level that is shared among the claims of a group.
"""

from typing import Literal, NamedTuple

from scipy import stats

from grace.report.formatting import number, p_text
from grace.results.paired import Comparison, minimum_detectable_difference
from grace.results.statistics import ALPHA, POWER

MARGIN = 0.5  # points: a smaller advantage is of no interest
CLOSE = 2.0  # points: what the paper itself still calls close (INT4 1.8 below the bf16 student that GRACE made)
LEAST_SEEDS, METHOD_SEEDS = 3, 5  # of any claim, and of one about the method
MOST_SEEDS, MOST_QUESTIONS = 20, 64  # beyond that, "what it would take" says so

Verdict = Literal["Holds", "Fails", "Not decided"]


class Decision(NamedTuple):
    """A verdict and its reason, a sentence."""

    verdict: Verdict
    reason: str


def decide(found: Comparison, p: float | None, sign: int, least_seeds: int, tests: int) -> Decision:
    """The verdict on "A is above B" (`sign` 1), "below" (-1) or "close to" (0).

    Args:
        found: A less B.
        p: over questions and seeds after the correction; None with one seed.
        tests: how many claims share the level; the interval that is held against a margin is Bonferroni's.
    """
    low, high = found.interval()
    span = f"{number(found.difference)}, 95% interval {number(low)} to {number(high)}"
    low, high = found.interval(ALPHA / tests)
    if sign < 0:
        low, high = -high, -low
    gap = found.difference * (sign or 1)
    if found.seeds < least_seeds or p is None:
        return Decision("Not decided", f"{span}: it takes {least_seeds} seeds, there {_are(found.seeds)}")
    if sign == 0:
        if low > -CLOSE and high < CLOSE:
            return Decision("Holds", f"{span}: within {number(CLOSE)} points, after correction")
        if low > CLOSE or high < -CLOSE:
            return Decision("Fails", f"{span}: after correction more than {number(CLOSE)} points apart")
        return Decision(
            "Not decided", f"{span}: it would take {_takes(found, abs(CLOSE - abs(gap)), least_seeds, tests)}"
        )
    if p < ALPHA and gap < 0:
        return Decision("Fails", f"{span}: the reverse holds, {p_text(p)} after correction")
    if p < ALPHA and gap >= MARGIN:
        return Decision("Holds", f"{span}, {p_text(p)} after correction")
    if high < MARGIN:
        return Decision("Fails", f"{span}: an advantage, if any, is below {number(MARGIN)} points, after correction")
    effect = gap if gap >= MARGIN else MARGIN - gap
    return Decision("Not decided", f"{span}: it would take {_takes(found, effect, least_seeds, tests)}")


def _are(seeds: int) -> str:
    return "is one" if seeds == 1 else f"are {seeds}"


def seeds_needed(found: Comparison, effect: float, questions: float, least_seeds: int, level: float) -> int | None:
    """The least number of seeds, up to MOST_SEEDS, that finds a true difference of `effect` points with power POWER.

    `questions`: times as many as were asked. The part of the variance that comes from the questions falls with their
    number, that of flipping answers with seeds too, that of the seeds with the seeds alone. None: not with so few.
    """
    fixed = max(0.0, found.question_stderr**2 - found.flip_variance) / questions
    of_seeds = max(0.0, found.stderr**2 - found.question_stderr**2)
    falling = (of_seeds + found.flip_variance / questions) * found.seeds
    for seeds in range(max(least_seeds, 2), MOST_SEEDS + 1):
        total, between = fixed + falling / seeds, falling / seeds
        df = total**2 / (between**2 / (seeds - 1)) if between > 0 else float("inf")
        both = ((total, df), (between, seeds - 1))
        if max(minimum_detectable_difference(part**0.5, df_, level) for part, df_ in both) <= effect:
            return seeds
    return None


def _takes(found: Comparison, effect: float, least_seeds: int, tests: int) -> str:
    """Seeds, or seeds and questions, for power POWER at this difference."""
    questions = 1
    while questions <= MOST_QUESTIONS:
        seeds = seeds_needed(found, effect, questions, least_seeds, ALPHA / tests)
        if seeds is not None:
            more = "" if questions == 1 else f" and {questions} times as many questions"
            return f"about {seeds} seeds{more} ({POWER:.0%} power at this difference)"
        questions *= 2
    return f"more than {MOST_SEEDS} seeds and {MOST_QUESTIONS} times as many questions"


def from_value(value: float, stderr: float, least: float) -> Decision:
    """The verdict on "at least `least`" of a measured value with a standard error; a normal test."""
    z = (value - least) / stderr if stderr > 0 else 0.0
    span = f"{value:.2f} ± {stderr:.2f}"
    if abs(z) < stats.norm.isf(ALPHA / 2):
        return Decision("Not decided", f"{span}: it would take about {_times(z)} times as many questions")
    return Decision("Holds" if z > 0 else "Fails", span)


def _times(z: float) -> str:
    wanted = float(stats.norm.isf(ALPHA / 2) + stats.norm.isf(1 - POWER))
    return f"{min((wanted / abs(z)) ** 2, 999):.0f}" if z else "1000"
