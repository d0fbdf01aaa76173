"""What is written from the models: the JSON schema, and a config file in which every key is explained
where it stands.
"""

import json
import textwrap
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from grace.config.load import load_experiment
from grace.config.schema import Experiment, Recipe, Resources, Runs

WIDTH = 120
OPENING = {
    "recipes": (Recipe, "A recipe takes"),
    "runs": (Runs, "A run takes"),
    "resources": (Resources, "A kind of job takes"),
}


def schema() -> str:
    """The JSON schema of an experiment, for editors and for checking without Python."""
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Experiment.model_json_schema()}
    return json.dumps(made, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def explain_file(path: str | Path) -> str:
    """A config file again, checked, with every key and its description; the comment that it opens with is kept."""
    experiment = load_experiment(path)
    lines = Path(path).read_text().splitlines()
    heading = list(takewhile(lambda line: line.startswith("#"), lines))
    return explained(experiment, heading)


def explained(experiment: Experiment, heading: Sequence[str] = ()) -> str:
    """`experiment` as YAML with each key's description beside it, under the comment lines `heading`."""
    lines = [*heading, ""] if heading else []
    for key, field in Experiment.model_fields.items():
        value = getattr(experiment, key)
        if isinstance(value, (BaseModel, dict)) or key in OPENING:
            lines += ["", *_comment(field.description or "", "")]
            lines += _opening(key)
            lines += _block(key, value)
        else:
            lines += _entry(key, value, field, "")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _block(key: str, value: Any) -> list[str]:
    """A section: one key a line for a model, one line an item for the lists and dictionaries of models."""
    if isinstance(value, BaseModel):
        return [f"{key}:", *_section(value, "  ")]
    if isinstance(value, dict):
        items = [f"  {name}: {_flow(_given(item))}" for name, item in value.items()]
    else:
        items = [f"  - {_flow(_given(item))}" for item in value]
    return [f"{key}:", *items] if items else [f"{key}: {{}}"]


def _section(section: BaseModel, indent: str) -> list[str]:
    lines = []
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            lines += [f"{indent}{key}:  # {field.description}", *_section(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            lines += [*_comment(field.description or "", indent), f"{indent}{key}:"]
            for item in value:
                first, *rest = _section(item, indent + "    ")
                lines += [f"{indent}  - {first.strip()}", *rest]
        elif isinstance(value, dict) and any(isinstance(items, list) for items in value.values()):
            lines += [*_comment(field.description or "", indent), f"{indent}{key}:"]
            for name, items in value.items():
                lines += [f"{indent}  {name}:", *(f"{indent}    - {_flow(_given(item))}" for item in items)]
        else:
            lines += _entry(key, value, field, indent)
    return lines


def _entry(key: str, value: Any, field: FieldInfo, indent: str) -> list[str]:
    """`key: value  # description`, or the description above where the line would be too long."""
    line = f"{indent}{key}: {_flow(value)}"
    about = field.description or ""
    choices = [str(choice) for choice in get_args(field.annotation)] if get_origin(field.annotation) is not None else []
    if choices and all(isinstance(choice, (str, int)) for choice in get_args(field.annotation)) and len(choices) > 1:
        about += f" [{' | '.join(choices)}]"
    if not about:
        return [line]
    if len(line) + 4 + len(about) <= WIDTH:
        return [f"{line}  # {about}"]
    return [*_comment(about, indent), line]


def _opening(key: str) -> list[str]:
    """What the items of a list or dictionary of models may hold, once, above the first."""
    if key not in OPENING:
        return []
    model, words = OPENING[key]
    lines = [f"# {words}"]
    for name, field in model.model_fields.items():
        lines += textwrap.wrap(f"{name}: {field.description}", WIDTH, initial_indent="#   ", subsequent_indent="#     ")
    return lines


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, WIDTH - 2 - len(indent))]


def _given(item: BaseModel) -> dict[str, Any]:
    """Only the keys that were written: defaults would drown a recipe's meaning."""
    return item.model_dump(exclude_unset=True)


def _flow(value: Any) -> str:
    """One value on one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("\n...\n").strip()
