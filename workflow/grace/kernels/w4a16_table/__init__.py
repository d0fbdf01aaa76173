"""Which tile serves which INT4 GEMM: a table of measured configurations, and a rule for what it does not hold.

A package of its own, so that a new entry of the table re-runs the jobs that use it and not all that use a kernel.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path

from grace.errors import GraceError

SHIPPED = Path(__file__).with_name("configs.json")
MOST_PARTS = 8  # splits of the inputs of one tile
DENSE_FROM = 2048  # rows from which the rule dequantises the weight and calls cuBLAS
# Fitted to 803 measurements on an H100, which they meet to 8%; the first of `hopper_tiles` was 0.9% from the fastest.
HOPPER_FROM = 18_000_000  # rows times outputs times chunks from which the rule takes "hopper", above 64 rows
HOPPER_TILES = {64: (8, 0.50), 128: (4, 0.74), 256: (2, 1.35)}  # rows -> stages, microseconds per chunk of 128 inputs
HOPPER_SPLITS = (1, 2, 3, 4, 5, 6, 8)
TILE_TIME = 3.65  # microseconds to begin and end a tile or a part of one
JOIN_TIME = 6.3e-5  # microseconds to add up parts: per number of a tile and part


@dataclass(frozen=True)
class Tile:
    """One configuration of the GEMM.

    Attributes:
        kind: "ways" or "tile" (see `w4a16_triton`), "round" for the tile kernel with rounded weights, "hopper" (see
            `w4a16_hopper`), or "dense" for dequantise, then the dense GEMM, where the other fields have no meaning.
        block_m: rows of a tile.
        block_n: outputs of a tile; 128 of kind "hopper".
        split: parts of its inputs, each a program.
        warps: warps of a program; 4 of each group for "hopper".
        stages: depth of the pipeline of asynchronous copies.
        late: whether the next kernel may start only after the loop (programmatic dependent launch).
        resident: programs that a multiprocessor holds; if not 0, only the last, incomplete wave of tiles is split.
            "hopper" always has one, and cuts the last wave's tiles in parts that may differ (`first_part`).
    """

    kind: str
    block_m: int = 16
    block_n: int = 64
    split: int = 1
    warps: int = 4
    stages: int = 4
    late: bool = False
    resident: int = 0

    def shared(self) -> int:
        """Bytes of shared memory that the pipeline takes, about: activations, words and scales."""
        if self.kind == "hopper":  # and the results on their way out; scales come without
            return self.stages * (256 * self.block_m + 64 * 128) + 2 * self.block_m * 128 + 512
        chunks = self.warps if self.kind == "ways" else 1
        buffers = self.stages - (self.kind == "ways")  # Hopper's tensor cores read activations from one more
        return chunks * (buffers * 256 * self.block_m + (self.stages - 1) * 68 * self.block_n)

    def tiles(self, rows: int, out: int) -> int:
        """How many a GEMM has."""
        return -(-rows // self.block_m) * -(-out // self.block_n)

    def unsplit(self, tiles: int, multiprocessors: int) -> int:
        """How many of so many tiles are not split: all where `split` is 1, those of whole waves with `resident`."""
        if self.split == 1:
            return tiles
        wave = multiprocessors * (1 if self.kind == "hopper" else self.resident)
        return tiles // wave * wave if wave else 0

    def first_part(self, cut: int, chunks: int, programs: int) -> tuple[int, int]:
        """How kind "hopper" cuts `cut` tiles of `chunks` each: chunks of the first part, and rounds of the others.

        A program takes the first part of each tile. The programs that are left take the other parts, alike, in as many
        rounds as that needs, so the first part is as long as those together.
        """
        others = self.split - 1
        if not cut or not others:
            return chunks, 0
        left = min(programs, cut * self.split) - cut
        rounds = -(-cut * others // left)
        return min(-(-chunks * rounds // (rounds + others)), chunks - others), rounds

    def divide(self, rows: int, out: int, multiprocessors: int, locks: int) -> tuple[int, int]:
        """The tiles of a GEMM, and how many of them, the first ones, are not split; each other one takes a lock.

        Raises:
            GraceError: more tiles to split than there are locks.
        """
        tiles = self.tiles(rows, out)
        whole = self.unsplit(tiles, multiprocessors)
        if tiles - whole > locks:
            raise GraceError(
                f"W4A16: {tiles - whole} tiles cannot be split, at most {locks}; "
                f"use split = 1 for {rows} rows and {out} outputs"
            )
        return tiles, whole


DENSE = Tile("dense")


@dataclass(frozen=True)
class GPU:
    """What the choice depends on: name, multiprocessors, bytes of shared memory that a program may have, and whether
    the kind "hopper" runs there."""

    name: str
    multiprocessors: int
    shared: int
    hopper: bool = False


def rows_key(rows: int) -> int:
    """M rounded up to a power of two: cases that share an entry of the table."""
    return 1 << max(rows - 1, 0).bit_length()


@cache
def choose(rows: int, out: int, inputs: int, group: int, dtype: str, gpu: GPU) -> Tile:
    """The tile for x [rows, inputs] in `dtype` times a weight [out, inputs] on `GPU`.

    Measured entries hold for their own shape and the power of two that `rows` rounds up to; elsewhere `rule` decides.
    fp16 does the same work as bf16, so it takes bf16's entries where it has none of its own.
    """
    here = read_table()["GPUs"].get(gpu.name, {})
    measured = (here.get(f"{dtype}/{group}") or here.get(f"bfloat16/{group}", {})).get(f"{out}x{inputs}", {})
    tile = Tile(**measured[str(rows_key(rows))]) if str(rows_key(rows)) in measured else None
    if tile is None or (tile.kind == "hopper" and not takes_hopper(out, group, gpu)):
        return rule(rows, out, inputs, group, gpu)
    return tile


def takes_hopper(out: int, group: int, gpu: GPU) -> bool:
    """Whether the kind "hopper" serves such a layer on `GPU`: groups of whole chunks, rows of results of 16 bytes."""
    return gpu.hopper and group % 128 == 0 and out % 8 == 0


def rule(rows: int, out: int, inputs: int, group: int, gpu: GPU) -> Tile:
    """Programs for every multiprocessor, inputs split no further than that takes; drawn from what an H100 measured."""
    chunks = -(-inputs // 128)
    if rows <= 16 and chunks <= 32 and out <= (32 if rows <= 8 else 16) * gpu.multiprocessors:
        block_n = 32 if out >= 16 * gpu.multiprocessors else 16
        tile = Tile("ways", 8 if rows <= 8 else 16, block_n, stages=6 if block_n == 32 else 4)
    elif rows > 64 and rows * out * chunks >= HOPPER_FROM and takes_hopper(out, group, gpu):
        return hopper_tiles(rows, out, inputs, gpu)[0]
    elif rows <= 128 or group < 128:
        block_m = min(max(8, rows_key(rows)), 64)
        tile = Tile("tile", block_m, 64, stages={8: 4, 16: 6, 32: 5}.get(block_m, 3))
        tile = _with_split(tile, tile.tiles(rows, out), chunks // 4, 5 * gpu.multiprocessors // 2)
    elif rows < DENSE_FROM:
        tile = Tile("round", 128, 128 if rows * out >= 128 * 128 * gpu.multiprocessors else 64, stages=3, late=True)
        tile = _with_split(tile, tile.tiles(rows, out), chunks // 8, 2 * gpu.multiprocessors)
    else:
        return DENSE
    return _that_fits(tile, gpu)


def hopper_tiles(rows: int, out: int, inputs: int, gpu: GPU) -> list[Tile]:
    """The "hopper" tiles for a GEMM, the shortest estimated time first: waves of tiles, the parts, joining them."""
    chunks, programs, times = -(-inputs // 128), gpu.multiprocessors, {}
    for (block_m, (stages, chunk_time)), split in product(HOPPER_TILES.items(), HOPPER_SPLITS):
        tile = Tile("hopper", block_m, 128, split, stages=stages)
        tiles = tile.tiles(rows, out)
        whole = tile.unsplit(tiles, programs)
        cut = tiles - whole
        if tile.shared() > gpu.shared or (split > 1 and (not cut or chunks < 4 * split)):
            continue
        time = -(-whole // programs) * (chunks * chunk_time + TILE_TIME)
        if cut:
            first, rounds = tile.first_part(cut, chunks, programs)
            other = -(-(chunks - first) // (split - 1))
            time += max(first * chunk_time + TILE_TIME, rounds * (other * chunk_time + TILE_TIME))
            time += JOIN_TIME * block_m * 128 * split
        times[tile] = time
    return sorted(times, key=times.get)


def _with_split(tile: Tile, tiles: int, most: int, programs: int) -> Tile:
    """`tile` with its inputs split so that there are about `programs` programs."""
    split = max(1, min(round(programs / tiles), most, MOST_PARTS))
    return Tile(**asdict(tile) | {"split": split})


def _that_fits(tile: Tile, gpu: GPU) -> Tile:
    """`tile`, with fewer stages or else fewer rows where the GPU's shared memory asks for it."""
    while tile.shared() > gpu.shared and (tile.stages > 2 or tile.block_m > 16):
        less = {"stages": tile.stages - 1} if tile.stages > 2 else {"block_m": tile.block_m // 2}
        tile = Tile(**asdict(tile) | less)
    return tile


@cache
def read_table() -> dict:
    """The table shipped with the package."""
    return json.loads(SHIPPED.read_text())


def with_entry(table: dict, gpu: str, dtype: str, group: int, shape: tuple[int, int], rows: int, tile: Tile) -> None:
    """Put a measured tile into `table` in place."""
    shapes = table["GPUs"].setdefault(gpu, {}).setdefault(f"{dtype}/{group}", {})
    shapes.setdefault(f"{shape[0]}x{shape[1]}", {})[str(rows_key(rows))] = asdict(tile)
