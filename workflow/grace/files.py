"""Writing so that a kill leaves either the whole output or none, and knowing what was written.

Every output of the pipeline goes through here: a file or folder is made under a temporary name in the same
directory and renamed when it is whole. A folder carries a `manifest.json` that lists its files with their SHA-256, so
that a consumer depends on one small file and can tell a damaged tree from a good one. It says nothing that may differ
between equal folders; what they were made with stands beside it, in an `environment.json` that nothing depends on.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from grace.environment import environment
from grace.errors import GraceError
from grace.hashes import known_hashes, sha256

MANIFEST = "manifest.json"
ENVIRONMENT = "environment.json"
TIMING = "timing.jsonl"
NOT_CONTENT = (MANIFEST, ENVIRONMENT, TIMING, "image_folders.json")
"""Not listed in a manifest: itself, what made the files, what a training's steps took, and where images outside lie on
this machine."""

_checks: list[Callable[[], None]] = []


@contextmanager
def before_renaming(check: Callable[[], None]) -> Iterator[None]:
    """Within the block nothing is renamed into place unless `check` lets it pass: its exception leaves the target."""
    _checks.append(check)
    try:
        yield
    finally:
        _checks.remove(check)


def _may_be_renamed() -> None:
    for check in _checks:
        check()


def _temporary(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")


def write_failure(error: BaseException) -> str | None:
    """Why a write failed, or None for an error of another sort; torch and safetensors hide the system's own one."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if type(error).__name__ == "SafetensorError":
        return str(error)
    if isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStreamWriter" in str(error)):
        return "the disk is full or not writable"
    return None


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Say which file or folder could not be written, and what to do."""
    try:
        yield
    except Exception as error:
        reason = write_failure(error)
        if reason is None:
            raise
        raise GraceError(f"{target}: could not be written ({reason}); free space and run again") from error


@contextmanager
def whole_file(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `target` when the block ends well, and vanishes when it does not."""
    target = Path(target)
    part = _temporary(target)
    try:
        with _naming(target):
            yield part
            with part.open("rb") as written:
                os.fsync(written.fileno())
            part.chmod(0o644)  # some libraries make files that only their owner can read
            _may_be_renamed()
            os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: str | Path, **about: Any) -> Iterator[Path]:
    """Yield a temporary folder that replaces `target` when the block ends well, with a manifest of its files.

    `about` (JSON-able) is kept in the manifest beside the file list.
    """
    target = Path(target)
    part = _temporary(target)
    part.mkdir()
    try:
        with _naming(target):
            yield part
            write_manifest(part, **about)
            _may_be_renamed()
            _put(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def move_folder(folder: Path, target: Path) -> None:
    """Rename a folder that is whole, with its manifest, over another one; a check that stands in the way raises."""
    _may_be_renamed()
    _put(folder, target)


def _put(part: Path, target: Path) -> None:
    """Rename a folder over another one. A kill in between leaves no `target`; of two writers the last one's stays
    whole.

    The old folder is renamed before it is deleted: killed half-way through, a deletion in place would leave a folder
    that still has its manifest.
    """
    while True:
        old = _temporary(target)
        with suppress(FileNotFoundError):
            target.rename(old)
        try:
            part.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another writer was faster: its folder goes too
                raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


def write_json(target: str | Path, value: Any) -> None:
    """Write JSON with sorted keys and a final newline: equal values make equal bytes."""
    with whole_file(target) as part:
        part.write_text(_text(value))


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or damaged one is a `GraceError`."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise GraceError(f"{path}: no such file; build it first, or check the path") from None
    except OSError as error:
        raise GraceError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise GraceError(f"{path}: not valid JSON ({error}); delete it and build it again") from None


def write_manifest(
    folder: str | Path, files: Mapping[str, Mapping[str, Any]] | None = None, **about: Any
) -> dict[str, Any]:
    """Write `folder/manifest.json`, the one shape that data, caches, models, predictions, tables and figures share.

    Beside it goes `environment.json`, what the files were made with (`grace.environment`). The manifest is written
    last, and not at all where it would say the same.

    Args:
        folder: holds the files.
        files: {path below the folder: {"bytes": size, "sha256": hex digest}} where that is known; None: every file that
            is there.
        about: JSON-able facts that follow from the files and from what they were made of: no times, no machine.

    Returns:
        What the manifest says: `about` and `files`.
    """
    folder = Path(folder)
    manifest = {**about, "files": dict(list_files(folder) if files is None else files)}
    target = folder / MANIFEST
    if not (target.is_file() and (folder / ENVIRONMENT).is_file() and target.read_bytes() == _text(manifest).encode()):
        write_json(folder / ENVIRONMENT, environment())
        write_json(target, manifest)
    return manifest


def list_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file below a folder as its manifest lists it, apart from `NOT_CONTENT`."""
    own = [folder / name for name in NOT_CONTENT]
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in own]
    return {path.relative_to(folder).as_posix(): file_entry(path) for path in paths}


def file_entry(path: Path) -> dict[str, Any]:
    """A file as manifests list it: size and SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def read_manifest(path: str | Path) -> dict[str, Any]:
    """A manifest as `write_manifest` writes it.

    Raises:
        GraceError: no such file, not JSON, or without a list of files.
    """
    manifest = read_json(path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    ):
        raise GraceError(f"{path}: not a manifest that lists its files; build the folder again")
    return manifest


def contents_hash(manifest: str | Path) -> str:
    """SHA-256 of the names and hashes of the files that a manifest lists.

    Equal for equal files, whatever else the manifest says of them.
    """
    files = {name: entry["sha256"] for name, entry in read_manifest(manifest)["files"].items()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def check_manifest(folder: str | Path) -> dict[str, Any]:
    """Hold a folder against its manifest and return the manifest; a `GraceError` names every file that differs."""
    folder = Path(folder)
    manifest = read_manifest(folder / MANIFEST)
    found = known_hashes(folder / name for name in manifest["files"])
    wrong = []
    for name, entry in manifest["files"].items():
        now = found[folder / name]
        if now != entry["sha256"]:
            wrong.append(f"{name} {'is missing' if now is None else 'differs'}")
    if wrong:
        raise GraceError(
            f"{folder}: damaged ({', '.join(wrong)}); take it from DVC (`dvc checkout`), or delete {folder / MANIFEST} "
            "and run Snakemake again to have it built"
        )
    return manifest


def remove_parts(target: str | Path) -> None:
    """Delete what killed writers of `target`, and of files below it, left; for the only writer that there is now."""
    target = Path(target)
    left = [*target.parent.glob(f".{target.name}.*.part")]
    left += [part for part in target.rglob(".*.part")] if target.is_dir() else []
    for part in left:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
