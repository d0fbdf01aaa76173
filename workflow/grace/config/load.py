"""Reading a configuration, with messages that name the file, the key and the fix."""

import difflib
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from grace.config.schema import Experiment
from grace.errors import GraceError


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; a config with one value lost is refused instead."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` is given twice; drop one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML file into a dictionary.

    Raises:
        GraceError: no such file, not YAML, a key given twice, or not a mapping.
    """
    try:
        values = yaml.load(Path(path).read_text(), Loader=_Loader)
    except OSError as error:
        raise GraceError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise GraceError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(values, dict):
        raise GraceError(f"{path}: holds no keys; start from the default, `grace config default`")
    return values


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
    except ValidationError as error:
        problems = [_sentence(problem) for problem in error.errors()]
        raise GraceError("\n".join(f"{name}: {problem}" for problem in problems)) from None


def _sentence(problem: dict[str, Any]) -> str:
    """One pydantic problem as a sentence with its fix."""
    kind, said, value = problem["type"], problem["msg"], problem["input"]
    path, annotation, about = _walk(problem["loc"])
    if kind == "missing":
        return f"`{path}` is missing; add it ({about})"
    if kind == "extra_forbidden":
        known = _keys(annotation)
        *_, wrong = problem["loc"]
        close = difflib.get_close_matches(str(wrong), known, n=1, cutoff=0.5)
        return f"`{path}` is not a key; " + (f"did you mean `{close[0]}`?" if close else f"use {_listed(known)}")
    if kind == "value_error":
        said = said.removeprefix("Value error, ")
        return f"`{path}`: {said}" if path else said
    if kind.startswith("union_tag"):
        return f"`{path}.source` must be `demo`, or `files` for conversations of your own (see docs/my-data.md)"
    said = said[0].lower() + said[1:]
    if isinstance(value, (dict, list)) and len(str(value)) > 60:
        value = f"{type(value).__name__} of {len(value)}"
    return f"`{path}` is {value!r}: {said}" + (f" ({about})" if about else "")


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
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
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


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
