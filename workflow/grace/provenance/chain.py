"""The chain from an output back to the data: what Snakemake, the manifests, the frozen parameters and the logs know.

An output is what a rule declares: a single file, or the manifest.json that stands for a folder. Its record comes from
`results/{experiment}/provenance.jsonl` where that describes the file that is here, and otherwise from Snakemake's own
`.snakemake/metadata`, which also knows what was built since the last `dvc repro`.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from grace.config.accepted import accepted, read_fingerprint, resolved
from grace.config.code import CodeIndex, changed
from grace.errors import GraceError, problem
from grace.files import ENVIRONMENT, MANIFEST, read_json, read_manifest, sha256
from grace.provenance.snakemake_records import HASHED_UP_TO, benchmark, read_record, read_rows, record_path


@dataclass(frozen=True)
class Input:
    """A file that an output was made from; `state` is unchanged, changed, missing, or unknown (too large,
    no record).
    """

    path: str
    sha256: str | None
    state: str


@dataclass
class Step:
    """One output and what is known of its making; what was never recorded is None."""

    output: str
    state: str  # whole, changed (since the record was made), missing
    sha256: str | None
    files: int
    size: int
    rule: str | None = None
    command: str | None = None
    ended: str | None = None
    seconds: float | None = None
    peak_mib: float | None = None
    cpu_seconds: float | None = None
    gpu_hours: float | None = None
    log: str | None = None
    parameters: dict[str, Any] | None = None
    seed: int | None = None
    environment: dict[str, Any] | None = None
    code: dict[str, Any] | None = None
    inputs: list[Input] = field(default_factory=list)  # outputs of other steps, and source data


class Results:
    """A results folder with its records.

    Args:
        path: the folder `results/{experiment}`, or any file or folder below one.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path).absolute()
        for folder in (path, *path.parents):
            if folder.parent.name == "results":
                self.folder, self.root = folder, folder.parent.parent
                break
        else:
            raise GraceError(f"{path}: not below a results folder; give a file or folder of results/EXPERIMENT")
        if not self.folder.is_dir():
            raise GraceError(f"{self.folder}: no such folder; build the experiment, or `dvc pull` it")
        self._hashes: dict[str, str | None] = {}

    def name(self, path: Path) -> str:
        """A path as Snakemake records it: relative to where it runs."""
        return path.absolute().relative_to(self.root).as_posix()

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Rows of provenance.jsonl by output; {} where it was never saved."""
        return {row["output"]: row for row in read_rows(self.folder / "provenance.jsonl")}

    def record(self, output: str) -> dict[str, Any] | None:
        """Snakemake's record of an output, as the module's docstring says where from."""
        row = self.rows.get(output)
        if row is not None and row["sha256"] in (None, self.hash(output)):
            return row["record"]
        live = self.root / record_path(output)
        if live.is_file() and (record := read_record(live)):
            return record
        return row["record"] if row else None

    def hash(self, name: str) -> str | None:
        """SHA-256 of a file as it is now; None where it is missing or too large to be hashed in passing."""
        if name not in self._hashes:
            path = self.root / name
            hashed = path.is_file() and path.stat().st_size <= HASHED_UP_TO
            self._hashes[name] = sha256(path) if hashed else None
        return self._hashes[name]

    def output_of(self, path: str | Path) -> str:
        """The output that a file or folder belongs to.

        Raises:
            GraceError: it is no output, with the outputs that are near it.
        """
        path = Path(path).absolute()
        if not path.exists():
            raise GraceError(f"{path}: no such file or folder; build it, or `dvc pull` it")
        if path.is_file() and self.record(self.name(path)):
            return self.name(path)
        for folder in (path, *path.parents):
            if folder == self.folder.parent:
                break
            if (folder / MANIFEST).is_file():
                return self.name(folder / MANIFEST)
        near = sorted(self.name(p.parent) for p in path.rglob(MANIFEST)) if path.is_dir() else []
        rest = f"; give one of {', '.join(near[:6])}{', …' if len(near) > 6 else ''}" if near else ""
        raise GraceError(f"{path}: no rule made it{rest or '; give an output of the workflow'}")

    def step(self, output: str) -> Step:
        """What is known of one output."""
        path = self.root / output
        record = self.record(output)
        manifest = read_manifest(path) if path.name == MANIFEST and path.is_file() else {"files": {}}
        files = {name: self.root / Path(output).parent / name for name in manifest["files"]}
        sizes = [file.stat().st_size for file in files.values() if file.is_file()]
        row = self.rows.get(output)
        now = self.hash(output)
        state = "whole" if path.is_file() else "missing"
        if state == "whole" and row and row["sha256"] not in (None, now):
            state = "changed"
        step = Step(
            output, state, now, len(files) or int(path.is_file()),
            sum(sizes) if files else path.stat().st_size if path.is_file() else 0,
            environment=self._made_with(path, row if state == "whole" else None),
        )  # fmt: skip
        if record is not None:
            self._add_record(step, record)
            gpus = _gpus(step.environment)
            step.gpu_hours = round(gpus * step.seconds / 3600, 4) if gpus and step.seconds is not None else None
        return step

    @staticmethod
    def _made_with(path: Path, row: dict[str, Any] | None) -> dict[str, Any] | None:
        """What a folder was made with, by its manifest: as its records have it, or from the file beside it."""
        beside = path.with_name(ENVIRONMENT)
        if path.name != MANIFEST:
            return None
        if row and row.get("environment"):
            return _checked(row["environment"], path.parent)
        return _checked(read_json(beside), beside) if beside.is_file() else None

    def _add_record(self, step: Step, record: dict[str, Any]) -> None:
        step.rule, step.command = record["rule"], record.get("shellcmd")
        started, ended = record["starttime"], record["endtime"]
        if ended is not None:
            step.ended = datetime.fromtimestamp(ended, UTC).isoformat(timespec="seconds")
        if started is not None and ended is not None:
            step.seconds = round(ended - started, 2)
        step.log = next(iter(record.get("log") or []), None)
        measured = self._measured(step.output, record) or {}
        step.seconds = measured.get("seconds", step.seconds)
        step.peak_mib, step.cpu_seconds = measured.get("peak_mib"), measured.get("cpu_seconds")
        for name in sorted(map(str, record["input"] or [])):
            checksum = (record["input_checksums"] or {}).get(name)
            recorded = checksum.removeprefix("sha256:") if checksum else None
            found = Input(name, recorded, self._state(name, recorded))
            if name.startswith(f"{self.name(self.folder)}/config/code/"):
                step.code = self._code(name, found)
            elif name.startswith(f"{self.name(self.folder)}/config/"):
                path = self.root / name
                values = read_json(path) if path.is_file() else None
                step.parameters = {"path": name, "sha256": recorded, "state": found.state, "values": values}
                step.seed = _seed(values)
            step.inputs.append(found)

    def _code(self, name: str, found: Input) -> dict[str, Any]:
        """The frozen code of a step, what of it differs now, and the changes that were accepted as harmless."""
        path = self.root / name
        about: dict[str, Any] = {"path": name, "sha256": found.sha256, "state": found.state}
        if not path.is_file():
            return {**about, "modules": None, "changed": None, "accepted": []}
        frozen = read_fingerprint(path)
        trace = ("changed", "by", "at", "reason")
        return {
            **about,
            "modules": len(frozen["code"]),
            "changed": self._changed(frozen),
            "accepted": [
                {key: change[key] for key in trace} for change in accepted(self.folder) if change["frozen"] == frozen
            ],
        }

    def _changed(self, frozen: dict[str, Any]) -> list[str] | None:
        """Modules that differ from the package beside the results, apart from what was accepted; None without one."""
        if self._index is None:
            return None
        try:
            now = self._index.fingerprint(frozen["subcommand"], *frozen["chosen"])
        except KeyError:
            return [frozen["subcommand"]]
        return changed(frozen, resolved(self.folder, now))

    @cached_property
    def _index(self) -> CodeIndex | None:
        package = self.root / "workflow" / "grace"
        return CodeIndex(package) if package.is_dir() else None

    def _state(self, name: str, recorded: str | None) -> str:
        if not (self.root / name).is_file():
            return "missing"
        now = self.hash(name)
        if recorded is None or now is None:
            return "unknown"
        return "unchanged" if now == recorded else "changed"

    def _measured(self, output: str, record: dict[str, Any]) -> dict[str, float] | None:
        """What Snakemake measured of the job of a record: as it was saved with it, or from the table beside its log."""
        row = self.rows.get(output)
        saved = row.get("measured") if row and row["record"]["starttime"] == record["starttime"] else None
        return saved or benchmark(next(iter(record.get("log") or []), None), self.root)

    def chain(self, output: str) -> dict[str, Step]:
        """An output's step and those of everything that it was made from, each once, nearest first."""
        found: dict[str, Step] = {}
        waiting = [output]
        while waiting:
            name = waiting.pop(0)
            if name in found:
                continue
            found[name] = self.step(name)
            waiting += [i.path for i in found[name].inputs if self.record(i.path) is not None]
        return found


class _Code(BaseModel):
    revision: str | None = None
    modified: bool | None = None
    sha256: str | None = None


class _Hardware(BaseModel):
    model_config = ConfigDict(extra="allow")

    processor: str = ""
    cores: int = 0
    memory_gib: float = 0
    gpus: list[str] = []
    visible: str | None = None


class _Environment(BaseModel):
    """`environment.json`, as `grace.environment` writes it; by any version."""

    model_config = ConfigDict(extra="allow")

    code: _Code = _Code()
    packages: dict[str, str] = {}
    hardware: _Hardware = _Hardware()
    python: str = ""


def _checked(environment: Any, path: Path) -> dict[str, Any]:
    try:
        return _Environment.model_validate(environment).model_dump()
    except ValidationError as error:
        raise GraceError(f"{path}: damaged ({problem(error)}); take it from DVC, or remove it") from None


def _gpus(environment: dict[str, Any] | None) -> int:
    """GPUs that a job saw."""
    if not environment or not environment["hardware"]["gpus"]:
        return 0
    visible = environment["hardware"]["visible"]
    return len(environment["hardware"]["gpus"]) if visible is None else len([c for c in visible.split(",") if c])


def _seed(values: Any) -> int | None:
    """The seed of a job's frozen parameters: its own, or its data's."""
    if not isinstance(values, dict) or "experiment" in values:
        return None
    data = values.get("data")
    return values.get("seed", data.get("seed") if isinstance(data, dict) else None)
