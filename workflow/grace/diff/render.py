"""A difference for the terminal, for a pull request and for a browser."""

import base64
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from grace.diff.model import Change, Difference
from grace.report.formatting import markdown_text, number, p_text
from grace.report.tables.scores import AVERAGE
from grace.results.statistics import ALPHA

FLIPS_IN_MARKDOWN = 20
WIDE = 200  # columns of a file or pipe, where nothing is wrapped
NOTES = (
    "B less A on the questions that both asked, in points ± standard error; p by McNemar's exact test clustered by "
    "image (average: paired bootstrap), after Holm's correction over everything that changed."
)


def summary(found: Difference) -> str:
    """One sentence on the whole."""
    changed = [change for change in found.changes if change.comparison is not None]
    if not changed:
        return f"All {len(found.changes)} comparisons have identical scores."
    gains = sum(each.p < ALPHA and each.comparison is not None and each.comparison.difference > 0 for each in changed)
    return (
        f"{len(changed)} of {len(found.changes)} comparisons changed: {gains} significant gains, "
        f"{len(found.regressions)} significant drops, {found.flipped:,} answers flipped."
    )


def lines(found: Difference) -> list[dict[str, str]]:
    """The changed comparisons as texts, averages first, drops before gains."""
    changed = [change for change in found.changes if change.comparison is not None or _asked_otherwise(change)]
    changed.sort(key=lambda c: (c.benchmark != AVERAGE, c.p, c.comparison.difference if c.comparison else 0.0))
    return [_line(change) for change in changed]


def _asked_otherwise(change: Change) -> bool:
    """Whether the two versions do not ask the same questions."""
    return bool(change.added or change.removed or change.redefined or change.reworded)


def _line(change: Change) -> dict[str, str]:
    compared = change.comparison
    samples = [
        f"{getattr(change, what)} {what}"
        for what in ("added", "removed", "reworded", "redefined")
        if getattr(change, what)
    ]
    verdict = "same scores"
    if compared is not None:
        verdict = "noise" if change.p >= ALPHA else "drop" if compared.difference < 0 else "gain"
    shown = (
        "0" if compared is None else f"{compared.difference:+.2f} ± {compared.question_stderr:.2f}".replace("-", "−")
    )
    return {
        "model": str(change.row),
        "seeds": ", ".join(map(str, change.seeds)),
        "benchmark": change.benchmark,
        "before": number(change.before, 2),
        "after": number(change.after, 2),
        "change": shown,
        "flips": "" if compared is None else f"+{compared.gained} −{compared.lost}",
        "p": "" if compared is None else p_text(change.p),
        "verdict": verdict,
        "questions": f"{change.shared:,} shared" + "".join(f", {text}" for text in samples),
    }


HEADS = ("model", "seeds", "benchmark", "before", "after", "change", "flips", "p", "verdict", "questions")


