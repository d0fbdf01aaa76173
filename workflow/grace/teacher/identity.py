"""What a cache is a cache of: the facts that must agree before its records may stand in for the teacher."""

import hashlib
import json
from pathlib import Path
from typing import Any

from grace.config.job_parameters import CacheRun
from grace.errors import GraceError
from grace.families.files import read_object
from grace.files import MANIFEST, contents_hash, read_json, sha256

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_TEMPLATE = "chat_template"
_NOT_MEANING = {_TEMPLATE, "transformers_version", "name_or_path", "_name_or_path"}

WORDS = {
    "teacher": "another teacher",
    "dtype": "a teacher in another dtype",
    "tokenizer": "another tokenizer",
    "processor": "another image processor",
    "template": "another chat template",
    "data": "other training data",
    "format": "another format",
    "temperature": "another temperature",
    "vocabulary": "another vocabulary",
    "audit": "another share of audited records",
    "seed": "another seed",
}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _contents(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The named files' contents without the template and without what a library writes about itself."""
    found: dict[str, Any] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix == ".json":
            value = read_json(path)
            if isinstance(value, dict):
                value = {key: part for key, part in value.items() if key not in _NOT_MEANING}
            found[name] = value
        else:
            found[name] = sha256(path)
    return found


def _template(folder: Path) -> list[str]:
    """The chat template, wherever this version of the library keeps it."""
    texts = set()
    if (folder / f"{_TEMPLATE}.jinja").is_file():
        texts.add((folder / f"{_TEMPLATE}.jinja").read_text(errors="replace"))
    for name in (f"{_TEMPLATE}.json", "tokenizer_config.json", "processor_config.json"):
        if (folder / name).is_file():
            kept = read_object(folder / name).get(_TEMPLATE)
            if kept is not None:
                texts.add(kept if isinstance(kept, str) else json.dumps(kept, sort_keys=True))
    return sorted(texts)


def processor_pins(folder: str | Path) -> dict[str, str]:
    """Hashes of a processor folder: `tokenizer`, `processor` (images) and `template` (chat)."""
    folder = Path(folder)
    tokenizer = _contents(folder, _TOKENIZER)
    if not tokenizer:
        raise GraceError(f"{folder}: holds no tokenizer; build the data again")
    return {
        "tokenizer": _digest(tokenizer),
        "processor": _digest(_contents(folder, _PROCESSOR)),
        "template": _digest(_template(folder)),
    }


def expected(
    data: str | Path, temperature: float | None = None, teacher: str | Path | None = None
) -> dict[str, str | float]:
    """What to pass as `TeacherCache.open(..., expect=...)`: the pins of a data folder and, if given, of T and a
    teacher.

    A reader compares T with a `sampled` cache only: the other formats serve every temperature.
    """
    pins: dict[str, str | float] = dict(processor_pins(Path(data) / "processor"))
    if temperature is not None:
        pins["temperature"] = temperature
    if teacher is not None:
        pins["teacher"] = _folder_hash(teacher)
    return pins


def _folder_hash(folder: str | Path) -> str:
    """The hash of everything in a folder, by its manifest."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise GraceError(f"{path}: no such file; build {folder} first, or check the path")
    return contents_hash(path)


def run_pins(run: CacheRun, teacher: Path, data: Path) -> dict[str, str | float | int | None]:
    """Everything that decides what the records of a shard hold."""
    return {
        **processor_pins(data / "processor"),
        "teacher": _folder_hash(teacher),
        "data": _folder_hash(data),
        "dtype": run.compute_dtype,
        "format": run.cache.format,
        "temperature": run.temperature if run.cache.format == "sampled" else None,
        "audit": run.cache.audit,
        "seed": run.seed,
    }


def short(value: Any) -> str:
    """A pin as a reader sees it: a hash by its first characters."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """One phrase for every pin of `wanted` that `found` does not share."""
    phrases = []
    for name, value in wanted.items():
        if name == "temperature" and found.get("format") != "sampled":
            continue
        if found.get(name) != value:
            phrases.append(f"{WORDS[name]} ({name}: {short(found.get(name))}, expected {short(value)})")
    return phrases
