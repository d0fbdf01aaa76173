"""Which text-only tasks there are to run, where their scores go and what these depend on. No pandas here."""

import hashlib
import importlib.metadata
import json
from pathlib import Path

import yaml
from pydantic import BaseModel, Field, ValidationError

from grace.errors import GraceError, reason
from grace.files import sha256


def text_file(out: Path, task: str) -> Path:
    """Where the scores of a task go."""
    return out / "language" / f"{Path(task).stem}.parquet"


def text_key(model: str, task: str, limit: int | None, made_with: dict) -> str:
    """What a task's scores depend on, as one SHA-256 (hex): the model, a file of one's own with its local data, and
    `made_with`, the code and how a processor computes.
    """
    parts = {"model": model, "task": task, "limit": limit, "made_with": made_with}
    parts["lm-eval"] = importlib.metadata.version("lm_eval")
    if is_file(task):
        parts |= {str(path): sha256(path) for path in (Path(task), *_data_files(task))}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def is_file(task: str) -> bool:
    """Whether a task is a YAML file of one's own, and no name of lm-eval's."""
    return task.endswith((".yaml", ".yml"))


class _Data(BaseModel):
    data_files: str | list[str] | dict[str, str | list[str]] = []


class _TaskFile(BaseModel):
    """What is read here of a task file; the rest is lm-eval's."""

    task: str = Field(min_length=1)
    dataset_kwargs: _Data | None = None


def content_of(task: str) -> _TaskFile:
    """A task file's own keys; lm-eval's `!function` tags are left unread.

    Raises:
        GraceError: the file is missing, is no YAML, or a key is not what lm-eval's format has there.
    """

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        return _TaskFile.model_validate(yaml.load(Path(task).read_text(encoding="utf-8"), Loader))
    except FileNotFoundError:
        raise GraceError(f"evaluation.language: {task}: no such file; give lm-eval's name or a YAML file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        raise GraceError(f"{task}: `{where}` is not as lm-eval's format asks ({first['msg']}); mend it") from None
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise GraceError(f"{task}: not valid YAML ({reason(error)}); mend it") from error


def _data_files(task: str) -> list[Path]:
    """The local files that a task reads, from where the job runs; a `GraceError` names one that is missing."""
    named = (content_of(task).dataset_kwargs or _Data()).data_files
    listed = named.values() if isinstance(named, dict) else [named]
    paths = [Path(path) for entry in listed for path in ([entry] if isinstance(entry, str) else entry)]
    for path in paths:
        try:
            there = path.is_file()
        except (OSError, ValueError):  # a name that no file can have
            there = False
        if not there:
            raise GraceError(f"{task}: {str(path)[:100]}: no such file; mend dataset_kwargs.data_files")
    return paths
