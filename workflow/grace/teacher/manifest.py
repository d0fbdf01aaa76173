"""What a cache's manifest and a shard's sidecar say, held against what is read of them before anything else is done."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, field_validator

from grace.errors import GraceError, printable
from grace.files import MANIFEST, read_json

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _File(BaseModel):
    bytes: NonNegativeInt
    sha256: Digest


class _Shard(_File):
    file: str
    records: NonNegativeInt
    grams: NonNegativeInt
    audited: Any
    tokens: NonNegativeInt
    gate_sum: float

    @field_validator("file")
    @classmethod
    def _beside(cls, name: str) -> str:
        if Path(name).name != name:
            raise ValueError("must be the name of a file beside it")
        return name


class _Sidecar(_Shard):
    pins: dict[str, Any]
    libraries: dict[str, str]
    vocabulary: PositiveInt
    width: PositiveInt
    first: NonNegativeInt
    last: NonNegativeInt
    conversations: NonNegativeInt


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="allow")

    format: Literal["hidden", "hidden-int8", "sampled"]
    vocabulary: PositiveInt
    width: PositiveInt
    temperature: float | None
    records: NonNegativeInt
    grams: NonNegativeInt
    supervised_tokens: NonNegativeInt
    gate_sum: float
    libraries: dict[str, str]
    shards: list[_Shard]
    files: dict[str, _File]


def read_cache_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished cache.

    Raises:
        GraceError: there is none, it is no cache's, or a value is not what it has to be.
    """
    path = folder / MANIFEST
    value = read_json(path)
    if not isinstance(value, dict) or "supervised_tokens" not in value:
        raise GraceError(f"{path}: not the manifest of a teacher cache; check the path")
    if problem := _problem(_Manifest, value):
        raise GraceError(f"{path}: {problem}; run `grace cache finish` again")
    return value


def read_sidecar(folder: Path, name: str) -> dict[str, Any] | None:
    """A shard's sidecar, or None where there is none or it is not whole."""
    try:
        value = read_json(folder / f"{name}.json")
    except GraceError:
        return None
    return None if _problem(_Sidecar, value) else value


def _problem(model: type[BaseModel], value: Any) -> str | None:
    try:
        model.model_validate(value)
        return None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(printable(str(part), 80) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        return f"`{where}`: {said[0].lower() + said[1:]}"
