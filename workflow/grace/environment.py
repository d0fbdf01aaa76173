"""What a job ran on: the code's revision, the packages that decide its numbers, the machine. No torch in here."""

import hashlib
import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from grace.arithmetic import settled
from grace.git import git_or_none

PACKAGE = Path(__file__).resolve().parent

# whatever a tensor, an image, a token or a score passes through
PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "compressed-tensors", "numpy", "pillow", "pyarrow",
    "pandas", "scipy", "datasets", "lm-eval", "lmms-eval", "snakemake", "dvc",
)  # fmt: skip


@cache
def environment() -> dict[str, Any]:
    """What made an output, as JSON-able values: equal on the same machine, packages and code, and without times.

    Returns:
        code: `revision` (git's commit, None outside a repository), `modified` (whether the package's files differ from
            it) and `sha256` over the package's Python files.
        packages: versions of those of `PACKAGES` that are installed.
        hardware: processor, cores, memory in GiB, GPUs by name with their driver.
        python, system: versions; arithmetic: the variables that choose a CPU's instructions and threads.
    """
    return {
        "code": {**_git(), "sha256": code_sha256()},
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "hardware": _hardware(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "arithmetic": settled(),
    }


def code_sha256(package: Path = PACKAGE) -> str:
    """One hash of the package's Python files and their names."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _git() -> dict[str, Any]:
    revision = git_or_none(PACKAGE, "rev-parse", "HEAD")
    modified = bool(git_or_none(PACKAGE, "status", "--porcelain", "--", ".")) if revision else None
    return {"revision": revision, "modified": modified}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    gpus = [_field(path, "Model") for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    about: dict[str, Any] = {
        "processor": _field(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages * size / 2**30),
        "gpus": gpus,
    }
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        about |= {"visible": visible, "driver": _line(Path("/proc/driver/nvidia/version"))}
    return about


def _field(path: Path, name: str) -> str | None:
    """The value of the first `name : value` line of a file that the kernel writes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def _line(path: Path) -> str | None:
    try:
        return path.read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
