"""One job: the only writer of its outputs, from inputs that are at the end what they were at the start.

Snakemake records what a job's inputs are when it ends. A result that was computed from anything else, because somebody
edited the code, built the data again or changed the configuration meanwhile, must not be renamed into its place: it
would be recorded as made from the new ones. The same holds for a job whose Snakemake was killed and that goes on alone.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from grace.cluster.lock import one_writer
from grace.config.code import code_files
from grace.errors import GraceError
from grace.files import MANIFEST, before_renaming, check_manifest, remove_parts
from grace.hashes import sha256


@contextmanager
def job(
    *outputs: Path | None,
    files: Iterable[Path | None] = (),
    folders: Iterable[Path | None] = (),
    module: str | None = None,
) -> Iterator[None]:
    """Write `outputs` within the block: alone, after whoever writes them now, and only while the inputs stay the same.

    Args:
        outputs: files and folders that are about to be written. What killed writers of them left is removed.
        files: inputs that are compared by content: frozen parameters, a manifest whose reader checks what it lists.
        folders: inputs whose every file is first held against the folder's manifest, where it has one.
        module: where the job's code begins, such as `grace.train.commands`; what it imports counts too.

    Raises:
        GraceError: a folder is damaged, or, at the first rename after it, an input was edited, replaced or removed.
    """
    with ExitStack() as held:
        targets = sorted({target for target in outputs if target is not None})
        for target in targets:
            held.enter_context(one_writer(target))
            remove_parts(target)
        manifests = [folder / MANIFEST for folder in folders if folder is not None and (folder / MANIFEST).is_file()]
        inputs = [path for path in files if path is not None and path.is_file()] + manifests
        code = [Path(name).absolute() for name in code_files(module)] if module else []
        same = _Unchanged(inputs, code)
        for manifest in manifests:
            check_manifest(manifest.parent)
        held.enter_context(before_renaming(same.check))
        yield


class _Unchanged:
    """The contents of some files when this was made; a file is read again only when its times or size moved."""

    def __init__(self, inputs: list[Path], code: list[Path]) -> None:
        self.code = set(code)
        self.states = {path: _state(path) for path in [*inputs, *code]}
        self.hashes = {path: sha256(path) for path in self.states}

    def check(self) -> None:
        """A `GraceError` names what is no longer what it was."""
        changed = []
        for path, state in self.states.items():
            now = _state(path)
            if now == state:
                continue
            if now is None or sha256(path) != self.hashes[path]:
                changed.append(path)
            else:
                self.states[path] = now
        if changed:
            names = ", ".join(path.name if path in self.code else str(path) for path in changed[:3])
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            kind = "the code of" if self.code >= set(changed) else "an input of"
            raise GraceError(
                f"{names}{more}: {kind} this job, edited or replaced since it started, so that its result is not kept; "
                "run Snakemake again"
            )


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        about = path.stat()
    except FileNotFoundError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns
