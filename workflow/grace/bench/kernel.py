"""The INT4 GEMM against a dense one, shape by shape and row count by row count.

Rules: correctness first (fresh random data, float64 reference, output memory poisoned with NaN), then interleaved
medians with weights that miss the last cache, then the share of a floor made of bandwidth and matrix rate measured
in the same run.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from grace.bench import machine
from grace.bench.backend import Backend, dense
from grace.bench.backends import DEQUANTISE, installed
from grace.bench.timing import copies_past_cache, interleaved_medians
from grace.errors import GraceError
from grace.progress import progress

TOLERANCE = 1e-2  # relative error (Frobenius) of a bf16 product of random data is 2e-3 to 4e-3
ABOVE = 1.05  # times the roof: more than timing noise, so the roof was measured while something else ran
ROOFS = 3  # at most so many measurements of the ceilings
COPIES = {"cpu": 4, "cuda": 64}  # at most: tiny weights stay in the cache, as they would in a tiny model


def bench_kernel(
    shapes: Mapping[str, tuple[int, int]],
    rows: Sequence[int],
    group_size: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    backends: Sequence[Backend] | None = None,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Measure every backend on every (shape, M); return the rows of kernel.csv and the measured ceilings.

    Where a GEMM beats the ceilings, these were measured on a busy machine: they are measured again, the highest count.

    Args:
        shapes: name -> (out, in); a shape whose inputs the group does not divide is refused.
        rows: the values of M.
        group_size: inputs per scale.
        repeats: interleaved rounds per case.

    Another package's backend that fails or is wrong in a case is left out of it, with a line on standard error.

    Raises:
        GraceError: a group that does not divide the inputs, or a wrong product of this project's.
    """
    backends = installed(device) if backends is None else backends
    limits = machine.ceilings(device)
    table = []
    with progress("kernel benchmark", len(shapes) * len(rows)) as advance, torch.inference_mode():
        for index, (name, (n, k)) in enumerate(shapes.items()):
            if k % group_size:
                raise GraceError(f"kernel benchmark: {name} has {k} inputs, which groups of {group_size} do not divide")
            case = _Case(n, k, group_size, max(rows), dtype, device, seed + index)
            serving = [b for b in backends if b.serves(n, k, group_size, dtype)] or [DEQUANTISE]
            chosen = [(b, rotated) for b in serving if (rotated := _rotated(b, case)) is not None]
            for m in rows:
                table += case.measure(name, m, chosen, repeats, limits)
                advance(note=f"{name}, M = {m}")
        for _ in range(ROOFS - 1):
            if max((row["floor_share"] for row in table), default=0.0) <= ABOVE:
                break
            limits = {key: max(value, limits[key]) for key, value in machine.ceilings(device).items()}
            for row in table:
                _under(row, limits, torch.finfo(dtype).bits // 8)
    if any(row["floor_share"] > ABOVE for row in table):
        print("the machine was busy: GEMMs stand above the measured roof; measure again when idle", file=sys.stderr)
    return table, limits


def floor_seconds(n: int, k: int, group: int, m: int, width: int, limits: Mapping[str, float]) -> float:
    """Seconds that no INT4 GEMM can beat: its bytes over the copy bandwidth, or its FLOPs over the matrix rate.

    Args:
        n, k, group, m: outputs, inputs, inputs per bf16 scale, activation rows.
        width: bytes of an activation.
    """
    nbytes = n * k / 2 + 2 * n * k // group + m * (k + n) * width
    return max(nbytes / limits["copy_bytes_per_second"], 2 * m * n * k / limits["flops_per_second"])


def _under(row: dict[str, Any], limits: Mapping[str, float], width: int) -> None:
    """Hold a row of kernel.csv against other ceilings."""
    floor = floor_seconds(row["out_features"], row["in_features"], row["group_size"], row["m"], width, limits) * 1e6
    row |= {"floor_microseconds": floor, "floor_share": floor / row["microseconds"]}


class _Case:
    """One shape: its random weights, activations, float64 products and dense copies."""

    def __init__(
        self, n: int, k: int, group: int, most_rows: int, dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        self.n, self.k, self.group, self.dtype, self.device = n, k, group, dtype, device
        generator = torch.Generator(device).manual_seed(seed)
        self.codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device, generator=generator)
        spread = torch.rand(n, k // group, device=device, generator=generator) * 0.8 + 0.2
        self.scales = (spread * 0.4 / k**0.5).bfloat16()
        self.x = torch.randn(most_rows, k, device=device, generator=generator).to(dtype)
        weight = dense(self.codes, self.scales, dtype)
        self.reference = self.x.double() @ dense(self.codes, self.scales, torch.float64).T
        self.dense = [weight] + [weight.clone() for _ in range(self.copies(weight.nbytes) - 1)]

    def copies(self, nbytes: int) -> int:
        return copies_past_cache(nbytes, machine.last_cache_bytes(self.device), COPIES[self.device.type])

    def measure(self, name: str, m: int, chosen: list, repeats: int, limits: dict[str, float]) -> list[dict[str, Any]]:
        x = self.x[:m].contiguous()
        candidates = {"dense": [partial(torch.nn.functional.linear, x, weight) for weight in self.dense]}
        errors = {}
        for backend, rotated in chosen:
            calls = [partial(backend.gemm, x, prepared) for prepared in rotated]
            try:
                errors[backend.name] = self._error(backend, calls[0], rotated[0], x)
                candidates[backend.name] = calls
            except Exception as failure:
                _leave_out(backend, f"{name}, M = {m}", failure)
        seconds = interleaved_medians(candidates, repeats, self.device)
        floor = floor_seconds(self.n, self.k, self.group, m, self.x.element_size(), limits)
        return [
            {
                "backend": backend,
                "device": machine.device_name(self.device),
                "dtype": str(self.dtype).removeprefix("torch."),
                "shape": name,
                "out_features": self.n,
                "in_features": self.k,
                "m": m,
                "group_size": self.group,
                "microseconds": seconds[backend] * 1e6,
                "dense_microseconds": seconds["dense"] * 1e6,
                "speedup": seconds["dense"] / seconds[backend],
                "floor_microseconds": floor * 1e6,
                "floor_share": floor / seconds[backend],
                "relative_error": errors[backend],
            }
            for backend in errors
        ]

    def _error(self, backend: Backend, call: partial, prepared: tuple, x: torch.Tensor) -> float:
        """Relative error against float64, with NaN in the memory that the output is likely to get."""
        poison = [torch.full((len(x), self.n), float("nan"), dtype=self.dtype, device=self.device) for _ in range(3)]
        del poison
        expected = self.reference[: len(x)] if backend.weight is None else x.double() @ backend.weight(prepared).T
        error = ((call().double() - expected).norm() / expected.norm()).item()
        if not error <= TOLERANCE:
            raise GraceError(
                f"{backend.name}: wrong product at {self.n} x {self.k}, M = {len(x)}, group {self.group} "
                f"(relative error {error:.1e}); do not use it with this torch on this machine"
            )
        return error


def _rotated(backend: Backend, case: _Case) -> list[tuple] | None:
    """The prepared weights and copies of them, together past the last cache; None where another package fails."""
    try:
        prepared = backend.prepare(case.codes, case.scales, case.dtype)
    except Exception as failure:
        _leave_out(backend, f"{case.n} x {case.k}", failure)
        return None
    nbytes = sum(part.nbytes for part in prepared if isinstance(part, torch.Tensor))
    return [prepared] + [backend.copy(prepared) for _ in range(case.copies(nbytes) - 1)]


def _leave_out(backend: Backend, where: str, failure: Exception) -> None:
    """Say why another package's backend is left out of a case; this project's own failure is raised again."""
    if not backend.foreign:
        raise failure
    print(f"left out: {backend.name} at {where}: {failure}", file=sys.stderr)
