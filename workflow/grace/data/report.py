"""What became of a data set's records, for people (report.md) and programs (report.json)."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grace.config.sections import FilesData
from grace.data.tokenise import TOO_LONG
from grace.errors import printable
from grace.files import read_json, whole_file

SHOWN = 20  # records of each reason in report.md


def _skipped(parts: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for part in parts:
        yield from read_json(part.with_suffix(".json"))["skipped"]


def summarise(data: FilesData, parts: Sequence[Path]) -> dict[str, Any]:
    """Counts over all parts: records, bad ones and others left out by reason, notes, and the same per source."""
    sources = [Counter() for _ in data.sources]
    bad, left_out, notes = Counter(), Counter(), Counter()
    for part in parts:
        about = read_json(part.with_suffix(".json"))
        source = sources[int(part.name[:3])]
        source.update(records=about["records"], conversations=about["rows"])
        notes.update(about["notes"])
        for entry in about["skipped"]:
            (left_out if entry["reason"] == TOO_LONG else bad)[entry["reason"]] += 1
    return {
        "records": sum(source["records"] for source in sources),
        "conversations": sum(source["conversations"] for source in sources),
        "bad": dict(bad.most_common()),
        "left out": dict(left_out),
        "notes": dict(sorted(notes.items())),
        "sources": [
            {"name": Path(section.path).name, "weight": section.weight, **count}
            for section, count in zip(data.sources, sources, strict=True)
        ],
    }


def write_report(folder: Path, data: FilesData, parts: Sequence[Path], summary: dict[str, Any], mixed: int) -> None:
    """Write `folder`/report.json, with every record that was left out, and report.md, with the first of each reason."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "report.json") as part, part.open("w") as file:
        head = json.dumps({**summary, "mixed": mixed}, indent=2, sort_keys=True, ensure_ascii=False)
        file.write(head.removesuffix("\n}") + ',\n  "skipped": [')
        for number, entry in enumerate(_skipped(parts)):
            file.write(",\n    " * (number > 0) + "\n    " * (number == 0))
            file.write(json.dumps(entry, sort_keys=True, ensure_ascii=False))
        file.write("\n  ]\n}\n")
    with whole_file(folder / "report.md") as part:
        part.write_text(_page(data, parts, summary, mixed))


def _page(data: FilesData, parts: Sequence[Path], summary: dict[str, Any], mixed: int) -> str:
    lines = [
        "# Training data",
        "",
        f"{summary['records']:,} records were read; {summary['conversations']:,} can be trained on. "
        f"By their sources' weights they make an epoch of {mixed:,} conversations.",
        "",
        "| source | records | conversations | weight |",
        "|---|---|---|---|",
    ]
    for source in summary["sources"]:
        lines.append(
            f"| {_cell(source['name'])} | {source.get('records', 0):,} | {source.get('conversations', 0):,} "
            f"| {source['weight']:g} |"
        )
    lines += ["", "## What was seen", ""]
    lines += [f"- {name}: {count:,}" for name, count in summary["notes"].items()]
    lines += ["", "## What was left out", ""]
    counts = {**summary["bad"], **summary["left out"]}
    if not counts:
        return "\n".join([*lines, "Nothing.", ""])
    shown: dict[str, list[str]] = {reason: [] for reason in counts}
    for entry in _skipped(parts):
        if len(shown[entry["reason"]]) < SHOWN:
            name = Path(data.sources[entry["source"]].path).name
            about = f"- {name}, record {entry['record']}, id {entry['id']}: {entry['detail']}".removesuffix(": ")
            shown[entry["reason"]].append(_cell(about))
    for reason, count in counts.items():
        lines += [f"### {reason}: {count:,}", "", *shown[reason]]
        lines += [f"- and {count - SHOWN:,} more, in report.json"] * (count > SHOWN)
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """One line in which Markdown finds no markup."""
    for sign in "\\`|<[*_":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def too_many(data: FilesData, parts: Sequence[Path], summary: dict[str, Any], report: Path) -> str:
    """The sentence for more bad records than `max_bad`."""
    bad = sum(summary["bad"].values())
    reasons = "; ".join(f"{reason}: {count:,}" for reason, count in summary["bad"].items())
    first = []
    for entry in _skipped(parts):
        if entry["reason"] != TOO_LONG and len(first) < 3:
            name = entry["id"] or f"record {entry['record']}"
            first.append(f"{printable(name)} ({printable(entry['detail'] or entry['reason'])})")
    return (
        f"{bad:,} of {summary['records']:,} records are bad, more than data.max_bad {data.max_bad:g} allows "
        f"({reasons}), first {', '.join(first)}; mend or drop them (all are listed in {report}), or raise data.max_bad"
    )
