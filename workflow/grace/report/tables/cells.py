"""Which files each number of the tables is computed from, written beside them as `cells.jsonl`.

The first line names every file once, below the experiment's folder; each further line is a row of a table with, by
column, places in that list. The numbers themselves stand in the tables alone, so that the file changes only when rows
or columns do.
"""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace.errors import GraceError, reason
from grace.report.tables.table import Table

CELLS = "cells.jsonl"


@dataclass(frozen=True)
class Number:
    """A number of a table: where it stands, its value and error as the CSV has them,
    and the files that it is made of.
    """

    table: str
    group: str
    heads: tuple[str, ...]
    column: str
    value: str
    stderr: str
    files: tuple[str, ...]

    @property
    def row(self) -> str:
        """The row as `--cell` takes it, with its group where rows of several have the same name."""
        return " ".join(self.heads[:2])


def cell_lines(tables: Iterable[Table]) -> str:
    """The text of `cells.jsonl`."""
    tables = list(tables)
    every = sorted({file for table in tables for line in table.lines for cell in line.cells for file in cell.files})
    places = {file: place for place, file in enumerate(every)}
    written: list[dict[str, Any]] = [{"files": every}]
    for table in tables:
        for line in table.lines:
            cells = {
                column: [places[file] for file in cell.files]
                for column, cell in zip(table.columns, line.cells, strict=True)
                if cell.files
            }
            written.append({"table": table.name, "group": line.group, "heads": line.heads, "cells": cells})
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in written)


def read_cells(folder: Path) -> list[Number]:
    """Every number of the tables in `folder` that says what it is computed from.

    Raises:
        GraceError: the file is missing or damaged, or the tables have other rows.
    """
    path = folder / CELLS
    try:
        head, *lines = (json.loads(line) for line in path.read_text().splitlines())
        rows: dict[str, list[dict[str, str]]] = {}
        found = []
        for line in lines:
            name = line["table"]
            if name not in rows:
                with (folder / f"{name}.csv").open(newline="") as file:
                    rows[name] = list(csv.DictReader(file))
            row = rows[name].pop(0)
            if [line["group"], *line["heads"]] != list(row.values())[: 1 + len(line["heads"])]:
                raise ValueError(f"another row stands in {name}.csv")
            for column, places in line["cells"].items():
                files = tuple(head["files"][place] for place in places)
                error = row[f"{column} stderr"]
                found.append(Number(name, line["group"], tuple(line["heads"]), column, row[column], error, files))
        return found
    except FileNotFoundError as error:
        raise GraceError(f"{error.filename}: no such file; write the tables again with Snakemake") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise GraceError(
            f"{path}: does not belong to the tables beside it ({reason(error)}); write them again"
        ) from error


def find_cells(numbers: list[Number], row: str, column: str, where: Path) -> list[Number]:
    """The numbers of a row and column, as people type them; several only where all are made of the same files.

    Args:
        numbers: of one table, or of all.
        row: the model's name in the table, with its bits where that is needed (`GRACE int4`); case does not matter.
        column: a heading, or a word of it: `colour` for `colour (GQA)`.
        where: what is named in a message.

    Raises:
        GraceError: there is none, or several that are made of different files; the message lists what there is.
    """
    rows = _closest(numbers, row, lambda n: (n.row, n.heads[0], f"{n.group} {n.row}", " ".join((n.group, *n.heads))))
    if not rows:
        raise GraceError(f"{where}: no row `{row}`; there are {_joined(n.row for n in numbers)}")
    found = _closest(rows, column, lambda n: (n.column, n.column.partition(" (")[0], n.column))
    if not found:
        raise GraceError(
            f"{where}: no number of `{row}` in a column `{column}`; there are {_joined(n.column for n in rows)}"
        )
    if len({n.files for n in found}) > 1:
        places = (f"`{f'{n.group} ' if n.group else ''}{n.row}` `{n.column}` in {n.table}" for n in found)
        raise GraceError(f"{where}: `{row}` `{column}` is more than one number: {_joined(places)}; say which")
    return found


def _closest(numbers: list[Number], text: str, names: Any) -> list[Number]:
    """Those of which a name is `text`; where there are none, those whose last, longest name holds it."""
    wanted = " ".join(text.casefold().split())
    exact = [n for n in numbers if wanted in [name.casefold().strip() for name in names(n)]]
    return exact or [n for n in numbers if wanted and wanted in names(n)[-1].casefold()]


def _joined(names: Iterable[str], shown: int = 12) -> str:
    every = list(dict.fromkeys(names))
    return ", ".join(every[:shown]) + (f" and {len(every) - shown} more" if len(every) > shown else "")
