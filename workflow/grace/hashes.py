"""SHA-256 of files: many at a time, and of large ones once per machine for as long as they stay as they are."""

import fcntl
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

REMEMBERED_FROM = 2**24  # bytes; a smaller file is hashed faster than its state is looked up
SETTLED_S = 2.0  # a file changed within a clock's tick of being hashed could change again unnoticed


def sha256(path: str | Path) -> str:
    """The hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: str | Path) -> str:
    """`sha256`, without reading a large file that this machine has hashed and that has not been touched since.

    A file is known by its place, inode, size and both of its times: the one of its inode can't be set back.
    """
    path = Path(path).resolve()
    state = path.stat()
    if state.st_size < REMEMBERED_FROM:
        return sha256(path)
    identity = f"{path}\0{state.st_dev} {state.st_ino} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
    note = _notes() / hashlib.sha256(identity.encode()).hexdigest()
    known = _noted(note)
    if known is not None:
        return known
    with _alone(note):  # other processes that want the same hash wait for it
        known = _noted(note)
        if known is not None:
            return known
        digest = sha256(path)
        if time.time() - state.st_ctime > SETTLED_S:
            with suppress(OSError):  # a home that can't be written costs time alone
                note.parent.mkdir(parents=True, exist_ok=True)
                part = note.with_name(f"{note.name}.{os.getpid()}")
                part.write_text(digest)
                part.replace(note)
        return digest


def _noted(note: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        digest = note.read_text()
        if len(digest) == 64:
            return digest
    return None


@contextmanager
def _alone(note: Path) -> Iterator[None]:
    """One process of this user at a time; without a word all at once where the disk knows no locks."""
    with ExitStack() as held:
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(note.with_name(f"{note.name}.lock").open("w"))
            held.callback(Path(lock.name).unlink, missing_ok=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def known_hashes(paths: Iterable[Path]) -> dict[Path, str | None]:
    """`known_sha256` of each file, several at a time; None where there is none."""
    paths = list(paths)

    def one(path: Path) -> str | None:
        return known_sha256(path) if path.is_file() else None

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(one, paths), strict=True))


def cache_folder() -> Path:
    """Where this user keeps what can be worked out again; for one without a home a place where nothing can be kept."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder if os.path.isabs(folder) else os.devnull, "grace")


def _notes() -> Path:
    return cache_folder() / "hashes"
