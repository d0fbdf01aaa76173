"""The results of a git revision, as a folder: light files from git, heavy ones from DVC's cache or remote."""

import io
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from grace.errors import GraceError, reason
from grace.files import ENVIRONMENT, MANIFEST
from grace.git import GitRefused, git, git_bytes

# what a comparison reads; checkpoints, caches and packed weights are compared through their manifests
LIGHT = (
    "config/*.json",
    "*/manifest.json",
    "*/environment.json",
    "*/predictions/*.parquet",
    "bench/*.csv",
    "data/benchmarks/*.parquet",
    "metrics.json",
)


@contextmanager
def results_of(where: str | Path, experiment: str, repository: Path) -> Iterator[Path]:
    """Yield a results folder: `where` itself if it is one, else `results/{experiment}` of the git revision `where`.

    A `GraceError` where it is neither, or where DVC has no copy of the revision's predictions.
    """
    if Path(where).is_dir():
        folder = Path(where)
        yield folder / "results" / experiment if (folder / "results" / experiment).is_dir() else folder
        return
    commit = resolve(repository, str(where))
    with TemporaryDirectory(prefix="grace-diff-") as temporary:
        target = Path(temporary) / experiment
        top = Path(git(repository, "rev-parse", "--show-toplevel"))
        below = f"results/{experiment}"
        if git(top, "ls-tree", commit, "--", ".dvc/config"):
            _from_dvc(top, str(where), commit, below, target)
        else:
            _from_git(top, commit, below, target)
        if not any(target.rglob("*")):
            raise GraceError(f"{where}: this revision has no {below}; give --experiment, or a revision with results")
        yield target


def resolve(repository: Path, revision: str) -> str:
    """The commit hash of a revision; a `GraceError` where there is none."""
    try:
        return git(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    except GitRefused:
        raise GraceError(
            f"{revision}: neither a results folder nor a git revision of {repository}; `git log` lists revisions"
        ) from None


def _from_git(top: Path, commit: str, below: str, target: Path) -> None:
    if not git(top, "ls-tree", commit, "--", below):
        return
    with tarfile.open(fileobj=io.BytesIO(git_bytes(top, "archive", commit, "--", below))) as archive:
        for member in archive.getmembers():
            name = member.name.removeprefix(f"{below}/")
            content = archive.extractfile(member) if member.isfile() and _light(name) else None
            if content is not None:
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())


def _from_dvc(top: Path, revision: str, commit: str, below: str, target: Path) -> None:
    """What DVC and git have of the revision; without the images of flipped questions, or times,
    that were never pushed.
    """
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc_data.index import DataIndexDirError

    missing = (DvcException, DataIndexDirError, OSError)  # a folder of which there is no list, or a file
    system = DVCFileSystem(str(top), rev=commit)
    try:
        for part in system.ls(below, detail=False) if system.exists(below) else []:
            spared = missing if part in (f"{below}/data", f"{below}/bench") else ()
            with suppress(*spared):
                for path in system.find(part):
                    name = path.removeprefix(f"{below}/")
                    if _light(name):
                        (target / name).parent.mkdir(parents=True, exist_ok=True)
                        with suppress(*spared):
                            system.get_file(path, str(target / name))
            if part == f"{below}/bench" and not list(target.glob("bench/*.csv")):
                print(f"{revision}: DVC has no copy of {part}; its speeds are not compared", file=sys.stderr)
    except missing as error:
        if not system.repo.config["remote"].keys() - {"auto-generated-upstream"}:  # DVC's own name for this folder
            raise GraceError(
                f"{revision}: DVC has no copy of its results, and no remote is set; `dvc remote add -d NAME URL` says "
                "where they were pushed to"
            ) from error
        raise GraceError(
            f"{revision}: DVC has no copy of its results ({reason(error)}); run `dvc fetch` at that revision, or "
            "`dvc fetch --all-commits`"
        ) from error


def _light(name: str) -> bool:
    return name in (MANIFEST, ENVIRONMENT) or any(fnmatch(name, pattern) for pattern in LIGHT)
