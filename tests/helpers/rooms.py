"""Which room of the package imports which, from the source: what the layers' test and the architecture page are about."""

import ast
from pathlib import Path

import grace

PACKAGE = Path(grace.__file__).parent


def imports() -> dict[str, set[str]]:
    """For each folder of the package, the folders that its modules import, inside functions too."""
    rooms = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for room in rooms:
        for path in (PACKAGE / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                found[room] |= {name.split(".")[1] for name in names if name.startswith("grace.")} & set(rooms) - {room}
    return found


def picture() -> str:
    """The imports as a Mermaid flowchart without the arrows that follow from others.

    The families of models lie below the configuration and the rest of `models` above it, so that `config` -> `models`
    is left out here.
    """
    edges = imports()
    edges["config"] -= {"models"}

    def reached(room: str) -> set[str]:
        below = set(edges[room])
        for other in edges[room]:
            below |= reached(other)
        return below

    lines = ["flowchart BT"]
    for room in sorted(edges):
        implied = {far for other in edges[room] for far in reached(other)}
        lines += [f"  {other} --> {room}" for other in sorted(edges[room] - implied)]
    return "\n".join(lines)
