"""The JSON files of a model folder that others wrote: read in one place, held against what the pipeline takes from
them.

Nothing here imports torch: a dry run reads them too.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from grace.errors import GraceError, printable, problem

INDEX = "model.safetensors.index.json"


Layers = Annotated[int, Field(ge=0, le=2000)]  # a loop makes each: a number of millions would never end
Rows = Annotated[int, Field(gt=0, le=20_000_000)]
Token = Annotated[int, Field(ge=0, strict=True)]
Ends = Token | list[Token] | None


class _Text(BaseModel):
    vocab_size: Rows | None = None
    eos_token_id: Ends = None
    hidden_size: PositiveInt | None = None
    num_hidden_layers: Layers | None = None


class _Vision(BaseModel):
    num_hidden_layers: Layers | None = None
    depth: Layers | None = None


class _Quantisation(BaseModel):
    """What every method writes; `grace.quant.packed` reads the groups of its own."""

    quant_method: str
    format: str | None = None


class _Generation(BaseModel):
    """What is taken from generation_config.json."""

    eos_token_id: Ends = None


class ModelConfig(BaseModel):
    """What is taken from config.json; all other keys are transformers' to check."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model_type: str | None = None
    architectures: list[str] | None = None
    text_config: _Text | None = None
    vision_config: _Vision | None = None
    quantization_config: _Quantisation | None = None
    vocab_size: Rows | None = None
    eos_token_id: Ends = None
    hidden_size: PositiveInt | None = None
    image_token_index: int | None = None
    image_token_id: int | None = None
    auto_map: None = None

    @field_validator("auto_map", mode="before")
    @classmethod
    def _no_code(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("asks for code of its own, which is never run; use the model as transformers has it")


class _Index(BaseModel):
    weight_map: dict[str, str]

    @field_validator("weight_map")
    @classmethod
    def _inside(cls, names: dict[str, str]) -> dict[str, str]:
        outside = next((n for n in names.values() if Path(n).name != n or not n.endswith(".safetensors")), None)
        if outside is not None:
            raise ValueError(f"{printable(outside, 100)} is no name of a *.safetensors file beside it")
        if not names:
            raise ValueError("it lists no weights")
        return names


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object; a `GraceError` where it does not."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_float=_number, parse_constant=_number)
    except FileNotFoundError:
        raise GraceError(f"{path}: no such file; build or copy it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise GraceError(f"{path}: not valid JSON ({printable(str(error))}); build or copy it again") from None
    if not isinstance(value, dict):
        raise GraceError(f"{path}: holds no JSON object; build or copy it again")
    return value


def _number(text: str) -> float:
    """A number that can be written as JSON again: Python alone reads NaN and infinities."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number of JSON")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, with the keys that are read here as they have to be.

    Raises:
        GraceError: no such file, no JSON object, or a key that is not what it has to be.
    """
    return _checked(folder / "config.json", ModelConfig)


def read_generation(folder: Path) -> dict[str, Any]:
    """generation_config.json of a model folder, empty where it has none; a `GraceError` where ends are no token ids."""
    path = folder / "generation_config.json"
    return _checked(path, _Generation) if path.is_file() else {}


def end_tokens(value: int | Iterable[int] | None) -> list[int]:
    """The ids of `eos_token_id`, which is one, several or none."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def read_weight_map(folder: Path) -> dict[str, str] | None:
    """{tensor: file beside the index} of a model in several weight files; None where it has no index."""
    path = folder / INDEX
    return _checked(path, _Index)["weight_map"] if path.is_file() else None


def own_code(folder: Path) -> Path | None:
    """The first configuration file of a model's or processor's folder that asks for code of its own, or None."""
    return next((file for file in folder.glob("*config.json") if read_object(file).get("auto_map") is not None), None)


def _checked(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    value = read_object(path)
    try:
        model.model_validate(value)
    except ValidationError as error:
        raise GraceError(f"{path}: {problem(error)}; build or copy the model again") from None
    return value
