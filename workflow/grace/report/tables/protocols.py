"""What the protocol changes: the same model and benchmark under every protocol that it was asked under."""

from grace.errors import GraceError
from grace.report.tables.footnotes import gaps
from grace.report.tables.models import mean_score, model_line
from grace.report.tables.table import Cell, Table
from grace.results.read import Results, Row, read_predictions

SINGLE = "single"  # of predictions that name no protocol
Column = tuple[str, str]  # benchmark, protocol


def protocols_table(results: Results) -> Table:
    """Rows are models, columns benchmark and protocol; only benchmarks that were asked under several."""
    files = {row: _files(results, row) for row in results.seeds}
    asked: dict[str, dict[str, None]] = {}
    for found in files.values():
        for benchmark, protocol in found:
            asked.setdefault(benchmark, {})[protocol] = None
    columns = [(name, protocol) for name, protocols in asked.items() if len(protocols) > 1 for protocol in protocols]
    table = Table(
        "protocols",
        "Protocols: what the prompt, the image handling and the reading of answers change",
        ["Model", "Bits"],
        [f"{benchmark}: {protocol}" for benchmark, protocol in columns],
    )
    if not columns:
        table.notes = ["No benchmark was asked under more than one protocol.", *gaps(results)]
        return table
    for row, found in files.items():
        cells = [_cell(results, row, found[column]) if column in found else Cell() for column in columns]
        table.lines.append(model_line(results, row, cells))
    table.notes = [
        "100 × the mean score over the protocol's own questions, mean over seeds ± standard error (clustered by image, "
        "with the variance between seeds). The other tables show the first protocol of each benchmark. Nothing is "
        "tested here.",
        *gaps(results),
    ]
    return table


def _files(results: Results, row: Row) -> dict[Column, str]:
    """The predictions file of every benchmark and protocol that all seeds of a row have, below `predictions/`."""
    seeds = []
    for seed in results.seeds[row]:
        manifest = results.manifest(row, seed)
        own = {
            (name, entry.get("protocol") or SINGLE): entry.get("file", f"{name}.parquet")
            for name, entry in manifest.get("benchmarks", {}).items()
        }
        own |= {
            (name, protocol): entry["file"]
            for protocol, entries in manifest.get("protocols", {}).items()
            for name, entry in entries.items()
        }
        seeds.append(own)
    first, *others = seeds
    return {column: file for column, file in first.items() if all(column in other for other in others)}


def _cell(results: Results, row: Row, file: str) -> Cell:
    paths = [results.folder / row.folder(seed) / "predictions" / file for seed in results.seeds[row]]
    if not all(path.is_file() for path in paths):  # partial results
        return Cell()
    frames = [read_predictions(path) for path in paths]
    for path, frame in zip(paths, frames, strict=True):
        if frame["sample_id"].tolist() != frames[0]["sample_id"].tolist():
            raise GraceError(f"{path}: other questions than the other seeds'; evaluate this model again")
    return mean_score(results, row, frames, tuple(path.relative_to(results.folder).as_posix() for path in paths))
