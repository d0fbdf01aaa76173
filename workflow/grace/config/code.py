"""Which files of the package a job depends on: they are inputs of its rule, so that a change of code re-runs it."""

import os
import re
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]

# A job's frozen parameters hold whatever these decide, or they decide no output at all; a change re-runs nothing.
WITHOUT_EFFECT = ("grace.cli", "grace.config", "grace.errors", "grace.progress")


# Parsing the files would cost a dry run a quarter of a second; these lines are all that is looked for.
_IMPORT = re.compile(r"^\s*import (grace[^\n]*)", re.MULTILINE)
_FROM_IMPORT = re.compile(r"^\s*from (grace[\w.]*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)


def code_files(*modules: str) -> list[str]:
    """Every file of the package that `modules` import, directly or not, with the data files beside them.

    Args:
        modules: dotted names, such as `grace.train.commands`.

    Returns:
        Sorted paths relative to the working directory, as Snakemake records them.
    """
    seen: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in seen and not _without_effect(name):
            seen.add(name)
            waiting += _imports(_source(name))
    sources = {_source(name) for name in seen}
    packages = {path.parent for path in sources} - {PACKAGE}
    files = sources | {file for package in packages for file in _data(package)}
    return sorted(os.path.relpath(path) for path in files)


def _without_effect(name: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in WITHOUT_EFFECT)


def _source(name: str) -> Path:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _imports(source: Path) -> tuple[str, ...]:
    """The package's own modules that a file imports, wherever in the file."""
    text = source.read_text()
    own = {name for names in _IMPORT.findall(text) for name in re.findall(r"grace[\w.]*", names)}
    for module, names in _FROM_IMPORT.findall(text):
        own |= {module, *(f"{module}.{name}" for name in re.findall(r"\w+", names))}
    own |= {name.rsplit(".", depth)[0] for name in own for depth in range(name.count("."))}
    return tuple(name for name in own if name != "grace" and _source(name).is_file())


@cache
def _data(package: Path) -> tuple[Path, ...]:
    """What a package holds besides code: images, weights, tables, templates."""
    return tuple(
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".md") and _owner(path.parent) == package
    )


def _owner(folder: Path) -> Path:
    """The nearest folder above that is a package."""
    return folder if (folder / "__init__.py").exists() else _owner(folder.parent)
