"""report/index.html: tables, figures, examples and provenance in one file that needs no network."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from grace import __version__
from grace.errors import GraceError
from grace.files import MANIFEST, TIMING, read_json, sha256, whole_file
from grace.git import git_or_none
from grace.report.figures.style import title_of
from grace.report.page.examples import Example, examples
from grace.report.page.summary import page_head
from grace.report.paper import label
from grace.report.speed import FIGURES as TIMED
from grace.report.speed import speed_tables
from grace.report.tables.table import WIDE, Cell, Table, Texts, aligned, comma_separated, latex, markdown
from grace.report.tables.write import build_tables
from grace.results.read import TEACHER, Results, Row

TITLES = {
    "pareto": (
        "Accuracy, throughput and memory (the paper's Figure 1)",
        "Up and right is better; the bubble's area is peak memory.",
    ),
    "entropy": (
        "The teacher's entropy and its errors (the paper's Figure 2)",
        "If an unsure teacher errs more often, weighing it by its confidence makes sense.",
    ),
    "training": ("Training curves", "First seed of each recipe, smoothed."),
    "attention": (
        "Where teacher and students look (the paper's Figure 3)",
        "Attention from the position that answers to the image, per decoder layer, for one question.",
    ),
    "similarity": (
        "Similarity between visual tokens (the paper's Figure 5)",
        "What relational CKA aligns: how alike each pair of visual tokens is within one image.",
    ),
    "roofline": (
        "The INT4 GEMM against what the hardware allows",
        "Left: rates under the roof of bandwidth and matrix rate that the same run measured. Right: speed-up over the "
        "dense GEMM.",
    ),
}


def write_page(results: Results, out: Path) -> None:
    """Write the page; the figures are taken from `figures/` and `speed/` beside the predictions."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text())
    text = template.render(_content(results))
    with whole_file(out) as part:
        part.write_text(text)


def _content(results: Results) -> dict[str, Any]:
    known: dict = {}
    return {
        "experiment": results.experiment.experiment,
        **page_head(results, known),
        "tables": [_table(table) for table in (*build_tables(results, known), *speed_tables(results))],
        "figures": [_figure(results, name) for name in TITLES],
        "examples": [_example(example) for example in examples(results)],
        "provenance": [_provenance(results, row, seed) for row, seeds in results.seeds.items() for seed in seeds],
        "config": json.dumps(read_json(results.folder / "config" / "experiment.json"), indent=2, sort_keys=True),
        "made": f"This page: grace {__version__}, git revision {_revision(results.folder)}.",
    }


def _table(table: Table) -> dict[str, Any]:
    blocks: list[dict[str, Any]] = []
    for line, texts in zip(table.lines, aligned(table), strict=True):
        cells = [
            {"value": _six_digits(cell.value), "html": _cell(cell, text)}
            for cell, text in zip(line.cells, texts, strict=True)
        ]
        if not blocks or blocks[-1]["title"] != line.group:
            blocks.append({"title": line.group, "lines": []})
        blocks[-1]["lines"].append({"heads": line.heads, "cells": cells, "run": line.run})
    files = {
        "csv": ("text/csv", comma_separated),
        "md": ("text/markdown", markdown),
        "tex": ("application/x-tex", latex),
    }
    return {
        "name": table.name,
        "title": table.title,
        "heads": table.heads,
        "columns": table.columns,
        "wide": len(table.columns) > WIDE,
        "blocks": blocks,
        "notes": table.notes,
        "files": [(ending, _inline(write(table).encode(), kind)) for ending, (kind, write) in files.items()],
    }


def _cell(cell: Cell, text: Texts) -> Markup:
    wrap = {"best": Markup("<b>{}</b>"), "second": Markup("<u>{}</u>")}.get(cell.mark, Markup("{}"))
    shown = wrap.format(text.number)
    if text.error:
        shown += Markup('<span class="e"> ± {}{}</span>').format(_hidden(text.before_error), text.error)
    shown += escape(text.star) + _hidden(text.after)
    if text.paper:
        tail = f" ± {text.before_error}{text.error}{text.star}{text.after}" if text.error else text.after
        shown += Markup("<small>paper {}{}</small>").format(text.paper, _hidden(tail))
    return shown


def _hidden(text: str) -> Markup:
    """Text that takes its room and is neither seen nor read aloud."""
    return Markup('<i class="h" aria-hidden="true">{}</i>').format(text) if text else Markup("")


def _six_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _figure(results: Results, name: str) -> dict[str, str]:
    path = results.folder / ("speed" if name in TIMED else "figures") / f"{name}.svg"
    if not path.is_file():
        raise GraceError(f"{path}: no such file; draw the figures first (`grace report {path.parent.name}`)")
    title, caption = TITLES[name]
    said = title_of(path.read_text())
    source = _inline(path.read_bytes(), "image/svg+xml")
    return {"name": name, "title": title, "caption": caption, "alt": f"{title}: {said}", "source": source}


def _inline(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _example(example: Example) -> dict[str, Any]:
    kind = "image/png" if example.image.startswith(b"\x89PNG") else "image/jpeg"
    return {**vars(example), "source": _inline(example.image, kind)}


def _provenance(results: Results, row: Row, seed: int) -> dict[str, Any]:
    below = row.folder(seed)
    predictions = results.manifest(row, seed)
    harness = predictions.get("harness", {})
    config = (
        results.folder
        / "config"
        / ("teacher.json" if row == TEACHER else f"students/{row.recipe}/{row.precision}/seed{seed}.json")
    )
    return {
        "label": label(results.experiment, row),
        "precision": row.precision,
        "seed": seed,
        "folder": f"{below}/predictions",
        "manifest": sha256(results.folder / below / "predictions" / MANIFEST),
        "model": predictions.get("model", ""),
        "harness": " ".join(str(harness[key]) for key in ("name", "version") if key in harness),
        "evaluated": sum(entry.get("seconds") or 0.0 for entry in predictions.get("benchmarks", {}).values()),
        "trained": _training_seconds(results.folder / below / "model" / TIMING),
        "files": [
            (path.name, hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest())
            for path in sorted((results.folder / below / "predictions").glob("*.parquet"))
        ],
        "config": json.dumps(read_json(config), indent=2, sort_keys=True) if config.is_file() else "",
        "config_name": config.name,
    }


def _training_seconds(timing: Path) -> float | None:
    """Wall time of the optimiser steps that a training's `timing.jsonl` lists."""
    if not timing.is_file():
        return None
    return sum(json.loads(line)["seconds"] for line in timing.read_text().splitlines())


def _revision(folder: Path) -> str:
    """The commit that the results stand in, with a mark where the tree has changes; `unknown` outside git."""
    return git_or_none(folder, "describe", "--always", "--dirty", "--abbrev=40") or "unknown"
