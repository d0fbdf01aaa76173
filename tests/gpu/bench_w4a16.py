"""Measure the INT4 GEMM on a CUDA GPU: shapes of LLaVA-1.5-7B and Qwen2-VL-2B, M from 1 to 4096, all backends.

    python tests/gpu/bench_w4a16.py --out kernel.json [--quick] [--table tuned.json]

Writes the JSON with machine, ceilings and every row, and prints one line per shape and M: the floor, cuBLAS, every
backend, the fastest of them, its speed-up over cuBLAS and its share of the floor. Exits with 1 if the GPU's products
differ from a float64 reference, or if the inline PTX and the plain arithmetic disagree in any bit.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from grace.bench.backend import Backend
from grace.bench.backends import installed
from grace.bench.kernel import bench_kernel
from grace.bench.machine import describe
from grace.bench.tune import compile_ahead
from grace.errors import GraceError
from grace.files import write_json
from grace.kernels import w4a16_table
from grace.kernels.w4a16 import launch, pack
from grace.kernels.w4a16_layout import dequantise
from grace.kernels.w4a16_table import DENSE, Tile

SHAPES = {
    "llava q|k|v|o": (4096, 4096),
    "llava gate+up fused": (22016, 4096),
    "llava down": (4096, 11008),
    "llava gate|up": (11008, 4096),
    "llava qkv fused": (12288, 4096),
    "qwen2 gate|up": (8960, 1536),
    "qwen2 down": (1536, 8960),
    "qwen2 q|o": (1536, 1536),
    "qwen2 k|v": (256, 1536),
    "qwen2 gate+up fused": (17920, 1536),
    "qwen2 qkv fused": (2048, 1536),
}
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
QUICK = ["llava q|k|v|o", "llava gate+up fused", "qwen2 gate|up"]


TILES = [
    Tile("ways", 8, 32, stages=6),
    Tile("ways", 8, 16, split=3),
    Tile("tile", 8, 64, late=True),
    Tile("tile", 16, 64, split=4, stages=6),
    Tile("tile", 64, 64, split=2, stages=3),
    Tile("round", 128, 128, stages=3, late=True),
    Tile("round", 64, 128, split=3, stages=3, resident=2),
    Tile("hopper", 64, 128, stages=8),
    Tile("hopper", 64, 128, split=2, stages=8),
    Tile("hopper", 128, 128, stages=4),
    Tile("hopper", 128, 128, split=3, stages=4),
    Tile("hopper", 256, 128, stages=2),
    Tile("hopper", 256, 128, split=2, stages=2),
    Tile("hopper", 256, 128, split=4, stages=2),
    DENSE,
]


CASES = [  # out x in and rows: whole tiles, and such that fill neither tiles nor chunks nor warps
    ((384, 2048), 5),
    ((328, 768), 5),
    ((640, 1024), 150),
    ((12800, 1024), 150),  # "hopper" cuts its 100 tiles of 256 rows unevenly
]


def same_bits(device: torch.device, workers: int) -> int:
    """The PTX path, which no CPU can run, against float64 and, at groups of 128, the arithmetic path, which the
    interpreter tests; every product must come out alike 20 times.

    Returns the number of cases.
    """
    generator = torch.Generator(device).manual_seed(0)
    jobs = [
        (shape, rows, group, dtype, tile, True)
        for (shape, rows), group, dtype in product(CASES, (32, 64, 128, 256), (torch.bfloat16, torch.float16))
        for tile in TILES
        if rows <= 16 or tile.kind != "ways"
    ]
    ways = {group: (True, False) if group == 128 else (True,) for group in (32, 64, 128, 256)}  # to unpack codes
    compile_ahead([(*job, ptx) for job in jobs for ptx in ways[job[2]]], workers)
    for (out, inputs), rows, group, dtype, tile, _ in jobs:
        codes = torch.randint(-8, 8, (out, inputs), dtype=torch.int8, device=device, generator=generator)
        scales = (torch.rand(out, inputs // group, device=device, generator=generator) + 0.1).to(dtype)
        x = torch.randn(rows, inputs, device=device, generator=generator).to(dtype)
        bias = torch.randn(out, device=device, generator=generator).to(dtype)
        expected = x.double() @ dequantise(codes, scales, torch.float64).T + bias.double()
        packed = pack(codes, scales)
        fast, *plain = (launch(x, *packed, bias, group, tile, ptx=ptx) for ptx in ways[group])
        again = [launch(x, *packed, bias, group, tile) for _ in range(20)]
        error = (fast.double() - expected).norm() / expected.norm()
        case = f"{dtype}, {out} x {inputs}, {rows} rows, group {group}, {tile}"
        if not error < 6e-3:
            raise GraceError(f"{case}: relative error {error:.1e}")
        if not all(torch.equal(fast, one) for one in [*plain, *again]):
            raise GraceError(f"{case}: PTX and arithmetic, or two runs, differ")
    return len(jobs)


def compile_all(
    shapes: list[tuple[int, int]], rows: list[int], group: int, dtype: torch.dtype, only: list[str], workers: int
) -> None:
    """Let every backend build what it builds at the first call, by processes: JIT compilers take seconds per case."""
    jobs = [(shape, m, group, dtype, only) for shape in shapes for m in rows]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(_first_call, jobs):
            pass


def chosen_backends(device: torch.device, only: list[str]) -> list[Backend]:
    """Those installed whose name holds one of `only`, or all."""
    return [b for b in installed(device) if not only or any(part in b.name for part in only)]


def _first_call(job: tuple) -> None:
    (out, inputs), rows, group, dtype, only = job
    codes = torch.zeros(out, inputs, dtype=torch.int8, device="cuda")
    scales = torch.ones(out, inputs // group, dtype=torch.bfloat16, device="cuda")
    for backend in chosen_backends(codes.device, only):
        with suppress(Exception):  # the benchmark itself says what fails
            if backend.serves(out, inputs, group, dtype):
                x = torch.zeros(rows, inputs, dtype=dtype, device="cuda")
                backend.gemm(x, backend.prepare(codes, scales, dtype))


def print_table(rows: list[dict]) -> None:
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    cases = list(dict.fromkeys((row["shape"], row["m"]) for row in rows))
    print(
        "microseconds;", " | ".join(["shape", "M", "floor", "cuBLAS", *backends, "fastest", "x cuBLAS", "% of floor"])
    )
    for shape, m in cases:
        here = {row["backend"]: row for row in rows if (row["shape"], row["m"]) == (shape, m)}
        first = next(iter(here.values()))
        fastest = min(here.values(), key=lambda row: row["microseconds"])
        times = [f"{here[b]['microseconds']:.2f}" if b in here else "-" for b in backends]
        print(
            f"{shape} {first['out_features']}x{first['in_features']}", m, f"{first['floor_microseconds']:.2f}",
            f"{first['dense_microseconds']:.2f}", *times, fastest["backend"], f"{fastest['speedup']:.2f}",
            f"{100 * fastest['floor_share']:.0f}", sep=" | ",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("kernel.json"))
    parser.add_argument("--quick", action="store_true", help="three shapes, six row counts")
    parser.add_argument("--check", action="store_true", help="check the products, measure nothing")
    parser.add_argument("--rows", default="", help="M, comma-separated")
    parser.add_argument("--shapes", default="", help="parts of the names of shapes, comma-separated: llava,qwen2 down")
    parser.add_argument("--only", default="", help="parts of the names of backends, comma-separated: grace,humming")
    parser.add_argument("--skip-check", action="store_true", help="leave out the check of every kind of product")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--table", type=Path, help="tiles from `grace bench tune` instead of the shipped ones")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    if chosen.table:
        w4a16_table.SHIPPED = chosen.table
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        setattr(torch.backends.cuda.matmul, name, False)
    device = torch.device("cuda")
    shapes = {name: SHAPES[name] for name in QUICK} if chosen.quick else SHAPES
    rows = [1, 4, 16, 64, 256, 4096] if chosen.quick else ROWS
    rows = [int(m) for m in chosen.rows.split(",")] if chosen.rows else rows
    parts, only = (text.split(",") if text else [] for text in (chosen.shapes, chosen.only))
    shapes = {name: s for name, s in shapes.items() if not parts or any(part in name for part in parts)}
    workers = os.cpu_count() or 1
    try:
        if not chosen.skip_check:
            print(f"{same_bits(device, workers)} products right, and alike to the bit each time and way", flush=True)
        if chosen.check:
            return
        dtype = getattr(torch, chosen.dtype)
        compile_all(list(shapes.values()), rows, chosen.group, dtype, only, workers)
        table, limits = [], {}
        backends = chosen_backends(device, only)
        for name, shape in shapes.items():  # shape by shape, so that a run cut short keeps what it has measured
            more, limits[name] = bench_kernel({name: shape}, rows, chosen.group, 20, device, dtype, backends)
            table += more
            write_json(chosen.out, {"machine": describe(device), "ceilings": limits, "rows": table})
            print_table(more)
    except GraceError as error:
        raise SystemExit(f"wrong: {error}") from error
    print(describe(device))
    print(limits)


if __name__ == "__main__":
    main()
