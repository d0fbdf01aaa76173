"""The package's code as definitions: what each says, as Python reads it, and which others its text names.

A definition is a function, class or variable at the top level of a module. Its hash knows no comments, docstrings,
line breaks and quotes. A reference is a dotted name, `grace.files.sha256`; one that starts with `'` comes from a string
(a module that is imported by name), and one that ends with `.` from the start of such a string.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from grace.files import whole_file
from grace.hashes import cache_folder

PACKAGE = Path(__file__).resolve().parents[1]
COMMANDS = "grace.cli"  # functions there only pass their parameters on; flags and help texts decide nothing

# Decorators that only wrap what they stand on. Any other may register it: that is something done on import.
_WRAPPERS = {
    "cache", "contextmanager", "custom_op", "dataclass", "inference_mode", "jit", "lru_cache", "no_grad", "overload",
    "runtime_checkable", "total_ordering",
}  # fmt: skip
_NAMED_MODULE = re.compile(r"grace(\.\w+)+\.?")
_HERE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


class Code(NamedTuple):
    """A definition, or what a module does on import: the hash of its text and its references."""

    sha256: str
    references: list[str]


class Module(NamedTuple):
    """One file.

    Attributes:
        definitions: by name.
        imports: what a name at its top level is imported from, as a dotted name.
        on_import: statements that are neither definitions nor imports, such as a call that registers something.
    """

    definitions: dict[str, Code]
    imports: dict[str, str]
    on_import: Code


def read_package(package: Path = PACKAGE) -> dict[str, Module]:
    """Every module of the package (the folder of `grace`) by its dotted name.

    Parsing takes a second, which a dry run does not have: what was parsed is kept in the user's cache folder, by the
    hash of each file's text.
    """
    memory = cache_folder() / "definitions" / f"{hashlib.sha256(bytes(package)).hexdigest()[:16]}.json"
    known = _remembered(memory)
    modules, parsed = {}, {}
    for path in sorted(package.rglob("*.py")):
        parts = ("grace", *path.relative_to(package).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_bytes()
        key = hashlib.sha256(f"{_HERE}\0{name}\0".encode() + text).hexdigest()
        parsed[key] = known.get(key) or _parse(text.decode(), name, path.name == "__init__.py")
        definitions, imports, on_import = parsed[key]
        modules[name] = Module({key: Code(*code) for key, code in definitions.items()}, imports, Code(*on_import))
    if parsed.keys() != known.keys():
        with suppress(Exception), whole_file(memory) as part:  # without it the next run is slower, and that is all
            part.write_text(json.dumps(parsed))
    return modules


def _remembered(memory: Path) -> dict[str, Any]:
    try:
        return json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}


def _parse(text: str, name: str, is_package: bool) -> Module:
    tree = _without_docstrings(ast.parse(text))
    if name == COMMANDS or name.startswith(f"{COMMANDS}."):
        _drop_flags(tree)
    imports = {bound: dotted for bound, dotted in _imports(tree, name, is_package, everywhere=False)}
    pieces: dict[str, list[ast.stmt]] = {}
    loose: list[ast.stmt] = []
    for statement in tree.body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)) or _runs_as_script(statement):
            continue
        bound = set(_bound(statement))
        for one in bound:
            pieces.setdefault(one, []).append(statement)
        if not bound or _does_more(statement):
            loose.append(statement)
    scope = {**imports, **{one: f"{name}.{one}" for one in pieces}}

    def code(statements: list[ast.stmt]) -> Code:
        said = "\n".join(map(ast.unparse, statements))
        references = {r for s in statements for r in _references(s, scope, name, is_package)}
        return Code(hashlib.sha256(said.encode()).hexdigest()[:32] if said else "", sorted(references))

    definitions = {one: code(statements) for one, statements in pieces.items() if one != "__all__"}
    return Module(definitions, imports, code(loose))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """Without statements that are only a string; `pass` where a body would be empty."""
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                kept = [s for s in block if not (isinstance(s, ast.Expr) and _is_text(s.value))]
                setattr(node, field, kept or ([ast.Pass()] if block and not isinstance(node, ast.Module) else []))
    return tree


def _drop_flags(tree: ast.Module) -> None:
    """Without what makes a function a subcommand: its decorators, and annotations with flags and help texts."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list, node.returns = [], None
            for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
                argument.annotation = None


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _imports(tree: ast.AST, module: str, is_package: bool, everywhere: bool) -> Iterator[tuple[str, str]]:
    """(name, what it stands for) of the package's own imports: at the top level, or wherever below `tree`."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "grace":
                    yield (alias.asname, alias.name) if alias.asname else ("grace", "grace")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            if base.split(".")[0] == "grace":
                yield from ((alias.asname or alias.name, f"{base}.{alias.name}") for alias in node.names)
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement at the top level defines, also inside an `if`, `try`, `with` or `for`."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
        return
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif not isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            waiting += ast.iter_child_nodes(node)


def _does_more(statement: ast.stmt) -> bool:
    """Whether a statement may do something on import besides giving a name its value."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return any(_last_name(decorator) not in _WRAPPERS for decorator in statement.decorator_list)
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return any(isinstance(part, (ast.Attribute, ast.Subscript)) for target in targets for part in ast.walk(target))
    return True


def _runs_as_script(statement: ast.stmt) -> bool:
    """Whether it is `if __name__ == "__main__":`."""
    return isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test)


def _last_name(decorator: ast.expr) -> str:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")


def _references(statement: ast.stmt, scope: dict[str, str], module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that a statement's names, attributes and strings may stand for."""
    own: dict[str, set[str]] = {}
    for name, dotted in _imports(statement, module, is_package, everywhere=True):
        own.setdefault(name, set()).add(dotted)
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        chain = _chain(node)
        if chain:
            name, *rest = chain
            for dotted in own.get(name, {scope[name]} if name in scope else ()):
                yield ".".join([dotted, *rest])
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _NAMED_MODULE.fullmatch(node.value):
            yield f"'{node.value}"
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            waiting += ast.iter_child_nodes(node)


def _chain(node: ast.AST) -> list[str]:
    """`a.b.c` -> [a, b, c]; [] for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []
