"""One job: the only writer of its outputs, from inputs that are at the end what they were at the start.

Snakemake records what a job's inputs are when it ends. A result that was computed from anything else, because somebody
edited the code, built the data again or changed the configuration meanwhile, must not be renamed into its place: it
would be recorded as made from the new ones. The same holds for a job whose Snakemake was killed and that goes on alone.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from grace.cluster.lock import one_writer
from grace.config.code import CodeIndex, changed
from grace.config.definitions import PACKAGE
from grace.config.job_modules import modules_of_file
from grace.errors import GraceError
from grace.files import MANIFEST, before_renaming, check_manifest, remove_parts
from grace.hashes import sha256


@contextmanager
def job(
    *outputs: Path | None,
    files: Iterable[Path | None] = (),
    folders: Iterable[Path | None] = (),
    subcommand: str | None = None,
    wait_s: float | None = None,
) -> Iterator[None]:
    """Write `outputs` within the block: alone, after whoever writes them now, and only while the inputs stay the same.

    Args:
        outputs: files and folders that are about to be written. What killed writers of them left is removed.
        files: inputs that are compared by content: frozen parameters, a manifest whose reader checks what it lists.
        folders: inputs whose every file is first held against the folder's manifest, where it has one.
        subcommand: whose code it is, such as `cache-write`; an edit of what that can reach counts too.
        wait_s: seconds to wait for who writes an output now; None waits for ever.

    Raises:
        GraceError: another still writes an output after `wait_s`; a folder is damaged; or, at the first rename after
            it, an input was edited, replaced or removed.
    """
    with ExitStack() as held:
        targets = sorted({target for target in outputs if target is not None})
        for target in targets:
            if not target.name:
                raise GraceError(f"{target}: names no file or folder to make; give --out one")
            held.enter_context(one_writer(target, wait_s))
            remove_parts(target)
        manifests = [folder / MANIFEST for folder in folders if folder is not None and (folder / MANIFEST).is_file()]
        inputs = [path for path in files if path is not None and path.is_file()] + manifests
        same = _Unchanged(inputs, _Code(subcommand, inputs) if subcommand else None)
        for manifest in manifests:
            check_manifest(manifest.parent)
        held.enter_context(before_renaming(same.check))
        yield


class _Unchanged:
    """The contents of some files when this was made; a file is read again only when its times or size moved."""

    def __init__(self, inputs: list[Path], code: "_Code | None") -> None:
        self.code = code
        self.states = {path: _state(path) for path in inputs}
        self.hashes = {path: sha256(path) for path in self.states}

    def check(self) -> None:
        """A `GraceError` names what is no longer what it was."""
        differing = []
        for path, state in self.states.items():
            now = _state(path)
            if now == state:
                continue
            if now is None or sha256(path) != self.hashes[path]:
                differing.append(str(path))
            else:
                self.states[path] = now
        kind = "an input of"
        if not differing and self.code:
            differing, kind = self.code.changed(), "the code of"
        if differing:
            names = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
            raise GraceError(
                f"{names}: {kind} this job, edited or replaced since it started, so that its result is not kept; "
                "run Snakemake again"
            )


class _Code:
    """What a job can reach of the package, as it was when this was made; comments are no part of it."""

    def __init__(self, subcommand: str, inputs: list[Path]) -> None:
        self.subcommand = subcommand
        self.chosen = [module for path in inputs if path.name != MANIFEST for module in modules_of_file(path)]
        self.states, self.before = self._states(), self._now()

    def _states(self) -> dict[Path, tuple[int, ...] | None]:
        return {path: _state(path) for path in PACKAGE.rglob("*") if "__pycache__" not in path.parts and path.is_file()}

    def _now(self) -> dict[str, Any]:
        return CodeIndex(PACKAGE).fingerprint(self.subcommand, *self.chosen)

    def changed(self) -> list[str]:
        """Modules and data files that are no longer what they were."""
        states = self._states()
        if states == self.states:
            return []
        try:
            differing = changed(self.before, self._now())
        except (SyntaxError, KeyError) as error:  # in the middle of an edit
            return [str(error)]
        if not differing:
            self.states = states
        return differing


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        about = path.stat()
    except FileNotFoundError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns
