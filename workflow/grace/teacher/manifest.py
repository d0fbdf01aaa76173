"""What a cache's manifest and a shard's sidecar say, held against what is read of them before anything else is done."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from grace.errors import GraceError, problem
from grace.files import MANIFEST, read_json

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    """What is read is the file's own value, not what pydantic could make of it."""

    model_config = ConfigDict(strict=True)


class _File(_Strict):
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


class _Error(_Strict):
    loss: float | None
    error: float | None
    standard_error: float | None


class _LossError(_Error):
    relative_error: float | None
    gradient_cosine: float | None


class _Audit(_Strict):
    records: NonNegativeInt
    tokens: NonNegativeInt
    temperature: float
    gated_dkd: dict[str, _LossError]
    relational_cka: _Error


class _Manifest(_Strict):
    format: Literal["hidden", "hidden-int8", "sampled"]
    teacher: str
    tokenizer: str
    processor: str
    template: str
    dtype: str
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
    head: int | None
    tail: int | None
    audit_results: _Audit

    @model_validator(mode="after")
    def _sampled(self) -> "_Manifest":
        if self.format == "sampled" and None in (self.temperature, self.head, self.tail):
            raise ValueError("a sampled cache has `temperature`, `head` and `tail`")
        return self


def read_cache_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished cache.

    Raises:
        GraceError: there is none, it is no cache's, or a value is not what it has to be.
    """
    path = folder / MANIFEST
    value = read_json(path)
    if not isinstance(value, dict) or "supervised_tokens" not in value:
        raise GraceError(f"{path}: not the manifest of a teacher cache; check the path")
    try:
        _Manifest.model_validate(value)
    except ValidationError as error:
        raise GraceError(f"{path}: {problem(error)}; run `grace cache finish` again") from None
    return value


def read_sidecar(folder: Path, name: str) -> dict[str, Any] | None:
    """A shard's sidecar, or None where there is none or it is not whole."""
    try:
        value = read_json(folder / f"{name}.json")
        _Sidecar.model_validate(value)
    except (GraceError, ValidationError):
        return None
    return value
