"""Extends the table of tiles of the Triton GEMM by measuring them on this machine's GPU.

    grace bench tune --shapes 4096x4096,22016x4096 --rows 1,2,4,8,16,32,64,128,256,1024,4096 --out table.json

All candidates are compiled first, by one process per core. Then each is checked against a reference and timed with
weights that miss the L2 cache; the fastest few are measured again side by side, and the fastest of these is kept. Copy
the result over `grace/kernels/w4a16_table/configs.json` to ship it: entries of other GPUs and shapes are left as they
are.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from grace.bench.machine import device_name, last_cache_bytes
from grace.bench.timing import copies_past_cache, interleaved_medians
from grace.errors import GraceError
from grace.files import read_json, write_json
from grace.kernels.w4a16 import gpu, launch, pack
from grace.kernels.w4a16_layout import dequantise
from grace.kernels.w4a16_table import DENSE, GPU, SHIPPED, Tile, hopper_tiles, takes_hopper, with_entry
from grace.progress import progress

TOLERANCE = 1e-2
HOPPER_CANDIDATES = 10  # of the kind "hopper", by estimated time
FINALISTS = 6  # measured again, side by side
Shape = tuple[int, int]  # out, in


def candidates(rows: int, out: int, inputs: int, group: int, here: GPU) -> Iterator[Tile]:
    """Tiles worth trying: those whose programs fill the GPU without cutting the inputs finer than that takes."""
    for tile in _grid(rows, group):
        tiles = tile.tiles(rows, out)
        most = inputs // 128 // (tile.warps if tile.kind == "ways" else 1)
        programs = tiles * tile.split
        fits = tile.shared() <= here.shared and tile.split <= max(most, 1)
        if fits and (tile.split == 1 or tile.resident or programs <= 10 * here.multiprocessors):
            yield tile
    if rows >= 64 and takes_hopper(out, group, here):
        yield from hopper_tiles(rows, out, inputs, here)[:HOPPER_CANDIDATES]
    if rows >= 512:
        yield DENSE


def _grid(rows: int, group: int) -> Iterator[Tile]:
    splits = (1, 2, 3, 4, 6, 8)
    if rows <= 16:
        block_m = 8 if rows <= 8 else 16
        for block_n, split, stages in product((16, 32), splits[:4], (4, 6)):
            yield Tile("ways", block_m, block_n, split, 4, stages)
        for (block_n, warps), split, stages in product(((64, 4), (128, 8)), splits, (4, 6)):
            yield Tile("tile", block_m, block_n, split, warps, stages)
            if split == 1:
                yield Tile("tile", block_m, block_n, split, warps, stages, late=True)
    elif rows <= 128:
        for block_m in sorted({min(rows, 64), rows}):
            for split, stages in product(splits, (3, 4, 5) if block_m < 64 else (2, 3, 4)):
                yield Tile("tile", block_m, 64, split, 4, stages)
            for split in splits:
                yield Tile("tile", block_m, 128, split, 8, 3)
            yield Tile("tile", block_m, 64, 1, 4, 3, late=True)
    if rows >= 64 and group >= 128:
        for block_m, block_n, stages, resident in ((128, 128, 3, 2), (128, 64, 2, 3), (128, 64, 3, 2), (64, 128, 3, 2)):
            if block_m <= rows:
                yield Tile("round", block_m, block_n, 1, 4, stages, True)
                for split, waves in product((2, 3, 4), {0, resident} if rows <= 256 else {resident}):
                    yield Tile("round", block_m, block_n, split, 4, stages, True, waves)


class Problem:
    """Random weights of one shape, and as many copies of them as miss the L2 cache."""

    def __init__(self, shape: Shape, group: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.group, self.dtype = group, dtype
        out, self.inputs = shape
        self.random = torch.Generator(device).manual_seed(seed)
        codes = torch.randint(-8, 8, shape, dtype=torch.int8, device=device, generator=self.random)
        scales = torch.rand(out, self.inputs // group, device=device, generator=self.random) * 0.01 + 0.001
        self.weight = dequantise(codes, scales.bfloat16(), torch.float64)
        first = pack(codes, scales.bfloat16())
        copies = copies_past_cache(first[0].nbytes, 128 << 20 if device.type == "cuda" else 0, 256)
        assert device.type != "cuda" or copies * first[0].nbytes >= min(last_cache_bytes(device), 256 * first[0].nbytes)
        self.packed = [first] + [tuple(part.clone() for part in first) for _ in range(copies - 1)]

    def measure(self, rows: int, tiles: Iterable[Tile]) -> list[tuple[float, Tile]]:
        """(seconds per call, tile), fastest first, of those that give the right product."""
        device = self.weight.device
        x = torch.randn(rows, self.inputs, device=device, generator=self.random).to(self.dtype)
        expected = x.double() @ self.weight.T
        copies = self.packed if rows < 1024 else self.packed[:4]
        calls, found = {}, []
        for tile in tiles:
            calls[tile] = [partial(launch, x, *packed, None, self.group, tile) for packed in copies]
            try:
                error = (calls[tile][0]().double() - expected).norm() / expected.norm()
                if error <= TOLERANCE:
                    found.append((interleaved_medians({"": calls[tile]}, 5, device)[""], tile))
            except Exception as failure:  # a tile that needs more shared memory or registers than the GPU has
                if "out of resource" not in str(failure):
                    raise
        best = [tile for _, tile in sorted(found, key=lambda one: one[0])[:FINALISTS]]
        again = interleaved_medians({str(tile): calls[tile] for tile in best}, 15, device)
        return sorted(((again[str(tile)], tile) for tile in best), key=lambda one: one[0])


def compile_ahead(jobs: Iterable[tuple], workers: int) -> None:
    """Fill Triton's cache on disk, by processes: a job is (shape, rows, group, dtype, tile) and then, if it is not the
    default, whether with bias and by inline PTX."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(_compile, jobs, chunksize=4):
            pass