def to_terminal(found: Difference) -> None:
    """Print the difference with rich."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else WIDE)
    console.print(f"A {found.a}\nB {found.b}", highlight=False, markup=False)
    console.print(f"[bold]{summary(found)}[/]", highlight=False)
    shown = lines(found)
    if shown:
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        heads = [head for head in HEADS if head not in ("seeds", "questions")]
        for head in heads:
            table.add_column(head, no_wrap=head not in ("model", "benchmark"))
        style = {"drop": "bold red", "gain": "green", "noise": "", "same scores": "dim"}
        for line in shown:
            line = {**line, "p": line["p"].removeprefix("p = ").removeprefix("p ")}
            table.add_row(*(escape(line[head]) for head in heads), style=style[line["verdict"]])
        console.print(table)
        console.print(NOTES, style="dim", highlight=False)
        for line in shown:
            if "," in line["questions"].partition(" shared")[2]:
                console.print(
                    f"{line['model']}, {line['benchmark']}: {line['questions']}", highlight=False, markup=False
                )
    for title, rows in _lists(found):
        console.print(f"[bold]{escape(title)}[/]")
        for row in rows:
            console.print("  " + " | ".join(map(str, row)), highlight=False, markup=False)


def _lists(found: Difference) -> list[tuple[str, list[tuple]]]:
    """The parts besides scores that have something to say."""
    parts: list[tuple[str, list[tuple]]] = [
        (title[0].upper() + title[1:], [(n,) for n in v]) for title, v in found.only.items()
    ]
    parts.append(("Settings (A, B)", [(key, old, new) for key, old, new in found.settings]))
    parts.append(("Environment (A, B)", [(key, old, new) for key, old, new in found.environment]))
    parts.append(("Artifacts", list(found.artifacts)))
    if found.speed is not None:
        moved = found.speed[(found.speed["ratio"] - 1).abs() > 1e-9]
        parts.append(("Speed and memory, B / A", [_speed(record) for record in moved.to_dict("records")]))
    return [(title, rows) for title, rows in parts if rows]


def _speed(record: dict[str, Any]) -> tuple[str, ...]:
    verdict = "better" if record["better"] else "worse"
    return (
        record["what"],
        f"{record['measure']} {record['A']:.4g} -> {record['B']:.4g}",
        f"x{record['ratio']:.2f}",
        verdict,
    )


def to_json(found: Difference) -> str:
    """For a program: scores in points, differences B less A, p after Holm's correction, every flip that is shown."""
    changes = []
    for change in found.changes:
        about: dict[str, Any] = {
            "model": str(change.row), "benchmark": change.benchmark, "seeds": list(change.seeds),
            "before": change.before, "after": change.after, "questions": change.shared,
            "added": change.added, "removed": change.removed, "reworded": change.reworded,
            "redefined": change.redefined, "identical": change.comparison is None, "p": float(change.p),
        }  # fmt: skip
        if change.comparison is not None:
            compared = change.comparison
            about |= {"difference": float(compared.difference), "stderr": float(compared.question_stderr)}
            about |= {"gained": int(compared.gained), "lost": int(compared.lost), "regressed": change.regressed}
        changes.append(about)
    flips = [{**asdict(flip), "row": str(flip.row)} for flip in found.flips]
    speed = [] if found.speed is None else found.speed.to_dict("records")
    return json.dumps(
        {
            "a": found.a, "b": found.b, "summary": summary(found), "changes": changes, "flipped": found.flipped,
            "flips": flips, "only": found.only, "settings": found.settings, "environment": found.environment,
            "artifacts": found.artifacts, "speed": speed,
        },
        indent=2, default=lambda value: value.item() if hasattr(value, "item") else str(value),
    )  # fmt: skip


def to_markdown(found: Difference) -> str:
    """For a pull request."""
    text = ["# What changed", "", f"A: `{found.a}`  ", f"B: `{found.b}`", "", summary(found), ""]
    shown = lines(found)
    if shown:
        text += ["| " + " | ".join(HEADS) + " |", "| " + " | ".join("---" for _ in HEADS) + " |"]
        for line in shown:
            bold = "**" if line["verdict"] in ("drop", "gain") else ""
            text.append(
                "| " + " | ".join(f"{bold}{markdown_text(line[h])}{bold}" if line[h] else "" for h in HEADS) + " |"
            )
        text += ["", NOTES, ""]
    if found.flips:
        text += [f"<details><summary>{found.flipped:,} flipped answers</summary>", ""]
        text += ["| model | benchmark | question | right | A said | B said |", "| --- | --- | --- | --- | --- | --- |"]
        for flip in found.flips[:FLIPS_IN_MARKDOWN]:
            question = found.questions.get((flip.benchmark, flip.sample), (flip.sample, b""))[0]
            cells = (f"{flip.row} seed {flip.seed}", flip.benchmark, question, flip.target, flip.before, flip.after)
            text.append("| " + " | ".join(map(markdown_text, cells)) + " |")
        if found.flipped > FLIPS_IN_MARKDOWN:
            text.append(f"\n{FLIPS_IN_MARKDOWN} of {found.flipped:,}; `--page` shows more, with their images.")
        text += ["", "</details>", ""]
    for title, rows in _lists(found):
        text += [f"## {title}", "", *(f"- {markdown_text(' | '.join(map(str, row)))}" for row in rows), ""]
    return "\n".join(text).rstrip() + "\n"


def to_html(found: Difference) -> str:
    """One self-contained page, flipped questions with their images."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("diff.html").read_text())
    flips = []
    for flip in found.flips:
        question, image = found.questions.get((flip.benchmark, flip.sample), (flip.sample, b""))
        flips.append({"flip": flip, "question": question, "image": _inline(image)})
    return template.render(
        a=found.a, b=found.b, summary=summary(found), heads=HEADS, lines=lines(found), notes=NOTES,
        flips=flips, flipped=found.flipped, lists=_lists(found),
    )  # fmt: skip


def _inline(image: bytes) -> str:
    if not image:
        return ""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
