"""Which tile serves which product: a table of measured configurations, and a rule for what it does not hold."""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

SHIPPED = Path(__file__).with_name("w4a16_configs.json")
MOST_PARTS = 16  # splits of the inputs of one tile
LEAST_CHUNKS = 4  # chunks of 128 inputs that a part works through at least


@dataclass(frozen=True)
class Tile:
    """One configuration of the kernel; `block_m` 0 stands for dequantise, then the dense product."""

    block_m: int
    block_n: int
    split: int
    warps: int
    stages: int

    @property
    def dense(self) -> bool:
        return self.block_m == 0


DENSE = Tile(0, 0, 1, 4, 1)


def rows_key(rows: int) -> int:
    """M rounded up to a power of two: cases that share an entry of the table."""
    return 1 << max(rows - 1, 0).bit_length()


@cache
def choose(rows: int, out: int, inputs: int, group: int, dtype: str, card: str, multiprocessors: int) -> Tile:
    """The tile for x [rows, inputs] times a weight [out, inputs] on `card`.

    Measured entries hold for their own shape and the power of two that `rows` rounds up to; elsewhere the rule picks
    by rows alone and splits the inputs until every multiprocessor has `waves` tiles.
    """
    table = read_table()
    measured = table["cards"].get(card, {}).get(f"{dtype}/{group}", {}).get(f"{out}x{inputs}", {})
    if str(rows_key(rows)) in measured:
        return Tile(**measured[str(rows_key(rows))])
    rule = table["default"]
    if rows >= rule["dense_from"]:
        return DENSE
    entry = next(t for t in rule["tiles"] if t["rows_up_to"] is None or rows <= t["rows_up_to"])
    tiles = -(-rows // entry["block_m"]) * -(-out // entry["block_n"])
    chunks = -(-inputs // 128)
    split = -(-entry["waves"] * multiprocessors // tiles)
    split = max(1, min(split, chunks // LEAST_CHUNKS, MOST_PARTS))
    return Tile(entry["block_m"], entry["block_n"], split, entry["warps"], entry["stages"])


@cache
def read_table() -> dict:
    """The table shipped with the package."""
    return json.loads(SHIPPED.read_text())


def with_entry(table: dict, card: str, dtype: str, group: int, shape: tuple[int, int], rows: int, tile: Tile) -> None:
    """Put a measured tile into `table` in place."""
    shapes = table["cards"].setdefault(card, {}).setdefault(f"{dtype}/{group}", {})
    shapes.setdefault(f"{shape[0]}x{shape[1]}", {})[str(rows_key(rows))] = asdict(tile)
