"""Writing every table of an experiment that is made from answers;
those of what was timed are in `grace.report.speed`.
"""

from collections.abc import Iterable
from pathlib import Path

from grace.files import whole_folder
from grace.report.tables.benchmark_metrics import measures_table
from grace.report.tables.cells import CELLS, cell_lines
from grace.report.tables.claims import claims_table
from grace.report.tables.language import language_table
from grace.report.tables.overlap import overlap_table
from grace.report.tables.pairs import pairs_table
from grace.report.tables.protocols import protocols_table
from grace.report.tables.scores import groups_of, score_table
from grace.report.tables.table import Table, comma_separated, latex, markdown
from grace.results.read import Results

TITLES = {
    "table1": ("1", "Table 1: full precision (bf16), teacher, baseline and GRACE"),
    "table2": ("2", "Table 2: quantised students"),
    "table3": ("3", "Table 3: GRACE's parts at bf16 (gated decoupled KD, relational CKA, information bottleneck)"),
    "table4": ("4", "Table 4: what distillation adds to quantisation-aware training"),
    "outliers": ("outliers", "Outliers: INT4 under the outlier transform, which is no table of the paper"),
}
NAMES = ("claims", "pairs", *TITLES, "measures", "protocols", "overlap", "language")


def build_tables(results: Results, known: dict | None = None) -> list[Table]:
    """The claims, then every table in the paper's order;
    `known` keeps comparisons for other readers of these results.
    """
    known = {} if known is None else known
    groups = groups_of(results)
    tables = [score_table(results, name, title, key, groups[key], known) for name, (key, title) in TITLES.items()]
    return [
        claims_table(results, known),
        pairs_table(results, known),
        *tables,
        measures_table(results),
        protocols_table(results),
        overlap_table(results),
        language_table(results),
    ]


def write_tables(results: Results, out: Path) -> None:
    """Write NAMES.{md,csv,tex} and what their numbers are made of (`cells.jsonl`) into the folder `out`, as a whole."""
    with whole_folder(out, kind="tables") as part:
        write_each(build_tables(results), part)


def write_each(tables: Iterable[Table], folder: Path) -> None:
    """Write each table in its three forms, and `cells.jsonl` of all, into a folder that is there."""
    tables = list(tables)
    for table in tables:
        for ending, text in (("md", markdown), ("csv", comma_separated), ("tex", latex)):
            (folder / f"{table.name}.{ending}").write_text(text(table))
    (folder / CELLS).write_text(cell_lines(tables))
