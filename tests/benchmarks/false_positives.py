"""How often the tests of the tables reject equal methods: `python tests/benchmarks/false_positives.py`.

Fixed seeds; a case is (seeds, standard deviation of a seed's mean in standard errors of the questions, share of the
questions' variance that is each seed's own flips). Rates are of `p`, the value that tables use, at the level of one
test, at Holm's first level among 18 claims, and at 0.1%.
"""

import itertools
from argparse import ArgumentParser

import numpy as np

from grace.results.paired import compare
from grace.results.statistics import Scores

LEVELS = (0.05, 0.05 / 18, 0.001)
IMAGES = 30


def rejected(seeds: int, spread: float, flips: float, runs: int, levels=LEVELS) -> np.ndarray:
    """Share of `runs` simulated comparisons of equal methods that a test rejects [levels]."""
    random = np.random.default_rng([seeds, int(10 * spread), int(10 * flips)])
    names, images = tuple(range(seeds)), np.arange(IMAGES)
    zero, hits = Scores(np.zeros((seeds, IMAGES)), images, names), np.zeros(len(levels))
    for _ in range(runs):
        x = random.normal(size=(1, IMAGES)) * (1 - flips) ** 0.5
        x = x + random.normal(size=(seeds, IMAGES)) * (flips * seeds) ** 0.5
        x = x + random.normal(size=(seeds, 1)) * spread * (seeds / IMAGES) ** 0.5
        hits += compare([Scores(x, images, names)], [zero]).p < np.array(levels)
    return hits / runs


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20000)
    runs = parser.parse_args().runs
    print("seeds  spread  flips  " + "  ".join(f"at {level:.2%}" for level in LEVELS) + "   times nominal")
    for seeds, spread, flips in itertools.product((3, 5), (0.0, 1.0, 5.0), (0.0, 0.5)):
        rates = rejected(seeds, spread, flips, runs)
        times = "  ".join(f"{rate / level:.2f}" for rate, level in zip(rates, LEVELS, strict=True))
        print(f"{seeds:5}  {spread:6}  {flips:5}  " + "  ".join(f"{rate:8.3%}" for rate in rates) + "   " + times)


if __name__ == "__main__":
    main()
