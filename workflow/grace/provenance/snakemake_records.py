"""Snakemake's records of how each output was made, kept beside the results so that they travel with DVC.

Snakemake decides by `.snakemake/metadata/` whether an output still holds: one JSON file per output, under its path in
base64, with the rule, its command, its parameters and the checksums of its inputs. The folder does not travel, so after
a clone and a `dvc pull` a plain `snakemake` would build everything again. `save` copies the records into
`results/{experiment}/provenance.jsonl`, which DVC keeps; `restore` puts back those of files that are here unchanged.

The file's first line names Snakemake's version and every input once, with its checksum; each further line is one
output with its size, its SHA-256 (of files up to 64 MB; larger ones are described by a manifest or index beside them),
what Snakemake measured of its job, and its record, whose inputs are places in that list. Of folders that git keeps it
also has what they were made with: git keeps nothing that names a machine.
"""

import csv
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from grace.errors import GraceError, problem, reason
from grace.files import ENVIRONMENT, MANIFEST, read_json, read_manifest, sha256, whole_file
from grace.hashes import known_hashes

RECORDS = "provenance.jsonl"
STATE = Path(".snakemake")  # Snakemake's own folder, and `grace` in it ours
METADATA = STATE / "metadata"
FORMAT = 6  # snakemake.persistence.RECORD_FORMAT_VERSION of the pinned version
HASHED_UP_TO = 64 * 2**20
_NAME_MAX = 255
_KEPT = ("rule", "log", "shellcmd", "params", "code", "software_stack_hash", "starttime", "endtime")


def _path(name: str) -> str:
    if not name or "\0" in name or max(map(len, name.split("/"))) > _NAME_MAX or len(name) > 4000:
        raise ValueError("no file can have this name")
    return name


