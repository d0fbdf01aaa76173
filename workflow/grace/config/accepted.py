"""Changes of code that were accepted (`grace accept`), as they leave every result as it is: they re-run nothing.

`results/{experiment}/config/code/{subcommand}.json` holds the code that results were made with. An accepted change is a
line of `accepted.jsonl` beside it: the frozen code, the code that is accepted as equal to it, who, when and why. From
then on the accepted code is frozen as the older one, which the outputs know.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from grace.errors import GraceError, problem, reason
from grace.files import read_json


class _Fingerprint(BaseModel):
    """What `CodeIndex.fingerprint` returns."""

    model_config = ConfigDict(strict=True)

    subcommand: str
    chosen: list[str]
    code: dict[str, str]
    data: dict[str, str]


class _Accepted(BaseModel):
    model_config = ConfigDict(strict=True)

    subcommand: str
    frozen: _Fingerprint
    accepted: _Fingerprint
    changed: list[str]
    by: str
    at: str
    reason: str


def read_fingerprint(path: Path) -> dict[str, Any]:
    """The frozen code of a subcommand; a `GraceError` where the file is missing or damaged."""
    value = read_json(path)
    try:
        _Fingerprint.model_validate(value)
    except ValidationError as error:
        raise GraceError(
            f"{path}: damaged ({problem(error)}); take it from git again: git checkout -- {path}"
        ) from None
    return value


def code_folder(results: str | Path) -> Path:
    """Where an experiment's frozen code lies."""
    return Path(results, "config", "code")


def accepted_file(results: str | Path) -> Path:
    """Where accepted changes are written down, one JSON object a line."""
    return code_folder(results) / "accepted.jsonl"


def accepted(results: str | Path) -> list[dict[str, Any]]:
    """Every accepted change, oldest first: `subcommand`, `frozen`, `accepted`, `changed`, `by`, `at`, `reason`.

    Raises:
        GraceError: the file is damaged.
    """
    path = accepted_file(results)
    if not path.is_file():
        return []
    try:
        changes = [json.loads(line) for line in path.read_text().splitlines() if line]
        for change in changes:
            _Accepted.model_validate(change)
    except ValueError as error:
        said = problem(error) if isinstance(error, ValidationError) else reason(error)
        raise GraceError(f"{path}: damaged ({said}); take it from git again: git checkout -- {path}") from None
    return changes


def resolved(results: str | Path, code: dict[str, Any]) -> dict[str, Any]:
    """The frozen code that this one was accepted as equal to; itself where it was not."""
    for change in reversed(accepted(results)):
        if change["accepted"] == code:
            return change["frozen"]
    return code
