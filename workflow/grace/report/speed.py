"""The folder `speed/`: all that is made from what was timed,
apart from what another machine computes again bit for bit.
"""

from pathlib import Path
from typing import Any, cast

from grace.files import whole_folder, write_json
from grace.report.decoding import decode_rows
from grace.report.figures.pareto import pareto
from grace.report.figures.roofline import roofline
from grace.report.figures.write import draw
from grace.report.tables.claims import savings_table
from grace.report.tables.deployment import deployment_table
from grace.report.tables.table import Table
from grace.report.tables.write import write_each
from grace.results.read import Results

TABLES = ("savings", "deployment")
FIGURES = {"pareto": pareto, "roofline": roofline}


def speed_tables(results: Results) -> list[Table]:
    """Those of TABLES, in that order."""
    return [savings_table(results), deployment_table(results)]


def speed_metrics(results: Results) -> dict[str, Any]:
    """Decoding by row and batch, and the INT4 GEMM's speed-up, to 3 significant digits; by names, as `metrics`."""
    found: dict[str, Any] = {}
    for row, record in decode_rows(results):
        numbers = {key: _significant(record[key]) for key in ("tokens_per_second", "weight_mib", "peak_mib")}
        case = f"batch{int(record['batch'])}" + ("" if record["cache"] == 16 else f"_cache{int(record['cache'])}")
        found.setdefault("decode", {}).setdefault(str(row), {})[case] = numbers
    if results.kernel is not None:
        for key, value in results.kernel.groupby(["backend", "m"])["speedup"].median().items():
            backend, m = cast("tuple[str, int]", key)
            found.setdefault("kernel_speedup", {}).setdefault(backend, {})[f"m{int(m)}"] = _significant(value)
    return found


def _significant(value: float, digits: int = 3) -> float:
    return float(f"{value:.{digits}g}")


def write_speed(results: Results, out: Path) -> None:
    """Write TABLES, their `cells.jsonl`, FIGURES and `metrics.json` into the folder `out`, as a whole."""
    with whole_folder(out, kind="speed") as part:
        write_each(speed_tables(results), part)
        draw(FIGURES, results, part)
        write_json(part / "metrics.json", speed_metrics(results))