def _inside(name: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError("lies outside the folder that Snakemake runs in")
    return name


_Path = Annotated[str, AfterValidator(_path)]
_Output = Annotated[_Path, AfterValidator(_inside)]  # what `grace merge` may replace
_Time = Annotated[float, Field(ge=0, le=250_000_000_000)]  # seconds; the year 9892


class _Record(BaseModel):
    """What is read of Snakemake's record of an output."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    rule: str | None
    input: list[_Path] | None
    input_checksums: dict[str, str | None] | None
    starttime: _Time | None
    endtime: _Time | None
    log: list[_Path] | None = None
    shellcmd: str | None = None


class _Row(BaseModel):
    """A row of provenance.jsonl, its inputs spelt out."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    output: _Output
    bytes: int
    sha256: str | None
    measured: dict[str, float] | None = None
    record: _Record


def save(results: str | Path) -> int:
    """Write the records of every output below `results` to `results/provenance.jsonl`; return how many it holds.

    Rows of outputs that are not here (a partial pull) are kept as they were.
    """
    results = Path(results)
    if not results.is_dir():
        raise GraceError(f"{results}: no such folder; give the experiment's, results/EXPERIMENT")
    store = _store(results)
    made = {output: record for output, record in recorded() if _below(output, results) and Path(output).is_file()}
    before = {row["output"]: row for row in read_rows(store)}
    rows = {output: row for output, row in before.items() if not Path(output).is_file()}
    for output, record in made.items():
        known = _known_before(before.get(output), record)
        measured = known.get("measured") or benchmark(next(iter(record["log"] or []), None))
        rows[output] = {"output": output, **_identity(Path(output)), "measured": measured, "record": record}
        made_with = Path(output).with_name(ENVIRONMENT)
        if Path(output) in (results / "tables" / MANIFEST, results / "figures" / MANIFEST):
            here = read_json(made_with) if made_with.is_file() else None
            rows[output]["environment"] = known.get("environment") or here
    write_rows(store, rows)
    _stamp(results).parent.mkdir(parents=True, exist_ok=True)
    _stamp(results).write_text(sha256(store))
    return len(rows)


def write_rows(store: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Write rows by output; `read_rows` gives them back."""
    checksums: dict[str, str | None] = {}
    for row in rows.values():
        checksums |= {name: None for name in row["record"]["input"] if name not in checksums}
        checksums |= row["record"]["input_checksums"]
    places = {name: place for place, name in enumerate(sorted(checksums))}
    head = {"snakemake": version("snakemake"), "format": FORMAT, "inputs": sorted(checksums.items())}
    with whole_file(store) as part, part.open("w") as file:
        file.write(_line(head))
        for output in sorted(rows):
            file.write(_line({**rows[output], "record": _folded(rows[output]["record"], places, checksums)}))


def restore(results: str | Path) -> int:
    """Put back the records of outputs that are as `results/provenance.jsonl` knows them; return how many.

    An output that differs is left alone, and so is a record of this machine that fits the inputs as they are now. When
    the file of records has not changed since the last time, only outputs that are newer than their record are looked
    at.
    """
    results = Path(results)
    store = _store(results)
    if not store.is_file():
        return 0
    known = _stamp(results).is_file() and _stamp(results).read_bytes() == sha256(store).encode()
    checksum = cache(_checksum)
    restored = 0
    for row in read_rows(store):
        output, target = Path(row["output"]), record_path(row["output"])
        if not output.is_file() or (known and target.is_file() and _mtime(target) >= _mtime(output)):
            continue
        if not as_recorded(output, row) or (target.is_file() and _fits(target, output, checksum)):
            continue
        record = {**row["record"], "endtime": _mtime(output), "incomplete": False, "record_format_version": FORMAT}
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record))
        restored += 1
    _stamp(results).parent.mkdir(parents=True, exist_ok=True)
    _stamp(results).write_text(sha256(store))
    return restored


def benchmark(log: str | None, root: Path = Path(".")) -> dict[str, float] | None:
    """What Snakemake measured of a job, from the table that it writes beside the job's log (which git does not keep).

    Args:
        log: the job's log, as its record names it.
        root: where Snakemake runs.

    Returns:
        `seconds`, and `peak_mib` and `cpu_seconds` where the job was long enough to be looked at; None without a table.
    """
    path = (root / log).with_suffix(".tsv") if log else None
    if path is None or not path.is_file():
        return None
    with path.open(newline="") as file:
        row = next(csv.DictReader(file, delimiter="\t"), None) or {}
    found = {}
    for name, column in (("seconds", "s"), ("peak_mib", "max_rss"), ("cpu_seconds", "cpu_time")):
        with suppress(ValueError, TypeError):  # `-` and `NA` are what a job too short to be measured has
            value = float(row.get(column))  # type: ignore[arg-type]
            if isfinite(value):
                found[name] = value
    return found or None


def _known_before(row: dict[str, Any] | None, record: dict[str, Any]) -> dict[str, Any]:
    """The row of the very job of a record, or {}: a restored record has the job's start, and its log is elsewhere."""
    return row if row is not None and row["record"]["starttime"] == record["starttime"] else {}


def _store(results: Path) -> Path:
    return results / RECORDS


def _stamp(results: Path) -> Path:
    return STATE / "grace" / f"{results.name}.sha256"


def record_path(output: str) -> Path:
    """Where Snakemake keeps an output's record: base64 of its path, cut into folders where too long for a name."""
    encoded = urlsafe_b64encode(output.encode()).decode()
    parts = [encoded[i : i + _NAME_MAX - 1] for i in range(0, len(encoded), _NAME_MAX - 1)]
    return METADATA.joinpath(*(f"@{part}" for part in parts[:-1]), parts[-1])


def recorded_output(record: Path) -> str:
    """The output that a record is of; a `ValueError` where the file has no name of a record."""
    return urlsafe_b64decode("".join(part.removeprefix("@") for part in record.relative_to(METADATA).parts)).decode()


def recorded() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every whole record of this machine, with its output's path."""
    for path in sorted(METADATA.rglob("*")):
        if path.is_file() and (record := read_record(path)):
            kept = {key: record.get(key) for key in _KEPT}
            kept["input"] = [str(name) for name in record["input"] or []]
            kept["input_checksums"] = record["input_checksums"] or {}
            yield recorded_output(path), kept


def read_record(path: Path) -> dict[str, Any] | None:
    """Snakemake's own record of an output; None where another version wrote it, or where its job did not end.

    Raises:
        GraceError: it is damaged.
    """
    record = read_json(path)
    if isinstance(record, dict) and (record.get("record_format_version") != FORMAT or record.get("incomplete")):
        return None
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        raise GraceError(f"{path}: damaged ({problem(error)}); delete it and run `grace records restore`") from None
    return record


def read_rows(store: Path) -> list[dict[str, Any]]:
    """The rows with their inputs spelt out; none where there is no file or another Snakemake wrote it."""
    if not store.is_file():
        return []
    try:
        head, *rows = (json.loads(line) for line in store.read_text().splitlines())
        if head["format"] != FORMAT:
            return []
        inputs = head["inputs"]
        rows = [{**row, "record": _unfolded(row["record"], inputs)} for row in rows]
        for row in rows:
            _Row.model_validate(row)
        return rows
    except ValidationError as error:
        raise GraceError(f"{store}: damaged ({problem(error)}); take it from DVC again: dvc checkout {store}") from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise GraceError(f"{store}: damaged ({reason(error)}); take it from DVC again: dvc checkout {store}") from error


def _folded(record: dict[str, Any], places: dict[str, int], checksums: dict[str, str | None]) -> dict[str, Any]:
    """Inputs as places in the list; checksums only where they are not the list's."""
    own = {name: record["input_checksums"].get(name) for name in record["input"]}
    differing = {name: value for name, value in own.items() if value != checksums[name]}
    return {**record, "input": [places[name] for name in record["input"]], "input_checksums": differing}


def _unfolded(record: dict[str, Any], inputs: list[list[str]]) -> dict[str, Any]:
    listed = dict(inputs[place] for place in record["input"])
    checksums = {name: value for name, value in {**listed, **record["input_checksums"]}.items() if value is not None}
    return {**record, "input": list(listed), "input_checksums": checksums}


def _identity(output: Path) -> dict[str, Any]:
    size = output.stat().st_size
    return {"bytes": size, "sha256": sha256(output) if size <= HASHED_UP_TO else None}


def as_recorded(output: Path, row: dict[str, Any]) -> bool:
    """Whether a file is the one of a row; for a manifest also whether it lists what is there, by content."""
    if _identity(output) != {"bytes": row["bytes"], "sha256": row["sha256"]}:
        return False
    if output.name != MANIFEST:
        return True
    entries = read_manifest(output)["files"]
    hashes = known_hashes(output.parent / name for name in entries)
    return all(hashes[output.parent / name] == entry["sha256"] for name, entry in entries.items())


def _fits(target: Path, output: Path, checksum: Any) -> bool:
    """Whether a record of this machine speaks of this very output and of the inputs as they are now."""
    try:
        record = read_record(target)
    except GraceError:  # cut by a kill
        return False
    if record is None or record["endtime"] != _mtime(output):
        return False
    return all(checksum(name) == value for name, value in (record["input_checksums"] or {}).items())


def _checksum(name: str) -> str | None:
    """A file's checksum as Snakemake writes it."""
    return f"sha256:{sha256(name)}" if Path(name).is_file() else None


def _mtime(path: Path) -> float:
    return path.stat().st_mtime


def _below(output: str, folder: Path) -> bool:
    return Path(output).is_relative_to(folder) and not Path(output).is_relative_to(folder / ".trials")


def _line(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n"
