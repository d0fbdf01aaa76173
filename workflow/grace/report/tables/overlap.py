"""Scores with and without the questions whose images were trained on."""

from typing import Any

from grace.files import read_json
from grace.report.tables.footnotes import gaps
from grace.report.tables.models import mean_score, model_line
from grace.report.tables.table import Cell, Table
from grace.results.read import Results, Row

FILE = "overlap.json"


def overlap_table(results: Results) -> Table:
    """Rows are models; two columns for each benchmark that shares images with the training data: all questions,
    and the rest.
    """
    path = results.folder / FILE
    table = Table(
        "overlap", "Overlap: scores without the questions whose images were trained on", ["Model", "Bits"], []
    )
    if not path.is_file():
        table.notes = ["Images of the benchmarks were not looked for in the training data."]
        return table
    about = read_json(path)
    found = {name: entry for name, entry in about["benchmarks"].items() if name in results.benchmarks}
    table.notes = [_counts(results, name, entry) for name, entry in found.items()]
    table.notes += [
        f"Near: a 64-bit difference hash (9 x 8 grey values) that differs in at most {about['near_bits']} bits from "
        f"one of the {about['training_images']:,} training images'. It survives resizing and recompression, not "
        "cropping."
    ]
    shared = {name: {*entry["exact"], *entry["near"]} for name, entry in found.items()}
    shared = {name: samples for name, samples in shared.items() if samples}
    if not shared:
        table.notes = ["No question of any benchmark shows a training image.", *table.notes]
        return table
    table.columns = [text for name in shared for text in (results.mirrors[name], f"{results.mirrors[name]}, clean")]
    for row in results.seeds:
        cells = []
        for name, samples in shared.items():
            cells += _cells(results, row, name, samples) if results.has(row, name) else [Cell(), Cell()]
        table.lines.append(model_line(results, row, cells))
    table.notes = [
        "100 × the mean score over all questions, and over those whose images were not trained on; mean over seeds ± "
        "standard error (clustered by image, with the variance between seeds). Nothing is tested here.",
        *table.notes,
        *gaps(results),
    ]
    return table


def _counts(results: Results, name: str, entry: dict[str, Any]) -> str:
    unread = f"; images of {entry['unreadable']:,} could not be read" if entry["unreadable"] else ""
    return (
        f"{results.mirrors[name]}: of {entry['questions']:,} questions {entry['exact_count']:,} show the very file of "
        f"a training image and {entry['near_count']:,} nearly the same look{unread}."
    )


def _cells(results: Results, row: Row, name: str, shared: set[str]) -> list[Cell]:
    """All questions, and the clean ones."""
    frames = [results.predictions(row, seed, name, ["sample_id", "image_id", "score"]) for seed in results.seeds[row]]
    clean = ~frames[0]["sample_id"].isin(shared).to_numpy()
    files = (*results.files(row, name), FILE)
    rest = [frame[clean] for frame in frames]
    return [
        mean_score(results, row, frames, files),
        mean_score(results, row, rest, files) if clean.any() else Cell(text="none left"),
    ]