def _kernel(tile: Tile, shape: Shape, rows: int) -> tuple:
    """What tells the kernels of two tiles apart."""
    if tile.kind == "hopper":
        return tile.block_m, tile.block_n, tile.split > 1
    even_rows = tile.block_m <= rows and rows % tile.block_m == 0
    return tile, even_rows, shape[0] % 128 == 0, shape[1] // 128 % tile.warps == 0


def _compile(job: tuple) -> None:
    whole: tuple[Any, ...] = (*job, False, True)
    (out, inputs), rows, group, dtype, tile, with_bias, ptx = whole[:7]
    zeros = partial(torch.zeros, dtype=dtype, device="cuda")
    packed = pack(torch.zeros(out, inputs, dtype=torch.int8, device="cuda"), zeros(out, inputs // group))
    try:
        launch(zeros(rows, inputs), *packed, zeros(out) if with_bias else None, group, tile, ptx)
    except Exception as failure:
        if "out of resource" not in str(failure):
            raise


def tune(
    shapes: list[Shape], rows: list[int], out: Path, group: int = 128, dtype_name: str = "bfloat16", workers: int = 1
) -> None:
    """Measure tiles for each weight shape and number of rows, and write the table extended by the best to `out`.

    Args:
        shapes: of the weights, (out, in).
        rows: M of the GEMMs, powers of two.
        out: the table to extend; starts from the shipped one.
        group: weights that share a scale.
        dtype_name: of the activations, bfloat16 or float16.
        workers: processes that compile.

    Raises:
        GraceError: no CUDA device, or a kernel that is wrong.
    """
    if not torch.cuda.is_available():
        raise GraceError("tuning measures on a GPU; run it on a machine with one")
    device, dtype = torch.device("cuda"), getattr(torch, dtype_name)
    rows = sorted(rows)
    here = gpu(device)[0]
    tried = {(s, m): list(candidates(m, *s, group, here)) for s in shapes for m in rows}
    # tiles of the same kernels are compiled once: what specialises them is whether sizes are whole numbers of tiles
    jobs = {_kernel(tile, s, m): (s, m, group, dtype, tile) for (s, m), tiles in tried.items() for tile in tiles}
    print(f"compiling {len(jobs)} kernels", flush=True)
    compile_ahead(list(jobs.values()), workers)
    table = read_json(out if out.exists() else SHIPPED)
    with progress("tuning", len(tried)) as advance, torch.inference_mode():
        for shape in shapes:
            problem = Problem(shape, group, dtype, device)
            fewest: list[Tile] = []
            for m in rows:
                found = problem.measure(m, fewest if 1 < m <= 8 and fewest else tried[shape, m])
                if not found:
                    raise GraceError(
                        f"no tile gave a right product at {shape}, {m} rows; do not use the kernel on this GPU"
                    )
                if m == 1:
                    fewest = [tile for _, tile in found]  # up to 8 rows the same kernels read the same weights
                with_entry(table, device_name(device), dtype_name, group, shape, m, found[0][1])
                write_json(out, table)
                print(f"{shape[0]}x{shape[1]} M={m}: {found[0][0] * 1e6:.2f} us {found[0][1]}", flush=True)
                advance()
