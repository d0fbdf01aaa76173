"""git, asked about the repository that a folder stands in."""

import subprocess
from pathlib import Path

from grace.errors import GraceError, reason

PATIENCE_S = 30  # for a question that a job can do without


class GitRefused(GraceError):
    """git ran and ended with an error."""


def git(folder: str | Path, *words: str) -> str:
    """What `git WORDS` prints when run in `folder`, without the white space around it.

    Raises:
        GitRefused: git ended with an error; what it said is part of the sentence.
        GraceError: git could not be started.
    """
    return git_bytes(folder, *words).decode(errors="replace").strip()


def git_bytes(folder: str | Path, *words: str) -> bytes:
    """`git`, byte by byte: a file's or an archive's contents. Raises what `git` does."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True)
    except OSError as error:
        raise GraceError(f"git does not run ({reason(error)}); install it, and have it on PATH") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).decode(errors="replace")
        raise GitRefused(f"{folder}: `git {' '.join(words)}` failed ({said})")
    return done.stdout


def git_or_none(folder: str | Path, *words: str) -> str | None:
    """`git`, but None where there is no git or no repository, or where git refuses or takes longer than PATIENCE_S."""
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
