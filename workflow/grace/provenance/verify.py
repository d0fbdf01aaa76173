"""`grace verify RESULTS`: is a results tree what its manifests and records say, file by file?

A folder is checked against its manifest.json, a single file against `provenance.jsonl`, which `dvc repro` writes. A
file that a killed job left half-written, and one that nobody lists, are findings too.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from grace.errors import GraceError
from grace.files import ENVIRONMENT, MANIFEST, TIMING, read_manifest, sha256
from grace.provenance.chain import Results

_UNRECORDED = ("logs", ".checkpoints", ".trials")  # what no manifest and no record speaks of
_IGNORED = (".gitignore", "provenance.jsonl", "accepted.jsonl", ENVIRONMENT, TIMING)


@dataclass
class Verified:
    """What `verify` found: paths relative to where Snakemake runs."""

    files: int = 0
    size: int = 0
    manifests: int = 0
    wrong: list[str] = field(default_factory=list)
    unrecorded: list[str] = field(default_factory=list)  # single outputs while provenance.jsonl does not exist


def verify(results: str | Path) -> Verified:
    """Re-hash every file below `results` and print how many are right.

    Args:
        results: results/{experiment}, or any folder below it.

    Raises:
        GraceError: one line per file that differs, is missing or is listed nowhere.
    """
    found = check(results)
    if found.wrong:
        raise GraceError(
            f"{results}: {len(found.wrong)} of {found.files + len(found.wrong)} files are not as recorded; take them "
            "from DVC (`dvc checkout --force`, `dvc pull`), or delete them and build again\n"
            + "\n".join(f"  {line}" for line in found.wrong)
        )
    print(f"{results}: {found.files} files in {found.manifests} folders are whole, {found.size / 2**20:,.1f} MiB")
    if found.unrecorded:
        print(
            f"{len(found.unrecorded)} single files have no record to be checked against; "
            f"`grace records save {Results(results).name(Results(results).folder)}` makes one"
        )
    return found


def check(results: str | Path) -> Verified:
    """`verify` without words: what is right and what is not."""
    top = Path(results).absolute()
    place = Results(top)
    if not top.is_dir():
        raise GraceError(f"{results}: no such folder; give results/EXPERIMENT or a folder below it")
    found = Verified()
    expected, folders = _expected(place, top)
    found.manifests = len(folders)
    present = {place.name(path): path for path in _files(place, top)}
    _compare(found, expected, present)
    recorded = bool(place.rows)
    for name in sorted(present.keys() - expected.keys()):
        path = present[name]
        if name.endswith(".part") or ".part/" in name:
            found.wrong.append(f"{name}: left by a killed job; delete it")
        elif path.name == MANIFEST and not recorded:
            found.files += 1
        elif any(path.is_relative_to(folder) for folder in folders) or recorded:
            found.wrong.append(f"{name}: listed nowhere")
        else:
            found.unrecorded.append(name)
    if not expected and not found.unrecorded:
        raise GraceError(f"{results}: holds no results; build the experiment, or `dvc pull` it")
    return found


def _expected(place: Results, top: Path) -> tuple[dict[str, tuple[int | None, str | None, str]], list[Path]]:
    """(bytes, SHA-256, who says so) of every file that a manifest or a record lists, and the folders with manifests."""
    expected: dict[str, tuple[int | None, str | None, str]] = {}
    for output, row in place.rows.items():
        if (place.root / output).is_relative_to(top):
            expected[output] = (row["bytes"], row["sha256"], "provenance.jsonl")
    folders = []
    for manifest in sorted(top.rglob(MANIFEST)):
        name = place.name(manifest.parent)
        if set(Path(name).parts) & set(_UNRECORDED):
            continue
        folders.append(manifest.parent)
        for file, entry in read_manifest(manifest)["files"].items():
            expected[f"{name}/{file}"] = (entry.get("bytes"), entry["sha256"], f"{name}/{MANIFEST}")
    return expected, folders


def _files(place: Results, top: Path) -> list[Path]:
    paths = []
    for folder, below, names in os.walk(top):
        relative = Path(folder).relative_to(place.folder)
        below[:] = [name for name in below if not (relative == Path() and name in _UNRECORDED)]
        paths += [Path(folder, name) for name in names if name not in _IGNORED]
    return paths


def _compare(
    found: Verified, expected: dict[str, tuple[int | None, str | None, str]], present: dict[str, Path]
) -> None:
    here = [name for name in sorted(expected) if name in present]
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda name: sha256(present[name]) if expected[name][1] else None, here)
        for name, now in zip(here, hashes, strict=True):
            size, wanted, source = expected[name]
            actual = present[name].stat().st_size
            if now != wanted or (size is not None and actual != size):
                found.wrong.append(f"{name}: differs from {source}")
            else:
                found.files += 1
                found.size += actual
    found.wrong += [
        f"{name}: missing, listed in {expected[name][2]}" for name in sorted(expected) if name not in present
    ]
