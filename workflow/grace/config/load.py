"""Reading a configuration, with messages that name the file, the key and the fix."""

import difflib
import reprlib
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from grace.config.schema import Experiment
from grace.config.yaml_file import read_yaml
from grace.errors import GraceError, printable, shortened

RENAMED = {
    "data.pictures": "data.images",
    "data.questions_per_picture": "data.questions_per_image",
    "data.conversations": "data.sources[0].path",
    "data.limit": "data.sources[0].limit",
}
"""Keys of older configurations and their present names; `data.source: llava` is now `files`."""

SHOWN = 60  # characters of a value or key in a message


def load_experiment(source: str | Path | dict[str, Any], name: str = "config") -> Experiment:
    """The checked experiment of a YAML file, or of a dictionary that was read already.

    Args:
        source: path, or the values themselves.
        name: what messages call a dictionary: the files that it came from.

    Raises:
        GraceError: one line per wrong key, each with the file, the key and the fix.
    """
    if not isinstance(source, dict):
        name, source = str(source), read_yaml(source)
    try:
        return Experiment.model_validate(source)
    except RecursionError:
        raise GraceError(
            f"{name}: nested too deeply, or holds itself; a configuration has a handful of levels"
        ) from None
    except ValidationError as error:
        problems = [_sentence(problem) for problem in error.errors()]
        raise GraceError("\n".join(f"{name}: {problem}" for problem in problems)) from None


def load_files(paths: list[Path]) -> Experiment:
    """The experiment of several YAML files, as Snakemake reads them after --configfile: later keys stand,
    lists are whole.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        merged = _merged(merged, read_yaml(path))
    return load_experiment(merged, " + ".join(map(str, paths)))


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(one[key], value) if isinstance(value, dict) and isinstance(one.get(key), dict) else value
            for key, value in other.items()}  # fmt: skip
    return {**one, **both}


def _sentence(problem: ErrorDetails) -> str:
    """One pydantic problem as a sentence with its fix."""
    kind, said, value = problem["type"], problem["msg"], problem["input"]
    path, annotation, about = _walk(problem["loc"])
    if kind == "missing":
        return f"`{path}` is missing; add it ({about})"
    if kind == "extra_forbidden":
        known = _keys(annotation)
        *_, wrong = problem["loc"]
        close = difflib.get_close_matches(str(wrong), known, n=1, cutoff=0.5)
        if new := RENAMED.get(path):
            return f"`{path}` is called `{new}` now; rename it"
        return f"`{path}` is not a key; " + (f"did you mean `{close[0]}`?" if close else f"use {_quoted(known)}")
    if kind == "value_error":
        # a validator's sentence quotes what the file says, whatever that is
        said = printable(shortened(said.removeprefix("Value error, ")), 800)
        return f"`{path}`: {said}" if path else said
    if kind.startswith("union_tag"):
        old = "; `llava` is called `files` now" if isinstance(value, dict) and value.get("source") == "llava" else ""
        return f"`{path}.source` must be `demo`, or `files` for conversations of your own{old} (see docs/my-data.md)"
    said = said[0].lower() + said[1:]
    return f"`{path}` is {_shown(value)}: {said}" + (f" ({about})" if about else "")


def _shown(value: Any) -> str:
    """A value in a message, in a few characters; nothing large is spelt out to be cut."""
    if isinstance(value, (dict, list)):
        text = reprlib.repr(value)  # looks at a few values of a few levels
        return text if len(text) <= SHOWN and "..." not in text else f"{type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return "a number of more than 60 digits"
    text = repr(value[: SHOWN + 1] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= SHOWN + 2 else f"{text[:SHOWN]}…"


def _key(part: str) -> str:
    """A key in a message: on one line, and not longer than a line."""
    return part if part.isprintable() and len(part) <= SHOWN else _shown(part)


def _walk(location: tuple[str | int, ...]) -> tuple[str, Any, str]:
    """Follow pydantic's location: the key as a user writes it, the model that holds its last part, its description."""
    annotation: Any = Experiment
    holder: Any = Experiment
    path, about = "", ""
    for part in location:
        model = _model(annotation, part)
        if model is not None and part not in model.model_fields and part == _tag(model):
            annotation = model  # the tag of a discriminated union stands in the location, but in no file
            continue
        if part == "[key]":
            continue
        holder = annotation
        path += f"[{part}]" if isinstance(part, int) else f".{_key(part)}" if path else _key(part)
        if model is not None:
            field = model.model_fields.get(str(part))
            annotation, about = (field.annotation, field.description or "") if field else (None, "")
        else:
            inner = get_args(_bare(annotation))
            annotation, about = (inner[-1] if inner else None), about
    return path, holder, about


def _bare(annotation: Any) -> Any:
    """Without `Annotated` and `| None`."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, types.UnionType):
            kept = [a for a in get_args(annotation) if a is not type(None)]
            if len(kept) != 1:
                return annotation
            annotation = kept[0]
        else:
            return annotation


def _model(annotation: Any, part: str | int) -> type[BaseModel] | None:
    """The model that a location's part is a key of; of a union the member that `part` is the tag of."""
    bare = _bare(annotation)
    members = get_args(bare) if get_origin(bare) in (Union, types.UnionType) else (bare,)
    models = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
    return next((m for m in models if _tag(m) == part), models[0] if models else None)


def _tag(model: type[BaseModel]) -> str | None:
    """The value of `source` that selects a kind of data."""
    field = model.model_fields.get("source")
    return get_args(field.annotation)[0] if field else None


def _keys(annotation: Any) -> list[str]:
    model = _model(annotation, "")
    return list(model.model_fields) if model is not None else []


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
