"""The deployment table: what the packed model weighs, how fast it decodes, and what its kernel does."""

import json
from pathlib import Path
from typing import cast

import pandas as pd

from grace.files import MANIFEST
from grace.report.decoding import DECODE, decode_rows, dense_beside
from grace.report.paper import ARXIV, GRACE, label, paper_beside, paper_family, row_role, what_was_run
from grace.report.tables.table import Cell, Line, Table
from grace.results.read import BASELINE, TEACHER, Results, Row

KERNEL = "bench/kernel.csv"
MIB_PER_GB = 1e9 / 2**20
COLUMNS = ("batch", "weights MiB", "peak MiB", "tokens/s", "× throughput", "× memory")


def deployment_table(results: Results) -> Table:
    """Memory, throughput and their ratios to bf16, from the CSV files of the benchmark rule."""
    table = Table(
        "deployment", "Deployment: memory, decoding throughput and the INT4 GEMM", ["Model", "Bits"], list(COLUMNS)
    )
    measured = decode_rows(results)
    for row, record in measured:
        table.lines.append(_decode_line(results, row, record, dense_beside(measured, record)))
    table.lines += _disk_lines(results)
    if results.kernel is not None:
        table.lines += _kernel_lines(results.kernel)
    table.notes = _notes(results)
    return table


def _decode_line(results: Results, row: Row, record: dict, dense: dict | None) -> Line:
    experiment = results.experiment
    shown = [int(record["batch"]), record["weight_mib"], record["peak_mib"], record["tokens_per_second"]]
    cells = [Cell(value, digits=digits, files=(DECODE,)) for value, digits in zip(shown, (0, 2, 1, 1), strict=True)]
    ratios: list[float | None] = [None, None]
    if dense is not None and row != TEACHER:
        ratios = [record["tokens_per_second"] / dense["tokens_per_second"], record["peak_mib"] / dense["peak_mib"]]
    role = row_role(experiment, row)
    for ratio, name in zip(ratios, ("throughput over bf16", "memory over bf16"), strict=True):
        paper = paper_beside(experiment, "deployment", role, row.precision, name)
        cells.append(Cell(ratio, paper=paper, digits=2, files=() if ratio is None else (DECODE,)))
    run = (
        f"{what_was_run(experiment, results.seeds[row][:1])}; {record['device']}, {int(record.get('new_tokens', 0))} "
        "new tokens"
    )
    bits = row.precision if record["cache"] == 16 else f"{row.precision}, {int(record['cache'])}-bit cache"
    return Line([label(experiment, row), bits], cells, "Decoding", run)


def _disk_lines(results: Results) -> list[Line]:
    """Weight files of one packed student per precision (GRACE where there is one) beside the bf16 baseline's."""
    packed: dict[str, Row] = {}
    for row in sorted(results.rows(), key=lambda row: row_role(results.experiment, row) != GRACE):
        if (_part(results, row, "packed") / MANIFEST).is_file():
            packed.setdefault(row.precision, row)
    if not packed or not (_part(results, BASELINE, "model") / MANIFEST).is_file():
        return []
    sizes = {BASELINE: _weights(results, BASELINE, "model")}
    sizes |= {row: _weights(results, row, "packed") for _, row in sorted(packed.items(), reverse=True)}
    lines = []
    for place, title in enumerate(("Weight files, whole model", "Weight files, decoder layers alone")):
        for row, size in sizes.items():
            own, dense = _weight_files(results, row), _weight_files(results, BASELINE)
            cells = [Cell(text=""), Cell(size[place], digits=3, files=own), *(Cell(text="") for _ in range(3))]
            both = tuple(dict.fromkeys((*own, *dense)))
            cells.append(Cell(size[place] / sizes[BASELINE][place], digits=2, files=both))
            if place:
                _paper_weights(results, row, cells)
            run = what_was_run(results.experiment, results.seeds[row][:1])
            lines.append(Line([label(results.experiment, row), row.precision], cells, title, run))
    return lines


def _paper_weights(results: Results, row: Row, cells: list[Cell]) -> None:
    """The paper's language model in this precision: its size, and that over bf16."""
    experiment = results.experiment
    own, dense = (
        paper_beside(experiment, "deployment", row_role(experiment, each), each.precision, "language model GB")
        for each in (row, BASELINE)
    )
    if own is not None and dense is not None:
        cells[1].paper, cells[5].paper = round(own * MIB_PER_GB), round(own / dense, 2)


def _weight_files(results: Results, row: Row) -> tuple[str, ...]:
    """A row's weight files, below the experiment's folder."""
    paths = sorted(_part(results, row, "model" if row == BASELINE else "packed").glob("model*.safetensors"))
    return tuple(path.relative_to(results.folder).as_posix() for path in paths)


def _part(results: Results, row: Row, part: str) -> Path:
    return results.folder / row.folder(results.seeds[row][0]) / part


def _weights(results: Results, row: Row, part: str) -> tuple[float, float]:
    """MiB of a folder's weights: all, and those of the decoder's layers; from the headers of its safetensors files."""
    from grace.quant.names import in_decoder_layer

    every = layers = 0
    for path in sorted(_part(results, row, part).glob("model*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = tensor["data_offsets"][1] - tensor["data_offsets"][0]
                every += size
                layers += size if in_decoder_layer(name) else 0
    return every / 2**20, layers / 2**20


def _kernel_lines(kernel: pd.DataFrame) -> list[Line]:
    """Per backend and number of activation rows: the median speed-up over the dense GEMM of the same run."""
    lines = []
    for key, part in kernel.groupby(["backend", "device", "m"], sort=True):
        backend, device, m = cast("tuple[str, str, int]", key)
        error = part["relative_error"].max() if "relative_error" in part else None
        run = f"{part['shape'].nunique()} shapes, {device}" + (
            "" if error is None else f"; largest relative error {error:.1e}"
        )
        blank = [Cell(text="") for _ in range(3)]
        lines.append(
            Line(
                [f"kernel {backend}", "int4"],
                [
                    Cell(int(m), digits=0, files=(KERNEL,)),
                    *blank,
                    Cell(part["speedup"].median(), digits=2, files=(KERNEL,)),
                    Cell(text=""),
                ],
                "INT4 GEMM",
                run,
            )
        )
    return lines


def _notes(results: Results) -> list[str]:
    if results.decode is None and results.kernel is None:
        return [f"{results.folder}/bench holds no measurements: run the benchmark rule."]
    notes = [
        "× throughput and × memory: over the bf16 baseline at the same batch, measured in the same run (of files: "
        "their size over the baseline's). Weights: what is loaded; peak: weights, cache and activations. Keys and "
        "values are in 16 bits, the baseline's too, except where “8-bit cache” stands. Decoder linears alone are "
        "packed: vision tower, embeddings and head stay in bf16. INT4 GEMM (W4A16): the median speed-up over shapes "
        "over the dense GEMM, by activation rows (column “batch”).",
    ]
    if paper_family(results.experiment) == "LLaVA-1.5":
        notes.append(
            f"“paper”: {ARXIV}'s INT4 model on a data-centre GPU with its own kernel, 3 times the throughput and 54% "
            "less memory; its weights are LLaVA-1.5-7B's language model in MiB."
        )
    if results.experiment.data.source == "demo":
        notes.append("The demo's models are far smaller than real ones: their speed and memory do not carry over.")
    return notes
