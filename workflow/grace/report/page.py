"""report/index.html: tables, figures, examples and provenance in one file that needs no network."""

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from grace import __version__
from grace.errors import GraceError
from grace.files import MANIFEST, read_json, sha256, whole_file
from grace.report.claims import claim_texts, findings
from grace.report.examples import Example, examples
from grace.report.figures import NAMES as FIGURES
from grace.report.paper import label, what_was_run
from grace.report.read import BASELINE, TEACHER, Results, Row
from grace.report.render import Cell, Table, cell_texts
from grace.report.tables import build_tables

CAPTIONS = {
    "pareto": "Accuracy, throughput and memory (the paper's Figure 1)",
    "entropy": "The teacher's entropy and its errors (the paper's Figure 2)",
    "training": "Training curves",
    "attention": "Where teacher and students look (the paper's Figure 3)",
    "similarity": "Similarity between visual tokens (the paper's Figure 5)",
}


def write_page(results: Results, out: Path) -> None:
    """Write the page; the figures are taken from `figures/` beside the predictions."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text())
    text = template.render(_content(results))
    with whole_file(out) as part:
        part.write_text(text)


def _content(results: Results) -> dict[str, Any]:
    known: dict = {}
    tables = build_tables(results, known)
    experiment = results.experiment
    return {
        "experiment": experiment.experiment,
        "run": what_was_run(experiment, tuple(experiment.baseline_seeds)),
        "benchmarks": results.benchmarks,
        "questions": f"{sum(results.scores(BASELINE, name).values.shape[1] for name in results.benchmarks):,}",
        "models": sum(map(len, results.seeds.values())),
        "tables": [_table(table) for table in tables],
        "claims": _claims(results, known),
        "figures": [_figure(results, name) for name in FIGURES],
        "examples": [_example(example) for example in examples(results)],
        "provenance": [_provenance(results, row, seed) for row, seeds in results.seeds.items() for seed in seeds],
        "config": json.dumps(read_json(results.folder / "config" / "experiment.json"), indent=2, sort_keys=True),
        "made": f"This page: grace {__version__}, git revision {_revision(results.folder)}.",
    }


def _table(table: Table) -> dict[str, Any]:
    lines = [
        {
            "group": line.group,
            "heads": line.heads,
            "cells": [{"value": _plain(cell.value), "html": _cell(cell)} for cell in line.cells],
            "run": line.run,
            "last": line.heads[0] == "Detectable difference",
        }
        for line in table.lines
    ]
    about = {"name": table.name, "title": table.title, "heads": table.heads, "columns": table.columns}
    return {**about, "lines": lines, "notes": table.notes, "blocks": any(line.group for line in table.lines)}


def _cell(cell: Cell) -> Markup:
    shown, error, paper = cell_texts(cell)
    wrap = {"best": Markup("<b>{}</b>"), "second": Markup("<u>{}</u>")}.get(cell.mark, Markup("{}"))
    text = wrap.format(shown) + escape(error)
    return text + (Markup("<small>{}</small>").format(paper) if paper else "")


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _claims(results: Results, known: dict) -> list[dict[str, str]]:
    return [
        {
            **claim_texts(results, item),
            "paper_value": _plain(item.paper),
            "value": _plain(item.comparison.difference),
            "p_value": _plain(item.p),
            "p_questions_value": _plain(item.p_questions),
        }
        for item in findings(results, known)
    ]


def _figure(results: Results, name: str) -> dict[str, str]:
    path = results.folder / "figures" / f"{name}.svg"
    if not path.is_file():
        raise GraceError(f"{path}: no such file; draw the figures first (`grace report figures`)")
    return {"name": name, "caption": CAPTIONS[name], "source": _inline(path.read_bytes(), "image/svg+xml")}


def _inline(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _example(example: Example) -> dict[str, Any]:
    kind = "image/png" if example.picture.startswith(b"\x89PNG") else "image/jpeg"
    return {**vars(example), "source": _inline(example.picture, kind)}


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
        "evaluated": sum(entry.get("seconds", 0.0) for entry in predictions["benchmarks"].values()),
        "trained": _training_seconds(results.folder / below / "train.jsonl"),
        "config": json.dumps(read_json(config), indent=2, sort_keys=True) if config.is_file() else "",
        "config_name": config.name,
    }


def _training_seconds(log: Path) -> float | None:
    """Wall time of the optimiser steps that a training log lists."""
    if not log.is_file():
        return None
    return sum(json.loads(line).get("seconds", 0.0) for line in log.read_text().splitlines() if line.strip())


def _revision(folder: Path) -> str:
    """The commit that the results stand in, with a mark where the tree has changes; `unknown` outside git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
