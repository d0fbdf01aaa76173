"""The pages are true: their commands run, their messages are the code's, their picture is that of the imports."""

import ast
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from grace.cli import app
from grace.config.load import load_files
from grace.quant import card

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "workflow/grace"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # not those of the log, which speak of their day
RUN = [
    pytest.param(line, id=f"{page.stem}: {line}")
    for page in PAGES
    for block in re.findall(r"<!-- run -->\n```bash\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("line", RUN)
def test_a_marked_command_runs(line, tmp_path):
    program, *arguments = shlex.split(line, comments=True)
    assert program.startswith(".venv/bin/")
    if program.endswith("snakemake"):
        # another process may hold the lock of this checkout, and a dry run needs none
        arguments += ["--nolock"]
    done = subprocess.run(
        [Path(sys.executable).with_name(Path(program).name), *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_commands_are_marked():
    assert len(RUN) >= 5


def _sentences() -> list[str]:
    """Every text of the package with the values in it as `…`."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
    return [_normalised(text) for text in found]


def _normalised(text: str) -> str:
    """One `…` for values that follow each other; what opens or closes a sentence may be put together elsewhere."""
    return re.sub("…+", "…", text).strip(" …")


def _documented_messages() -> list[str]:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = [row[1] for row in re.findall(r"(?m)^- (`+) ?(.+?) ?\1(?: \(Snakemake\))?$", page)]
    assert len(messages) > 30
    return [message for message in messages if message != "Directory cannot be locked"]  # Snakemake's own


@pytest.mark.parametrize("message", _documented_messages())
def test_a_message_of_the_troubleshooting_page_is_one_of_the_code(message, sentences):
    assert _normalised(message) in sentences


@pytest.fixture(scope="module")
def sentences():
    return set(_sentences())


def test_the_pictures_are_those_of_the_code():
    made = runpy.run_path(str(ROOT / "docs/pictures.py"))["pictures"]()
    kept = {path.name: path.read_text() for path in (ROOT / "docs/pictures").iterdir()}
    assert made == kept, "run `python docs/pictures.py`"


@pytest.mark.parametrize("snippet", ["_TRANSFORMERS", "_VLLM"])
def test_the_deploy_page_has_the_cards_code(snippet):
    text = getattr(card, snippet).format(needs="", question=card._QUESTION).replace("FOLDER", "packed")
    assert re.search(r"```python\n.*?```", text, re.DOTALL)[0] in (ROOT / "docs/deploy.md").read_text()


DESIGN = ["architecture", "decoding", "demo", "guarantees", "kernels", "method", "statistics"]


@pytest.mark.parametrize("page", DESIGN)
def test_a_design_page_is_short(page):
    assert len((ROOT / f"docs/{page}.md").read_text().splitlines()) <= 100


def test_the_readme_names_files_that_are_there():
    """The site's own links are checked by its strict build."""
    links = re.findall(r"(?:\]\((?!http)|src=\")([^)#\"]+)", (ROOT / "README.md").read_text())
    assert links and not [link for link in links if not (ROOT / link).exists()]


WRITER = runpy.run_path(str(ROOT / "docs/readme.py"))


@pytest.mark.parametrize("page, experiment", WRITER["PAGES"].items())
def test_a_page_has_its_experiments_numbers(page, experiment):
    """Those of the committed results, whatever was built here since."""
    shown = ["git", "-C", ROOT, "show", f"HEAD:results/{experiment}/metrics.json"]
    metrics = json.loads(subprocess.run(shown, capture_output=True, text=True, check=True).stdout)
    text = (ROOT / page).read_text()
    made = WRITER["table"](metrics)
    assert len(made) >= 6 and max(map(len, made)) <= 90, "a table of a page fits 80 columns"
    about = [text for text in metrics["claims"] if text.startswith("GRACE ")]
    listed = " ".join(" ".join(WRITER["verdicts"](metrics)).split())
    assert about and all(text in listed for text in about)
    assert WRITER["written"](text, metrics) == text, "run `python docs/readme.py`"


def test_a_file_that_a_page_names_is_there():
    pattern = re.compile(r"(?<![\w/.])((?:tests|workflow|rules|docs|envs|profiles)/[\w./-]*\w)")
    named = {(page.name, path) for page in PAGES for path in pattern.findall(page.read_text())}
    examples = {"workflow/grace/families/NAME.py", "workflow/grace/distill/objectives/NAME.py"}
    examples |= {"workflow/grace/quant/weighted.py", "workflow/grace/quant/byte_codes.py"}
    lost = sorted(
        (page, path)
        for page, path in named - {(p, e) for p, _ in named for e in examples}
        if not (ROOT / path).exists()
    )
    assert len(named) > 30 and not lost


def test_a_subcommand_that_a_page_names_is_there():
    command = typer.main.get_command(app)
    lost = []
    for page in PAGES:
        for first, second in re.findall(
            r"(?:`|bin/|^|\$ )grace ([a-z]+)(?: ([a-z]+))?", page.read_text(), re.MULTILINE
        ):
            group = command.commands.get(first)
            if group is None or (second and hasattr(group, "commands") and second not in group.commands):
                lost.append((page.name, first, second))
    assert not lost


def test_a_name_of_the_package_that_a_page_gives_is_there():
    """`grace.part.module.name` by the text of the files, which imports nothing."""
    named = {(page.name, name) for page in PAGES for name in re.findall(r"`grace\.([\w.]+)", page.read_text())}
    assert len(named) > 10 and not sorted(pair for pair in named if not _defined(pair[1].split(".")))


def _defined(parts: list[str]) -> bool:
    for count in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:count])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if file.is_file():
            return count == len(parts) or bool(re.search(rf"\b{parts[count]}\b", file.read_text()))
    return False


def test_a_flag_that_a_page_gives_to_a_subcommand_is_one_of_it():
    top = typer.main.get_command(app)
    checked, lost = 0, []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for words in re.findall(r"(?:`|bin/|^|\$ )grace ((?:[a-z]+ )+)([^`\n#]*)", text, re.MULTILINE):
            command = top
            for name in words[0].split():
                command = getattr(command, "commands", {}).get(name, command)
            known = {option for parameter in command.params for option in parameter.opts}
            flags = re.findall(r"(?<!\S)--[a-z][\w-]*", words[1])
            checked += len(flags)
            lost += [(page.name, command.name, flag) for flag in flags if flag not in known]
    assert checked > 20 and not lost


def test_the_plan_that_a_page_shows_is_what_is_printed():
    (block,) = re.findall(r"```\n\$ (grace plan .*)\n((?:.*\n)*?)```", (ROOT / "docs/clusters.md").read_text())
    command = [sys.executable, "-m", "grace.cli", *shlex.split(block[0])[1:]]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    shown = [line.split() for line in block[1].splitlines() if line.strip(" ─…")]
    # the heading of a narrow terminal takes two lines
    assert len(shown) > 4 and not [line for line in shown[1:] if line not in map(str.split, printed)]


def test_the_part_of_an_experiment_that_a_page_tries_is_one(tmp_path):
    page = (ROOT / "docs/paper.md").read_text()
    (part,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "try.yaml").write_text(part)
    shipped = [ROOT / "workflow/experiments" / name for name in re.findall(r"(?m)^\| `(\w+\.yaml)` \|", page)]
    assert len(shipped) == 4
    whole, tried = load_files(shipped[:1]), load_files([shipped[0], tmp_path / "try.yaml"])
    assert tried.experiment != whole.experiment
    assert tried.data.sources[0].path == whole.data.sources[0].path
    assert set(tried.evaluation.benchmarks) < set(whole.evaluation.benchmarks)


def test_a_table_is_narrow():
    """Its widest cells side by side take at most 112 letters, so that 80 columns hold it with few wrapped cells."""
    wide = []
    for page in PAGES:
        for table in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE):
            if (width := _width(table)) > 112:
                wide.append((page.name, table.split("\n")[0], width))
    assert not wide


def _width(table: str) -> int:
    """Letters of a table as a browser shows it: without marks and the targets of links."""
    shown = re.sub(r"[`*\[\]\\]|(?<=\])\([^)]*\)", "", table.replace("\\|", "¦"))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    return sum(max(map(len, column)) + 3 for column in zip(*rows, strict=True))


def test_every_page_is_two_clicks_from_the_start():
    def links(page: Path) -> set[Path]:
        named = re.findall(r"\]\(([\w/.-]+\.md)(?:#[\w-]*)?\)", page.read_text()) if page.exists() else []
        return {(page.parent / name).resolve() for name in named}

    near = links(ROOT / "docs/index.md")
    reached = near.union(*map(links, near))
    made = {ROOT / f"docs/reference/{name}.md" for name in ("configuration", "command-line", "results")}
    assert {*(ROOT / "docs").rglob("*.md"), *made} - {ROOT / "docs/index.md"} <= reached
