"""Doing the next thing while the present one is used."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def spare_threads(processes: int) -> int:
    """How many threads may open images beside each of so many processes on this machine that drive a GPU: 1 to 4."""
    return max(1, min(4, len(os.sched_getaffinity(0)) // processes - 1))


def ahead(work: Callable[[Item], Result], items: Iterable[Item], depth: int = 2, threads: int = 1) -> Generator[Result]:
    """Yield `work(item)` in order, made up to `depth` items ahead in background threads; its errors come out here.

    Decoding and resizing images leave Python's lock to others.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
