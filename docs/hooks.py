"""Pages made from the code when the site is built (configuration, command line, results), and a check of every page."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from grace.config.sections import Changes

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, make in (("configuration", configuration), ("command-line", command_line), ("results", results)):
        files.append(File.generated(config, f"reference/{name}.md", content=make()))
    return files


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """The site has to work without a network, so a page that loads something from another host ends the build."""
    if loaded := loads_from_elsewhere(output):
        raise PluginError(f"{page.file.src_uri}: the page loads {loaded[0]}; keep a copy of it in docs/")
    return output


def loads_from_elsewhere(page: str) -> list[str]:
    """The tags of an HTML page by which a browser asks another host, by itself, for scripts, styles, fonts or images.

    A Mermaid block counts: the theme loads its renderer from a public host. Links (`<a href>`) do not.
    """
    sources = r"<(?!a\b)\w+\b[^>]*?\b(?:src|srcset|href|data|poster)\s*=\s*[\"']?\s*(?:https?:)?//[^>]*>"
    return re.findall(rf"{sources}|(?:@import|url\()[\s\"'(]*(?:https?:)?//[^;)]*|<\w+[^>]*\bmermaid\b[^>]*>", page)


def configuration() -> str:
    """Every section of an experiment as a table."""
    from grace.config.schema import Experiment

    opening = (
        "# Configuration\n\nEvery key of an experiment's YAML file, its values and its default. `grace config default` prints "
        "the file with\nthese explanations beside the keys; an unknown key or a wrong value is an error that names it.\n"
    )
    return opening + "".join(_section("", Experiment))


def _section(where: str, model: type[BaseModel]) -> Iterator[str]:
    """One section's table, then those of the sections inside it."""
    yield f"\n## {f'`{where}`' if where else 'The experiment'}\n\n{(model.__doc__ or '').strip()}\n\n"
    yield "| key | values | default | meaning |\n|---|---|---|---|\n"
    inner: dict[str, type[BaseModel]] = {}
    for key, field in model.model_fields.items():
        values = f"{_values(field.annotation)}{_bounds(field)}"
        for part in _models(field.annotation):
            if issubclass(part, Changes):
                values = f"any keys of `{'finetune' if key == 'train' else key}`"
            else:
                inner[_place(where, key, field, part)] = part
        yield f"| `{key}` | {values} | {_default(field)} | {_cell(field.description)} |\n"
    for place, part in inner.items():
        if part.__name__ not in ("Architecture", "Optimisation") or place in ("teacher.architecture", "finetune"):
            yield from _section(place, part)


def _place(where: str, key: str, field: FieldInfo, inner: type[BaseModel]) -> str:
    """Where a section stands: `runs[]`, `recipes.NAME`, `data (source: files)`."""
    kind = get_origin(field.annotation)
    path = ".".join(filter(None, (where.split(" ")[0], key))) + {list: "[]", dict: ".NAME"}.get(kind, "")
    several = len(_models(field.annotation)) > 1
    return f"{path} (source: {get_args(inner.model_fields['source'].annotation)[0]})" if several else path


def _bounds(field: FieldInfo) -> str:
    signs = {"gt": "> ", "ge": "≥ ", "lt": "< ", "le": "≤ "}
    bounds = [
        f"{sign}{value:.3g}" if value < 2**31 else ""
        for part in field.metadata
        for name, sign in signs.items()
        if (value := getattr(part, name, None)) is not None
    ]
    return ", ".join(["", *filter(None, bounds)])


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _values(annotation: Any) -> str:
    """A type in the words of a configuration file."""
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is Literal:
        return " \\| ".join(f"`{part}`" for part in parts)
    if kind in (Union, UnionType):
        return " or ".join(dict.fromkeys(_values(part) for part in parts))
    if kind is list:
        return f"list of {_values(parts[0])}"
    if kind is dict:
        return f"{_values(parts[1])} by name"
    if hasattr(annotation, "__metadata__"):
        return _values(parts[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, dict) and value:
        return ", ".join(f"`{name}`" for name in value)
    return f"`{json.dumps(value)}`".replace('"', "")


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def command_line() -> str:
    """Every subcommand with its flags, as typer writes them down."""
    import typer
    from typer.cli import get_docs_for_click

    from grace.cli import app

    command = typer.main.get_command(app)
    with typer.Context(command, info_name="grace") as context:
        text = get_docs_for_click(obj=command, ctx=context, name="grace", title="Command line")
    # the list of subcommands has their first words alone, and the page its own contents
    return re.sub(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+\n", "", html.unescape(text))


def results() -> str:
    """What every rule makes, from the rules' own text."""
    lines = [
        "# Results layout\n\nWhat the workflow makes, rule by rule. A `manifest.json` identifies its folder: it lists every "
        "file with its\nSHA-256. Wildcards: `experiment` is the key of that name, `recipe`, `precision` and `seed` come from "
        "`runs`.\n"
    ]
    for path in sorted((ROOT / "rules").glob("*.smk")):
        text = path.read_text()
        heading = re.match(r"((?:#.*\n)+)", text)
        lines.append(f"## `rules/{path.name}`\n")
        lines += _heading(heading[1]) if heading else []
        rows = []
        text = text.replace("{plan.folder}", "results/{experiment}")
        text = re.sub(
            r'plan\.cache_part\("(\w+)"\)', r'"results/{experiment}/teacher/cache/shard-{shard}-of-….\1"', text
        )
        for name, body in re.findall(r"(?m)^\s*rule (\w+):\n((?:(?!^\s*rule ).*\n?)*)", text):
            made = re.search(r"\n? +output:\n((?: {8,}.*\n)+)", body)
            called = re.search(r'"(?:torchrun[^"]*)?(grace [a-z]+(?: [a-z]+)?)"', body)
            calls = f"`{called[1]}`" if called else ""
            outputs = re.findall(r'"([^"]+)"', made[1]) if made else []
            names = [re.sub(r"{(\w+),[^}]*}", r"{\1}", output) for output in outputs]  # without what a wildcard may be
            rows += [f"| `{output}` | `{name}` | {calls} |" for output in names]
        lines += ["\n| made | by rule | which calls |\n|---|---|---|", *rows] if rows else []
        lines.append("")
    return "\n".join([*lines, *_tables()])


def _heading(comment: str) -> list[str]:
    """A file's opening comment as Markdown: what it needs and makes are paragraphs, and a `*` is no mark."""
    text = re.sub(r"(?m)^# ?", "", comment).replace("*", r"\*")
    return re.sub(r"\s*\b(Needs|Makes):", r"\n\n**\1:**", text).splitlines()


def _tables() -> Iterator[str]:
    """What the tables are, by the headings of the demo's."""
    yield "## `tables/`\n\nEach table is there as `.md`, `.csv` and `.tex`.\n\n| table | content |\n|---|---|"
    for path in sorted((ROOT / "results/demo/tables").glob("*.md")):
        heading = path.read_text().splitlines()[0].partition(": ")[2]
        yield f"| `{path.stem}` | {_cell(heading)} |"
