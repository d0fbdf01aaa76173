"""Timing several ways to do the same thing side by side: interleaved, in cold memory, medians.

Every candidate is a list of calls that do the same work on different copies of the weights, together larger than the
last cache, as in a model whose layers follow each other. Rounds go over all candidates in turn, so that a change of
clock or a busy neighbour meets all of them alike.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]
SHORTEST = 2e-3  # seconds that one timed stretch on a CPU lasts at least: a thousand times the clock's own cost


def interleaved_medians(
    candidates: Mapping[str, Sequence[Call]], repeats: int, device: torch.device, shortest: float = SHORTEST
) -> dict[str, float]:
    """Median seconds of one call of each candidate, over `repeats` interleaved rounds."""
    times = interleaved_times(candidates, repeats, device, shortest)
    return {name: statistics.median(values) for name, values in times.items()}


def interleaved_times(
    candidates: Mapping[str, Sequence[Call]], repeats: int, device: torch.device, shortest: float = SHORTEST
) -> dict[str, list[float]]:
    """Seconds of one call of each candidate in each of `repeats` interleaved rounds."""
    stretch = _cuda_stretch if device.type == "cuda" else _cpu_stretch
    prepared = {name: stretch(calls, shortest) for name, calls in candidates.items()}
    times = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, timed in prepared.items():
            times[name].append(timed())
    return times


def _cpu_stretch(calls: Sequence[Call], shortest: float) -> Callable[[], float]:
    """A function that runs the calls for about `shortest` seconds and returns the seconds per call."""
    calls[0]()  # first-touch costs are not the kernel's
    start = time.perf_counter()
    calls[-1]()
    once = max(time.perf_counter() - start, 1e-7)
    passes = max(1, round(shortest / once / len(calls)))
    used = calls if once * len(calls) < 4 * shortest else calls[: max(1, int(4 * shortest / once))]

    def timed() -> float:
        start = time.perf_counter()
        for _ in range(passes):
            for call in used:
                call()
        return (time.perf_counter() - start) / (passes * len(used))

    return timed


def _cuda_stretch(calls: Sequence[Call], shortest: float) -> Callable[[], float]:
    """The calls captured in one CUDA graph; a function that replays it between two events, seconds per call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()  # compiles, tunes and allocates outside the graph
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(_kept: list = kept) -> float:  # the outputs live as long as the graph that writes them
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(calls)

    timed()
    return timed


def copies_past_cache(bytes_of_one: int, cache_bytes: int, at_most: int) -> int:
    """How many copies of the weights make reading them all in turn miss the cache: twice its size in all."""
    return max(1, min(at_most, -(-2 * cache_bytes // max(bytes_of_one, 1))))
