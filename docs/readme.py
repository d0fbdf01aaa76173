"""Write the README's rows about the demo from its results: `python docs/readme.py`."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROWS = {  # in the README, in metrics.json, and the claim that it is about with what it is compared to
    "teacher, bf16": ("teacher", "The teacher is above the bf16 student", "baseline"),
    "baseline, bf16": ("baseline.bf16", None, None),
    "RTN, INT4": ("rtn.int4", "Rounding hurts at INT4", "baseline"),
    "RTN, INT2": ("rtn.int2", "Rounding hurts at INT2", "baseline"),
    "QAT, INT4": ("finetune.int4", "QAT recovers what rounding loses at INT4", "RTN"),
    "QAT + KD, INT4": ("kd.int4", None, None),
    "GRACE, INT4": ("grace.int4", "GRACE is above QAT at INT4", "QAT"),
    "GRACE, INT4 ": ("grace.int4", "GRACE is above QAT + KD at INT4", "QAT + KD"),
    "QAT, INT2": ("finetune.int2", "QAT recovers what rounding loses at INT2", "RTN"),
    "QAT + KD, INT2": ("kd.int2", None, None),
    "GRACE, INT2": ("grace.int2", "GRACE is above QAT at INT2", "QAT"),
    "GRACE, INT2 ": ("grace.int2", "GRACE is above QAT + KD at INT2", "QAT + KD"),
}


def rows(metrics: dict[str, Any]) -> list[str]:
    """One row for each model of `ROWS` that the demo has."""
    made = []
    for name, (where, claim, other) in ROWS.items():
        found = metrics["scores"]
        for part in where.split("."):
            found = found.get(part, {})
        if "average" not in found:
            continue
        against = ""
        if found_claim := metrics["claims"].get(claim):
            p = found_claim.get("p_holm", found_claim.get("p_holm_questions"))
            seeds = "" if "p_holm" in found_claim else ", one seed"
            shown = "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"
            against = f"{other}: {found_claim['difference']:+.1f} ± {found_claim['stderr']:.1f} ({shown}{seeds})"
        against = against.replace(": -", ": −")
        score = f"{found['average']:.1f} ± {found['average_stderr']:.1f} points"
        made.append(f"| demo: {name.strip()} | {score} | {against} | [demo](docs/demo.md) |")
    return made


def written(readme: str, metrics: dict[str, Any]) -> str:
    """The README with these rows in the place of those that it has."""
    return re.sub(r"(?m)(^\| demo: .*\n)+", lambda _: "\n".join(rows(metrics)) + "\n", readme, count=1)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(written(path.read_text(), json.loads((ROOT / "results/demo/metrics.json").read_text())))
