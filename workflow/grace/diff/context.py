"""What stands around the scores of two versions: settings, environment, artifacts, speed, and the flipped questions."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow.parquet as pq

from grace.files import ENVIRONMENT, MANIFEST, read_json, read_manifest
from grace.nested import flatten
from grace.results.read import read_bench

# what tells measurements apart, and what is compared: per file of bench/
_MEASURED: dict[Literal["kernel", "decode"], tuple[list[str], list[str]]] = {
    "kernel": (["backend", "device", "dtype", "shape", "m", "group_size"], ["microseconds", "speedup"]),
    "decode": (
        ["model", "precision", "device", "batch", "cache"],
        ["prefill_ms", "tokens_per_second", "weight_mib", "peak_mib"],
    ),
}
_SMALLER_IS_BETTER = {"microseconds", "prefill_ms", "weight_mib", "peak_mib"}
_NOT_ENVIRONMENT = {"files", "benchmarks", "run", "model", "source", "identity"}
MISSING = "(not set)"


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = list(dict.fromkeys([*a, *b]))
    return [
        (key, a.get(key, MISSING), b.get(key, MISSING)) for key in keys if a.get(key, MISSING) != b.get(key, MISSING)
    ]


def settings(a: Path, b: Path) -> list[tuple[str, Any, Any]]:
    """Keys of config/experiment.json that differ, with both values."""
    sides = []
    for side in (a, b):
        path = side / "config" / "experiment.json"
        sides.append(dict(flatten(read_json(path), lists=True)) if path.is_file() else {})
    return _differences(*sides)


def environment(a: Path, b: Path) -> list[tuple[str, Any, Any]]:
    """What the manifests say besides files (harness, packages, hardware, code), where that differs; each fact once."""
    found: dict[tuple[str, str, str], tuple[str, Any, Any]] = {}
    for name in sorted(_manifests(a).keys() & _manifests(b).keys()):
        sides = []
        known = all((side / name / ENVIRONMENT).is_file() for side in (a, b))  # git has those of no folder
        for side in (a, b):
            about = {"environment": read_json(side / name / ENVIRONMENT)} if known else {}
            about |= read_manifest(side / name / MANIFEST)
            kept = {key: value for key, value in about.items() if key not in _NOT_ENVIRONMENT}
            sides.append(dict(flatten(kept, lists=True)))
        for key, old, new in _differences(*sides):
            found.setdefault((key, json.dumps(old, default=str), json.dumps(new, default=str)), (key, old, new))
    return list(found.values())


def _manifests(folder: Path) -> dict[str, Path]:
    return {path.parent.relative_to(folder).as_posix(): path for path in folder.glob(f"**/{MANIFEST}")}


def artifacts(a: Path, b: Path) -> list[tuple[str, str]]:
    """Folders whose files differ by hash, with the names of the files; folders that only one version has.

    `speed/` is left out: no two runs take the same time, and `speed` compares the times themselves.
    """
    sides = [_manifests(side) for side in (a, b)]
    found = []
    for name in sorted((sides[0].keys() | sides[1].keys()) - {"speed"}):
        if name not in sides[0] or name not in sides[1]:
            found.append((name, "only in A" if name in sides[0] else "only in B"))
            continue
        old, new = (
            {file: about["sha256"] for file, about in read_manifest(side[name])["files"].items()} for side in sides
        )
        differing = [file for file in sorted(old.keys() | new.keys()) if old.get(file) != new.get(file)]
        if differing:
            shown = ", ".join(differing[:4]) + (f" and {len(differing) - 4} more" if len(differing) > 4 else "")
            found.append((name, f"{len(differing)} of {len(old.keys() | new.keys())} files differ: {shown}"))
    return found


def speed(a: Path, b: Path) -> pd.DataFrame | None:
    """Ratios B / A of every measurement that both have: what, measure, A, B, ratio, better (or None:
    nothing shared).
    """
    rows = []
    for name, (keys, measures) in _MEASURED.items():
        old_frame, new_frame = (read_bench(side, name) for side in (a, b))
        if old_frame is None or new_frame is None:
            continue
        keys = [key for key in keys if key in old_frame and key in new_frame]
        merged = old_frame.merge(new_frame, on=keys, suffixes=(" A", " B"))
        for record in merged.to_dict("records"):
            what = f"{name}: " + ", ".join(f"{key} {record[key]}" for key in keys)
            for measure in measures:
                old, new = record.get(f"{measure} A"), record.get(f"{measure} B")
                if old and new and pd.notna(old) and pd.notna(new):
                    ratio = new / old
                    better = ratio < 1 if measure in _SMALLER_IS_BETTER else ratio > 1
                    rows.append((what, measure, old, new, ratio, better))
    return pd.DataFrame(rows, columns=["what", "measure", "A", "B", "ratio", "better"]) if rows else None


def questions(b: Path, a: Path, flips: Iterable) -> dict[tuple[str, str], tuple[str, bytes]]:
    """Question and image of every flipped sample, from B's benchmark files or else A's; {} where neither is there."""
    wanted: dict[str, set[str]] = {}
    for flip in flips:
        wanted.setdefault(flip.benchmark, set()).add(flip.sample)
    found = {}
    for benchmark, samples in wanted.items():
        for side in (b, a):
            path = side / "data" / "benchmarks" / f"{benchmark}.parquet"
            if path.is_file():
                table = pq.read_table(
                    path, columns=["id", "question", "image"], filters=[("id", "in", sorted(samples))]
                )
                for record in table.to_pylist():
                    found[benchmark, record["id"]] = (record["question"], record["image"]["bytes"])
                break
    return found
