"""Write the tables of scores in the README and on the pages from the results: `python docs/readme.py`."""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "small", "docs/small.md": "small", "docs/demo.md": "demo"}  # and the experiment each tells of
PRECISIONS = ("bf16", "int4", "int2")
SCORES = {  # in the table, and in metrics.json
    "teacher": "teacher",
    "student baseline": "baseline",
    "RTN": "rtn",
    "AWQ": "awq",
    "GPTQ": "gptq",
    "QAT": "finetune",
    "QAT + KD": "kd",
    "GRACE": "grace",
}
DIFFERENCES = {  # in the table, and the claim of metrics.json
    "RTN − baseline": "Rounding hurts at {}",
    "QAT − RTN": "QAT recovers what rounding loses at {}",
    "GRACE − QAT": "GRACE is above QAT at {}",
    "GRACE − (QAT + KD)": "GRACE is above QAT + KD at {}",
}


def table(metrics: dict[str, Any]) -> list[str]:
    """The lines of the table; a row without any number is left out."""
    rows = {name: [_score(metrics["scores"].get(key, {}), p) for p in PRECISIONS] for name, key in SCORES.items()}
    claims = metrics["claims"]
    rows |= {
        name: [_claim(claims.get(text.format(p.upper()))) for p in PRECISIONS] for name, text in DIFFERENCES.items()
    }
    head = ["| points | bf16 | INT4 | INT2 |", "|---|---|---|---|"]
    return head + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items() if any(cells)]


def _score(found: dict[str, Any], precision: str) -> str:
    """The teacher has one precision, and no key for it."""
    found = found if "average" in found and precision == "bf16" else found.get(precision, {})
    return f"{found['average']:.1f} ± {found['average_stderr']:.1f}" if "average" in found else ""


def _claim(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    p = found.get("p_holm", found["p_holm_questions"])
    seeds = "" if "p_holm" in found else ", one seed"
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"
    return f"{found['difference']:+.1f} ± {found['stderr']:.1f}, {shown}{seeds}".replace("-", "−")


def verdicts(metrics: dict[str, Any]) -> list[str]:
    """The lines of a list: each verdict, with the paper's claims about GRACE that have it."""
    found: dict[str, list[str]] = {"Holds": [], "Not decided": [], "Fails": []}
    for text, claim in metrics["claims"].items():
        if text.startswith("GRACE "):
            found[claim["verdict"]].append(text)
    return [
        line
        for verdict, texts in found.items()
        if texts
        for line in textwrap.wrap(f"- **{verdict}:** {'; '.join(texts)}.", 120, subsequent_indent="  ")
    ]


def written(page: str, metrics: dict[str, Any]) -> str:
    """The page with this table and list in the place of those behind the marks."""
    for mark, lines in (("scores", table(metrics)), ("verdicts", verdicts(metrics))):
        text = "\n".join(lines)
        page = re.sub(rf"(?<=<!-- {mark} -->\n)(.+\n)+", lambda _, text=text: f"{text}\n", page, count=1)
    return page


if __name__ == "__main__":
    for name, experiment in PAGES.items():
        path = ROOT / name
        path.write_text(
            written(path.read_text(), json.loads((ROOT / f"results/{experiment}/metrics.json").read_text()))
        )
