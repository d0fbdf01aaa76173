"""Draw the pictures of the pages: `python docs/pictures.py` writes them into docs/pictures/ as SVG.

The subpackages' picture comes from the imports in the source, so that a test can compare the committed file with it.
"""

import ast
from collections.abc import Iterable
from html import escape
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "workflow/grace"
FOLDER = ROOT / "docs/pictures"
Edge = tuple[str, str]
LINE, LETTER, GAP = 18, 7.3, 34  # height of a text line, width of a letter, space between layers, in pixels
STYLE = """
text { font: 13px ui-sans-serif, system-ui, sans-serif; text-anchor: middle; fill: #1f2937 }
rect { fill: #eef2ff; stroke: #6366f1 }
path { fill: none; stroke: #8b93a7; stroke-width: 1.3 }
marker path { fill: #8b93a7; stroke: none }
"""

WORKFLOW = """
images, conversations,|benchmarks -> teacher|bf16
images, conversations,|benchmarks -> student baseline|bf16
teacher|bf16 -> teacher cache: logits and|Gram matrices
student baseline|bf16 -> RTN, AWQ, GPTQ
student baseline|bf16 -> QAT, QAT + KD, GRACE|and its parts
teacher cache: logits and|Gram matrices -> QAT, QAT + KD, GRACE|and its parts
RTN, AWQ, GPTQ -> packed INT4 folder
QAT, QAT + KD, GRACE|and its parts -> packed INT4 folder
packed INT4 folder -> kernel and decoding|benchmarks
packed INT4 folder -> evaluation:|every prediction kept
kernel and decoding|benchmarks -> tables, figures, page
evaluation:|every prediction kept -> tables, figures, page
"""
EXPERIMENT = """
config.yaml -> config/:|one frozen file per job
config/:|one frozen file per job -> data/
data/ -> teacher/
teacher/ -> teacher/cache/
data/ -> students/|baseline/
teacher/cache/ -> students/{recipe}/|{precision}/seed{seed}/
students/|baseline/ -> students/{recipe}/|{precision}/seed{seed}/
students/{recipe}/|{precision}/seed{seed}/ -> packed/
students/{recipe}/|{precision}/seed{seed}/ -> predictions/
packed/ -> bench/
predictions/ -> tables/, figures/,|speed/, report/
bench/ -> tables/, figures/,|speed/, report/
"""


def imports() -> dict[str, set[str]]:
    """For each subpackage, the subpackages that its modules import, inside functions too."""
    names = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())
    found: dict[str, set[str]] = {name: set() for name in names}
    for name in names:
        for path in (PACKAGE / name).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    imported = [f"{node.module}.{alias.name}" for alias in node.names]
                found[name] |= {i.split(".")[1] for i in imported if i.startswith("grace.")} & set(names) - {name}
    found.pop("cli", None)  # it imports all of them
    return found


def direct(below: dict[str, set[str]]) -> list[Edge]:
    """(imported, importing) pairs, without those that follow from others."""

    def reached(name: str) -> set[str]:
        return below[name].union(*(reached(other) for other in below[name]))

    return [
        (other, name)
        for name in sorted(below)
        for other in sorted(below[name] - {far for near in below[name] for far in reached(near)})
    ]


def draw(edges: Iterable[Edge], upwards: bool) -> str:
    """An SVG of a graph without circles, in layers from the top to the bottom, or upwards."""
    edges = list(edges)
    layer = _layers(edges)
    chains = [_chain(edge, layer) for edge in edges]
    rows = _ordered(layer, [pair for chain in chains for pair in pairwise(chain)])
    width = {name: 14 if _bend(name) else max(map(len, name.split("|"))) * LETTER + 18 for name in layer}
    height = {name: 14 if _bend(name) else (name.count("|") + 1) * LINE + 12 for name in layer}
    place: dict[str, tuple[float, float]] = {}
    full = max(sum(width[name] + 18 for name in row) for row in rows)
    top = 8.0
    for row in rows:
        free = (full - sum(width[name] for name in row)) / len(row)
        x, tall = free / 2, max(height[name] for name in row)
        for name in row:
            place[name] = (x + width[name] / 2, top + tall / 2)
            x += width[name] + free
        top += tall + GAP
    total = top - GAP + 8
    if upwards:
        place = {name: (x, total - y) for name, (x, y) in place.items()}
    lines = [_path(chain, place, height, -1 if upwards else 1) for chain in chains]
    lines += [_box(name, place[name], width[name], height[name]) for name in layer if not _bend(name)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {full:.0f} {total:.0f}" width="{full:.0f}">\n'
        f"<style>{STYLE}</style>\n"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker></defs>\n' + "\n".join(lines) + "\n</svg>\n"
    )


