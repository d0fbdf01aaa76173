"""What a pretrained model of the user's own is made of: its files' hashes decide whether it is fetched again."""

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from grace.errors import GraceError
from grace.hashes import known_hashes

SIDECAR = "qat_quantized_weights.bin"  # of a released GRACE checkpoint: its codes' scales
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", SIDECAR]


def source_files(model: Path) -> Iterator[tuple[str, Path]]:
    """What of a local model folder is brought: its name there, and the file that a link leads to.

    A snapshot in the hub's cache is a folder of links into another one.

    Raises:
        GraceError: a link leads nowhere, or to what is no file.
    """
    for path in sorted(model.rglob("*")):
        name = path.relative_to(model).as_posix()
        if path.is_dir() or not any(fnmatch(path.name, pattern) for pattern in PATTERNS):
            continue
        if not path.exists():
            raise GraceError(f"{path}: a link to {path.readlink()}, which is not there; download the model again")
        if not path.is_file():
            raise GraceError(f"{path}: a pipe or a device, and no file; download the model again")
        yield name, path.resolve()


def source_hashes(model: str | Path) -> dict[str, str | None]:
    """SHA-256 of every file that `fetch` would bring from a local folder, by name."""
    files = dict(source_files(Path(model)))
    hashes = known_hashes(files.values())
    return {name: hashes[path] for name, path in files.items()}
