"""`grace provenance TABLE --cell ROW COLUMN`: from one number to the predictions, models,
parameters and commits behind it.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from grace.errors import GraceError
from grace.files import MANIFEST, read_manifest
from grace.hashes import known_sha256
from grace.provenance.chain import Input, Results, Step
from grace.provenance.tree import WIDE
from grace.report.tables.cells import Number, find_cells, read_cells


@dataclass(frozen=True)
class Source:
    """A file that a number is computed from, and what made it; what is not known is None.

    Attributes:
        file: relative to where Snakemake runs.
        state: as its manifest says, differs from its manifest, not listed in the manifest, missing.
        sha256: of the file as it is, or as its manifest lists it where it is missing.
        questions: rows of a Parquet file.
        models: the manifests of the models that were asked or timed for it, each with its hash then, whether it is
            still that (`state`), the frozen parameters that it was made with (`parameters`), and the commit of the code
            (`revision`, with `+` where files had been changed).
        parameters: the frozen parameters of the asking or timing itself, with their hash.
        revision: the commit of its code.
    """

    file: str
    state: str
    sha256: str | None
    questions: int | None = None
    models: tuple[dict[str, Any], ...] = ()
    parameters: dict[str, Any] | None = None
    revision: str | None = None


def cell(path: str | Path, row: str, column: str, as_json: bool = False) -> dict[str, Any]:
    """Print what a number of the tables is computed from, and return it as JSON-able values.

    Args:
        path: a table of results/{experiment}/tables or speed, in any of its forms, or the folder.
        row, column: as `grace.report.tables.cells.find_cells` takes them.
        as_json: print JSON instead of a tree.

    Returns:
        `cells` (table, group, heads, column, value and stderr of each that was found; all are made of the same files)
        and `files`, one `Source` each.

    Raises:
        GraceError: no such table, row, column, or several that are made of different files.
    """
    path = Path(path)
    results = Results(path)
    folders = [results.folder / name for name in ("tables", "speed")]
    tables = next((folder for folder in folders if folder in (path.absolute(), path.absolute().parent)), None)
    if tables is None:
        named = " or ".join(results.name(folder) for folder in folders)
        raise GraceError(f"{path}: not a table; give a file of {named}, or the folder, with --cell")
    numbers = read_cells(tables)
    if path.absolute() != tables:
        numbers = [number for number in numbers if number.table == path.stem]
    if not numbers:
        raise GraceError(
            f"{path}: no table with numbers; there are {', '.join(sorted({n.table for n in read_cells(tables)}))}"
        )
    found = find_cells(numbers, row, column, path)
    sources = [_source(results, f"{results.name(results.folder)}/{file}") for file in found[0].files]
    shown = ("table", "group", "column", "value", "stderr")
    cells = [{"heads": list(n.heads), **{name: getattr(n, name) for name in shown}} for n in found]
    told = {"cells": cells, "files": [asdict(source) for source in sources]}
    if as_json:
        json.dump(told, sys.stdout, indent=2)
        print()
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDE)
        console.print(_tree(found, sources))
    return told


def _source(results: Results, file: str) -> Source:
    """What is known of one file below the results folder."""
    path = results.root / file
    manifest = f"{file.rpartition('/')[0]}/{MANIFEST}"
    listed = (results.root / manifest).is_file() or results.record(manifest) is not None
    step = results.step(manifest if listed else file)
    now = known_sha256(path) if path.is_file() else None
    recorded, state = None, "missing" if now is None else "here"
    if (results.root / manifest).is_file():
        entry = read_manifest(results.root / manifest)["files"].get(path.name)
        recorded = entry and entry["sha256"]
        if now is not None:
            state = "as its manifest says" if now == recorded else "differs from its manifest"
            state = state if entry else "not listed in the manifest of its folder"
    wanted = (f"/model/{MANIFEST}", f"/packed/{MANIFEST}")
    models = tuple(_model(results, given) for given in step.inputs if given.path.endswith(wanted))
    return Source(file, state, now or recorded, _questions(path), models, _about(step), _revision(step))


def _model(results: Results, given: Input) -> dict[str, Any]:
    """A model that was asked, and what it was made with: of a packed one, what the student was trained with."""
    maker = next((made for made in results.chain(given.path).values() if made.parameters), None)
    about = {"parameters": _about(maker), "revision": _revision(maker) if maker else None}
    return {"path": given.path, "sha256": given.sha256, "state": given.state, **about}


def _about(step: Step | None) -> dict[str, Any] | None:
    """The frozen parameters of a step, without their values, which stand in that file."""
    if step is None or step.parameters is None:
        return None
    return {**{key: step.parameters[key] for key in ("path", "sha256", "state")}, "seed": step.seed}


def _revision(step: Step) -> str | None:
    """The commit of the code that a step ran with; `+` behind it where the work tree had changes."""
    code = (step.environment or {}).get("code")
    return f"{code['revision']}{'+' * bool(code['modified'])}" if code else None


def _questions(path: Path) -> int | None:
    try:
        return pq.read_metadata(path).num_rows if path.is_file() else None
    except (pa.ArrowException, OSError):
        return None


def _tree(found: list[Number], sources: list[Source]) -> Tree:
    """What people read: equal lines of several files stand once, above them."""
    tree = Tree("\n".join(map(_head, found)))
    branches: dict[str, Tree] = {}
    for source in sources:
        lines = _lines(source)
        key = "\n".join(lines)
        if key not in branches:
            branches[key] = tree.add(key) if lines else tree
        asked = f", {source.questions:,} questions" if source.questions is not None else ""
        colour = "" if source.state in ("as its manifest says", "here") else "[red]"
        state = f"{colour}{source.state}{'[/]' if colour else ''}"
        fetch = f"; dvc pull {escape(source.file)}" if source.state == "missing" else ""
        branches[key].add(
            f"{escape(source.file)}  [dim]{(source.sha256 or 'not hashed')[:12]}[/]{asked}, {state}{fetch}"
        )
    return tree


def _head(number: Number) -> str:
    place = f"{number.table}: {number.group} {number.row}" if number.group else f"{number.table}: {number.row}"
    error = f" ± {number.stderr}" if number.stderr else ""
    return f"[bold]{escape(place)}, {escape(number.column)}[/]  {number.value}{error}"


def _lines(source: Source) -> list[str]:
    """The models of a file and what they and it were made with, one fact a line."""
    of_models = [
        line
        for model in source.models
        for line in (
            _fact("model", model),
            _fact("made with", model["parameters"]),
            _commit("model", model["revision"]),
        )
    ]
    lines = [*of_models, _fact("asked with", source.parameters), _commit("file", source.revision)]
    return [line for line in lines if line]


def _fact(name: str, about: dict[str, Any] | None) -> str:
    if about is None:
        return ""
    seed = f", seed {about['seed']}" if about.get("seed") is not None else ""
    mark = f"  [red]{about['state']} since[/]" if about["state"] in ("changed", "missing") else ""
    return f"{name}  {escape(about['path'])}  [dim]{(about['sha256'] or 'not hashed')[:12]}[/]{seed}{mark}"


def _commit(name: str, revision: str | None) -> str:
    return f"commit of the {name}  {revision}" if revision else ""
