"""What a subcommand's code is: a fingerprint of all that it can reach, which its rule takes as an input.

From the subcommand's function on, every definition that its text names is followed, wherever in a file the import is.
What cannot be told from the text is taken as reached too: all of a module that is handed around as a whole or named in
a string, and whatever a module does when it is imported. Data files of a package belong to each of its modules.
"""

import hashlib
import json
from functools import cached_property
from keyword import iskeyword
from pathlib import Path
from typing import Any

from grace.config.definitions import COMMANDS, PACKAGE, Module, read_package

# A job's frozen parameters hold whatever these decide, or they decide no output at all; a change re-runs nothing.
WITHOUT_EFFECT = ("grace.config", "grace.cluster", "grace.environment", "grace.errors", "grace.progress")

# Of these a job reaches the ones that its parameters choose (`grace.config.job_modules`): a string, a loop over the
# folder and an `if` of one of CHOOSERS do not count.
CHOSEN = (
    "grace.data.prepare", "grace.demo.prepare", "grace.distill.objectives", "grace.evaluate.ask",
    "grace.evaluate.harness_", "grace.models.pair", "grace.train.distillation",
)  # fmt: skip

CHOOSERS = (COMMANDS, "grace.train.commands")


class CodeIndex:
    """The package's code (`package` is the folder of `grace`), read once."""

    def __init__(self, package: Path = PACKAGE) -> None:
        self.package = package

    @cached_property
    def _modules(self) -> dict[str, Module]:
        return read_package(self.package)

    def fingerprint(self, subcommand: str, *chosen: str) -> dict[str, Any]:
        """The code of one subcommand, as JSON-able values.

        Args:
            subcommand: `train`, or `cache-write` for `grace cache write`.
            chosen: dotted names of modules that its parameters choose.

        Returns:
            `subcommand`, `chosen`; `code`: one hash per module over the definitions reached in it; `data`: one per
            data file.

        Raises:
            KeyError: no such subcommand.
        """
        reached = self.reached(subcommand, *chosen)
        code = {}
        for name, wanted in sorted(reached.items()):
            module = self._modules[name]
            said = {one: module.definitions[one].sha256 for one in wanted} | {"": module.on_import.sha256}
            code[name] = _short(json.dumps(said, sort_keys=True).encode())
        data = {name: _short(path.read_bytes()) for name, path in self._data(reached).items()}
        return {"subcommand": subcommand, "chosen": list(chosen), "code": code, "data": data}

    def reached(self, subcommand: str, *chosen: str) -> dict[str, set[str]]:
        """The names of the definitions that a subcommand can reach, by module."""
        return _Walk(self._modules).from_command(subcommand, chosen)

    def _data(self, modules: Any) -> dict[str, Path]:
        """What the packages of `modules` hold besides code: images, weights, tables, templates."""
        packages = {folder for name in modules if (folder := self._folder(name)) != self.package}
        found = {}
        for folder in sorted(packages):
            for path in sorted(folder.rglob("*")):
                if path.suffix in (".py", ".pyc", ".pyi", ".md") or path.name == "py.typed" or not path.is_file():
                    continue
                if self._owner(path.parent) == folder:
                    found[path.relative_to(self.package).as_posix()] = path
        return found

    def _folder(self, name: str) -> Path:
        path = self.package.joinpath(*name.split(".")[1:])
        return path if path.is_dir() else path.parent

    @staticmethod
    def _owner(folder: Path) -> Path:
        """The nearest folder above that is a package."""
        while not (folder / "__init__.py").exists():
            folder = folder.parent
        return folder


class _Walk:
    """From definition to definition."""

    def __init__(self, modules: dict[str, Module]) -> None:
        self.modules = modules
        self.found: dict[str, set[str]] = {}
        self.loaded: set[str] = set()
        self.waiting: list[str] = []

    def from_command(self, subcommand: str, chosen: tuple[str, ...]) -> dict[str, set[str]]:
        function = subcommand.replace("-", "_")
        function += "_" * iskeyword(function)  # `import` is `import_` there
        commands = {name: module for name, module in self.modules.items() if _below(name, (COMMANDS,))}
        found = [name for name, module in commands.items() if function in module.definitions]
        if not found:
            raise KeyError(f"no subcommand `{subcommand}`")
        self.follow(f"{found[0]}.{function}")
        self.waiting += chosen
        while self.waiting:
            self.follow(self.waiting.pop())
        return self.found

    def locate(self, dotted: str) -> tuple[str, str | None]:
        """`grace.files.sha256` -> (`grace.files`, `sha256`), also where a package only passes the name on."""
        while True:
            parts = dotted.split(".")
            length = next(n for n in range(len(parts), -1, -1) if n == 0 or ".".join(parts[:n]) in self.modules)
            name = ".".join(parts[:length])
            if length in (0, len(parts)):
                return name, None
            module, wanted = self.modules[name], parts[length]
            if wanted in module.definitions:
                return name, wanted
            passed_on = module.imports.get(wanted)
            if passed_on is None or passed_on == dotted:
                return name, None
            dotted = ".".join([passed_on, *parts[length + 1 :]])

    def follow(self, reference: str) -> None:
        named, dotted = reference.startswith("'"), reference.removeprefix("'")
        if named and any(_below(dotted, (one,)) or (one.endswith("_") and dotted.startswith(one)) for one in CHOSEN):
            return
        if dotted.endswith("."):
            self.waiting += [name for name in self.modules if name.startswith(dotted)]
            return
        name, wanted = self.locate(dotted)
        commands = _below(name, (COMMANDS,))
        if name in ("", "grace") or _below(name, WITHOUT_EFFECT):
            return
        module = self.modules[name]
        if not commands:
            self.load(name)
        for one in [wanted] if wanted else [] if commands else module.definitions:
            if one not in self.found.setdefault(name, set()):
                self.found[name].add(one)
                references = module.definitions[one].references
                self.waiting += [f"'{r}" if _below(name, CHOOSERS) else r for r in references]

    def load(self, name: str) -> None:
        """What importing a module does: its own loose statements, and those of the modules that it imports."""
        waiting = [name]
        while waiting:
            name = waiting.pop()
            if name in self.loaded or name not in self.modules or _below(name, WITHOUT_EFFECT):
                continue
            self.loaded.add(name)
            module = self.modules[name]
            if module.on_import.sha256:
                self.found.setdefault(name, set())
                self.waiting += module.on_import.references
            waiting += [name.rpartition(".")[0], *(self.locate(dotted)[0] for dotted in module.imports.values())]


def changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Modules and data files that two fingerprints of a subcommand disagree about."""
    before, after = ({**said["code"], **said["data"]} for said in (old, new))
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def _below(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
