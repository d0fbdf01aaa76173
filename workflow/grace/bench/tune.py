"""Extends the table of tiles of the Triton product by measuring them on this machine's card.

    python -m grace.bench.tune --shapes 4096x4096,22016x4096 --rows 1,2,4,8,16,32,64,128,256 --group 128 --out table.json

Every candidate is checked against a float64 product before it is timed; the fastest right one is kept, and dequantise
plus the dense product is always among the candidates. Copy the result over `grace/kernels/w4a16_configs.json` to ship
it, or keep it with the card's name: entries of other cards are left as they are.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch

from grace.bench.machine import device_name, last_cache_bytes
from grace.bench.timing import copies_past_cache, interleaved_medians
from grace.errors import GraceError
from grace.files import read_json, write_json
from grace.kernels.w4a16 import launch, pack
from grace.kernels.w4a16_layout import dequantise
from grace.kernels.w4a16_table import DENSE, MOST_PARTS, SHIPPED, Tile, with_entry
from grace.progress import progress

TOLERANCE = 1e-2
MOST_ELEMENTS = 128 * 128  # of one accumulator: larger ones spill


def candidates(rows: int, out: int, inputs: int) -> Iterator[Tile]:
    """Tiles worth trying for a shape: about one to eight programs per multiprocessor, no padding beyond need."""
    yield DENSE
    chunks = -(-inputs // 128)
    block_ms = [m for m in (16, 32, 64, 128) if m < 2 * max(rows, 16)]
    for block_m, block_n, split, (warps, stages) in product(
        block_ms, (32, 64, 128), (1, 2, 4, 8), ((4, 4), (4, 6), (8, 4))
    ):
        programs = -(-rows // block_m) * -(-out // block_n) * split
        parts_fit = split <= min(chunks, MOST_PARTS)
        if parts_fit and block_m * block_n <= MOST_ELEMENTS and block_n >= 16 * warps / 2 and programs <= 132 * 32:
            yield Tile(block_m, block_n, split, warps, stages)


def tune(
    shape: tuple[int, int], rows: int, group: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Tile, float]:
    """The fastest right tile for x [rows, in] times a weight [out, in], and its seconds per call."""
    out, inputs = shape
    generator = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(-8, 8, (out, inputs), dtype=torch.int8, device=device, generator=generator)
    scales = (torch.rand(out, inputs // group, device=device, generator=generator) * 0.01 + 0.001).bfloat16()
    x = torch.randn(rows, inputs, device=device, generator=generator).to(dtype)
    expected = x.double() @ dequantise(codes, scales, torch.float64).T
    words, by_group = pack(codes, scales)
    count = copies_past_cache(words.nbytes, last_cache_bytes(device), 64)
    copies = [words] + [words.clone() for _ in range(count - 1)]
    best: tuple[Tile, float] | None = None
    for tile in candidates(rows, out, inputs):
        calls = [partial(launch, x, copy, by_group, None, group, tile) for copy in copies]
        try:
            error = (calls[0]().double() - expected).norm() / expected.norm()
            if not error <= TOLERANCE:
                continue
            seconds = interleaved_medians({"tile": calls}, repeats=5, device=device)["tile"]
        except Exception as failure:  # a tile that needs more shared memory or registers than the card has
            if "out of resource" not in str(failure):
                raise
            continue
        if best is None or seconds < best[1]:
            best = (tile, seconds)
    if best is None:
        raise GraceError(
            f"no tile gave a right product at {out}x{inputs}, {rows} rows; do not use the kernel on this card"
        )
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", required=True, help="out x in, comma-separated: 4096x4096,22016x4096")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,256", help="M, comma-separated powers of two")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--out", type=Path, required=True, help="the table to extend; starts from the shipped one")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a CUDA device")
    device = torch.device("cuda")
    table = read_json(chosen.out if chosen.out.exists() else SHIPPED)
    shapes = [tuple(map(int, text.split("x"))) for text in chosen.shapes.split(",")]
    rows = [int(text) for text in chosen.rows.split(",")]
    with progress("tuning", len(shapes) * len(rows)) as advance:
        for shape in shapes:
            for m in rows:
                tile, seconds = tune(shape, m, chosen.group, getattr(torch, chosen.dtype), device)
                with_entry(table, device_name(device), chosen.dtype, chosen.group, shape, m, tile)
                write_json(chosen.out, table)
                print(f"{shape[0]}x{shape[1]} M={m}: {seconds * 1e6:.2f} us {tile}", flush=True)
                advance()


if __name__ == "__main__":
    main()
