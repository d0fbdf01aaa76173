"""`grace merge BRANCH`: a git merge of two branches that both built results, after which nothing is built twice.

Each output is taken from the branch that built it anew, by what `provenance.jsonl` says on the branches and where they
parted. Records and files come from DVC's cache or remote, or from git. What both built anew (tables, metrics) is kept
as it is here; the next `dvc repro` builds it from the merged inputs, and DVC's lock file follows.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from grace.errors import GraceError
from grace.files import MANIFEST, whole_file
from grace.git import GitRefused, git, git_bytes, git_or_none
from grace.provenance.snakemake_records import RECORDS, as_recorded, read_rows, write_rows

Rows = dict[str, dict[str, Any]]
LOCK = "dvc.lock"


def merge(branch: str, repository: Path = Path(".")) -> dict[str, list[str]]:
    """Merge `branch` into the one that is checked out, results included, up to the commit.

    Args:
        branch: any git revision.
        repository: where Snakemake runs.

    Returns:
        By experiment, the outputs that were taken from `branch`.

    Raises:
        GraceError: uncommitted changes, conflicts in files that people write, or outputs that DVC has no copy of.
    """
    top = Path(repository)
    theirs = git(top, "rev-parse", "--verify", f"{branch}^{{commit}}")
    if _merging(top) != theirs:
        changed = git(top, "status", "--porcelain", "--untracked-files=no")
        if changed:
            raise GraceError(f"{top}: uncommitted changes; commit them, then run `grace merge {branch}` again")
        try:
            git(top, "merge", "--no-commit", "--no-ff", branch)
        except GitRefused:
            if _merging(top) != theirs:  # not for conflicts, then
                raise
    conflicts = git(top, "diff", "--name-only", "--diff-filter=U").splitlines()
    written = [name for name in conflicts if name != LOCK and not name.startswith("results/")]
    if written:
        raise GraceError(
            f"{', '.join(written)}: both branches changed the same lines; resolve and `git add` them, then run "
            f"`grace merge {branch}` again"
        )
    ours, base = git(top, "rev-parse", "HEAD"), git(top, "merge-base", "HEAD", theirs)
    taken = {}
    for store in _stores(top, ours, theirs):
        sides = [_rows(top, revision, store) for revision in (base, ours, theirs)]
        if any(sides):
            taken[Path(store).parent.name] = _unite(top, store, theirs, *sides)
    for name in conflicts:
        with suppress(GitRefused):  # a file that this branch has deleted
            git(top, "checkout", "--ours", "--", name)
    _put_light(top, taken, theirs)
    git(top, "add", "-A", "--", "results", *([LOCK] if (top / LOCK).is_file() else []))
    return taken


def _merging(top: Path) -> str | None:
    """The commit that a merge which is under way brings in."""
    return git_or_none(top, "rev-parse", "--verify", "--quiet", "MERGE_HEAD")


def _unite(top: Path, store: str, theirs: str, base: Rows, ours: Rows, other: Rows) -> list[str]:
    """Bring this experiment's outputs together and write their records; returns those taken from the other branch."""
    rows, taken = {}, []
    for output in sorted(ours.keys() | other.keys()):
        mine, its = ours.get(output), other.get(output)
        anew = its is not None and (mine is None or (_key(mine) == _key(base.get(output)) != _key(its)))
        if anew and not (mine is None and output in base):  # dropped here on purpose
            rows[output] = its
            taken.append(output)
        elif mine is not None:
            rows[output] = mine
    for output in taken:
        path = top / output
        if not path.is_file() or not as_recorded(path, rows[output]):
            _bring(top, output, theirs)
    write_rows(top / store, rows)
    return taken


def _key(row: dict[str, Any] | None) -> str | None:
    """What an output is and was made from, without times."""
    if row is None:
        return None
    record = {key: value for key, value in row["record"].items() if key not in ("starttime", "endtime", "log")}
    return json.dumps([row["bytes"], row["sha256"], record], sort_keys=True)


def _bring(top: Path, output: str, revision: str) -> None:
    """An output's files as they are at a revision: all of a folder where it is a manifest."""
    place = str(Path(output).parent) if Path(output).name == MANIFEST else output
    with TemporaryDirectory(dir=top, prefix=".grace-merge-") as temporary:
        files = _fetch(top, place, revision, Path(temporary))
        if not files:
            raise GraceError(f"{output}: not at {revision[:12]}, though its records say so; build that branch again")
        if place != output:
            shutil.rmtree(top / place, ignore_errors=True)
        for file in files:
            (top / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(temporary, file), top / file)


def _fetch(top: Path, place: str, revision: str, folder: Path) -> list[str]:
    """Copy a file or folder as git or DVC has it at a revision into `folder`; its files' paths, none where it is not
    there.

    Raises:
        GraceError: DVC lists it and has no copy.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc_data.index import DataIndexDirError

    system = DVCFileSystem(str(top), rev=revision)
    try:
        files = list(system.find(place)) if system.exists(place) else []
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            system.get_file(file, str(folder / file))
        return files
    except (DvcException, DataIndexDirError, OSError) as error:
        raise GraceError(
            f"{place}: DVC has no copy of it as {revision[:12]} made it; `dvc fetch --all-commits`, or push that "
            "branch's results where it was built, then run this again"
        ) from error


def _put_light(top: Path, taken: dict[str, list[str]], theirs: str) -> None:
    """`git checkout --ours` has put this branch's version over light files that were taken from the other one."""
    tracked = set(git(top, "ls-tree", "-r", "--name-only", theirs, "--", "results").splitlines())
    for output in (output for outputs in taken.values() for output in outputs):
        folder = f"{Path(output).parent.as_posix()}/"
        names = [n for n in tracked if n == output or (Path(output).name == MANIFEST and n.startswith(folder))]
        for name in names:
            with whole_file(top / name) as part:
                part.write_bytes(git_bytes(top, "show", f"{theirs}:{name}"))


def _stores(top: Path, *revisions: str) -> list[str]:
    """Where the records of every experiment would be that has results in git at one of the revisions."""
    listed = (git(top, "ls-tree", "-d", "--name-only", revision, "results/") for revision in revisions)
    return sorted({f"{folder}/{RECORDS}" for folder in "\n".join(listed).splitlines()})


def _rows(top: Path, revision: str, store: str) -> Rows:
    """A revision's records by output; {} where it has none."""
    with TemporaryDirectory() as temporary:
        found = _fetch(top, store, revision, Path(temporary))
        return {row["output"]: row for file in found for row in read_rows(Path(temporary, file))}