def _layers(edges: list[Edge]) -> dict[str, int]:
    """Each node's distance from the start, by its longest path."""
    layer = {name: 0 for edge in edges for name in edge}
    for _ in layer:
        for source, target in edges:
            layer[target] = max(layer[target], layer[source] + 1)
    return layer


def _bend(name: str) -> bool:
    return name.startswith("bend ")


def _chain(edge: Edge, layer: dict[str, int]) -> list[str]:
    """An edge's nodes: its ends and one bend in every layer between, which `layer` gets."""
    source, target = edge
    bends = {f"bend {source} {target} {at}": at for at in range(layer[source] + 1, layer[target])}
    layer |= bends
    return [source, *bends, target]


def _ordered(layer: dict[str, int], pairs: list[Edge]) -> list[list[str]]:
    """The layers' nodes in an order that crosses few edges: neighbours of a layer are exchanged while that helps."""
    rows = [[name for name in layer if layer[name] == at] for at in range(max(layer.values()) + 1)]
    least, before = _crossings(rows, layer, pairs), -1
    while least != before:
        before = least
        for row in rows:
            for at in range(len(row) - 1):
                row[at], row[at + 1] = row[at + 1], row[at]
                if (crossed := _crossings(rows, layer, pairs)) < least:
                    least = crossed
                else:
                    row[at], row[at + 1] = row[at + 1], row[at]
    return rows


def _crossings(rows: list[list[str]], layer: dict[str, int], pairs: list[Edge]) -> int:
    at = {name: place for row in rows for place, name in enumerate(row)}
    return sum(
        layer[a] == layer[c] and (at[a] - at[c]) * (at[b] - at[d]) < 0
        for i, (a, b) in enumerate(pairs)
        for c, d in pairs[:i]
    )


def _path(chain: list[str], place: dict, height: dict, way: int) -> str:
    """An arrow along the chain; `way` is 1 downwards and -1 upwards."""
    text = ""
    for name, following in pairwise(chain):
        (x, y), (u, v) = place[name], place[following]
        y, v = y + way * height[name] / 2, v - way * height[following] / 2
        text += (
            f"{'L' if text else 'M'}{x:.0f} {y:.0f}C{x:.0f} {(y + v) / 2:.0f} {u:.0f} {(y + v) / 2:.0f} {u:.0f} {v:.0f}"
        )
    return f'<path d="{text}" marker-end="url(#tip)"/>'


def _box(name: str, place: tuple[float, float], width: float, height: float) -> str:
    (x, y), lines = place, name.split("|")
    first = y - (len(lines) - 1) * LINE / 2 + 4.5
    words = "".join(
        f'<text x="{x:.0f}" y="{first + i * LINE:.0f}">{escape(line)}</text>' for i, line in enumerate(lines)
    )
    box = f'<rect x="{x - width / 2:.0f}" y="{y - height / 2:.0f}" width="{width:.0f}" height="{height:.0f}" rx="5"/>'
    return box + words


def _edges(text: str) -> list[Edge]:
    return [tuple(line.split(" -> ")) for line in text.strip().splitlines()]  # type: ignore[misc]


def pictures() -> dict[str, str]:
    """The text of every file of docs/pictures."""
    return {
        "workflow.svg": draw(_edges(WORKFLOW), upwards=False),
        "experiment.svg": draw(_edges(EXPERIMENT), upwards=False),
        "subpackages.svg": draw(direct(imports()), upwards=True),
    }


if __name__ == "__main__":
    for name, text in pictures().items():
        (FOLDER / name).write_text(text)
