"""Imports between the package's rooms: no circles, and no arrow that runs back up."""

import ast
from pathlib import Path

import grace

PACKAGE = Path(grace.__file__).parent
# From the ground up; a room may import those before it and its neighbours on the same floor, never those after it.
FLOORS = (
    ("errors", "arithmetic", "environment", "progress", "world", "first_order", "nested", "limits", "hashes", "git"),
    ("workers", "precision"),
    ("files",),
    ("kernels", "benchmarks", "families"),
    ("config", "distill"),
    ("models",),
    ("distributed", "data"),
    ("quant", "demo"),
    ("teacher", "infer"),
    ("train", "evaluate", "bench", "results"),
    ("report",),
    ("provenance", "diff", "cluster"),
    ("cli", "__main__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def _room(module: str) -> str:
    return [*module.split("."), ""][1]


def _modules() -> dict[str, Path]:
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = _modules()


def _imports(path: Path) -> set[str]:
    """The package's own modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "grace":
            found |= {
                name if (name := f"{node.module}.{alias.name}") in MODULES else node.module for alias in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "grace"}
    return found & set(MODULES)


EDGES = {name: _imports(path) - {name} for name, path in MODULES.items()}


def _refuse_circles(edges: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in edges[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_no_module_imports_itself_through_others():
    _refuse_circles(EDGES)


def test_no_room_imports_itself_through_others():
    rooms: dict[str, set[str]] = {_room(name): set() for name in MODULES}
    for name, others in EDGES.items():
        rooms[_room(name)] |= {_room(other) for other in others} - {_room(name), ""}  # "": the package itself
    _refuse_circles(rooms)


def test_no_room_imports_one_above_it():
    back_up = []
    for name, others in EDGES.items():
        room = _room(name)
        for other in others:
            target = _room(other)
            if room and target and FLOOR[target] > FLOOR[room]:
                back_up.append(f"{name} -> {other}")
    assert not back_up, "\n".join(back_up)
