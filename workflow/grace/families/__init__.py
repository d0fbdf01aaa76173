"""The families of models, one file each. Importing this costs no torch: a dry run reads the names."""

import importlib.util
from pathlib import Path
from typing import Any

from grace.errors import GraceError
from grace.families import llava, qwen2_5_vl, qwen2_vl, qwen3_vl
from grace.families.base import Family
from grace.families.files import read_config, read_object

__all__ = ["FAMILIES", "Family", "check_family", "family_named", "family_of", "family_of_folder", "lacking_package"]

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (llava, qwen2_vl, qwen2_5_vl, qwen3_vl)}

_READ_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # packages and their modules


def family_named(name: str | None, where: str | Path) -> Family:
    """The family of a `model_type`; a `GraceError` lists those there are."""
    if name not in FAMILIES:
        raise GraceError(f"{where}: model_type is {name!r}; this pipeline knows {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(thing: Any) -> Family:
    """The family of a model or a processor in memory."""
    config = getattr(thing, "config", None)
    if config is not None:
        return family_named(config.model_type, config.name_or_path or "the model")
    name = type(thing).__name__
    for family in FAMILIES.values():
        if family.processor == name:
            return family
    raise GraceError(f"no family has the processor {name}; this pipeline knows {', '.join(FAMILIES)}")


def family_of_folder(folder: Path) -> Family:
    """The family of a model's or a processor's folder: by config.json,
    or by the processor's class where there is none.
    """
    if (folder / "config.json").is_file():
        return family_named(read_config(folder).get("model_type"), folder / "config.json")
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        known = read_object(folder / name).get("processor_class") if (folder / name).is_file() else None
        for family in FAMILIES.values():
            if family.processor == known:
                return family
    raise GraceError(
        f"{folder}: no config.json and no processor of a known family ({', '.join(FAMILIES)}); build or copy it again"
    )


def check_family(folder: str | Path, family: str) -> None:
    """Hold the configuration's `family` against config.json."""
    found = family_of_folder(Path(folder)).name
    if found != family:
        raise GraceError(f"{folder}: config.json says {found} and the configuration family: {family}; correct either")


def lacking_package(folder: Path) -> str | None:
    """One sentence where a folder's tokenizer can only be read with a package that is not installed."""
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        return None
    missing = [name for name, module in _READ_SENTENCEPIECE.items() if not _installed(module)]
    if not missing:
        return None
    return (
        f"{folder}: tokenizer.json is not there, and reading tokenizer.model needs {' and '.join(missing)}; "
        f"pip install {' '.join(missing)}"
    )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it lies in
        return False
