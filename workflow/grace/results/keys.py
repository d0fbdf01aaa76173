"""What predictions depend on, as hashes: predictions whose key is still the same are not made again. No pandas here."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from grace.benchmarks.protocols import Spec
from grace.files import MANIFEST, contents_hash, sha256


def model_hash(folder: Path) -> str:
    """`contents_hash` of a model; without a manifest, the same over the files that are there."""
    if (folder / MANIFEST).is_file():
        return contents_hash(folder / MANIFEST)
    files = {path.name: sha256(path) for path in folder.iterdir() if path.is_file()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def answers_key(model: str, settings: dict, harness: dict, made_with: dict) -> str:
    """What answers to equal questions depend on, as one SHA-256 (hex); `made_with`: code,
    and how a processor computes.
    """
    parts = {"model": model, "settings": settings, "harness": harness, "made_with": made_with}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def prediction_key(answers: str, questions: str, limit: int | None, protocol: str, spec: Spec) -> str:
    """What a benchmark's predictions depend on, as one SHA-256 (hex); `answers` is the `answers_key`."""
    how = {name: value for name, value in asdict(spec).items() if name not in ("source", "unverified")}
    parts = {"answers": answers, "questions": questions, "limit": limit, "protocol": protocol, "how": how}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
