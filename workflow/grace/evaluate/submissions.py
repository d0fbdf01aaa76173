"""Answers for the servers that keep a benchmark's right ones, in the formats that they take.

Formats: EvalAI's VQA challenge takes a JSON list of `question_id` and `answer`, VizWiz's one of `image` and `answer`
(LLaVA c121f04, scripts/convert_{vqav2,vizwiz}_for_submission.py); MMBench's server takes a sheet of each question's
columns and `prediction` (scripts/convert_mmbench_for_submission.py).
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from grace.benchmarks.items import Item
from grace.errors import GraceError
from grace.files import whole_file, write_json

SUBMISSIONS = "submissions"
_NO_CELL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # what a sheet can't hold


def _vqav2(rows: pd.DataFrame, items: Iterable[Item], path: Path) -> None:
    wrong = rows["sample_id"][~rows["sample_id"].str.fullmatch("[0-9]+")]
    if len(wrong):
        raise GraceError(
            f"{path}: row {wrong.iloc[0]} has no number as its question_id, which the server wants; mend it"
        )
    pairs = zip(rows["sample_id"], rows["extracted"], strict=True)
    write_json(path, [{"question_id": int(name), "answer": answer} for name, answer in pairs])


def _vizwiz(rows: pd.DataFrame, items: Iterable[Item], path: Path) -> None:
    pairs = zip(rows["sample_id"], rows["extracted"], strict=True)
    names = ((name if "." in name else f"{name}.jpg", answer) for name, answer in pairs)
    write_json(path, [{"image": name, "answer": answer} for name, answer in names])


def _mmbench(rows: pd.DataFrame, items: Iterable[Item], path: Path) -> None:
    said = dict(zip(rows["sample_id"], rows["prediction"], strict=True))
    table = [
        {"index": int(item.id), "question": item.question}
        | {letter: item.options.get(letter) for letter in "ABCD"}
        | {"prediction": said[item.id]}
        for item in items
    ]
    sheet = pd.DataFrame(table).map(lambda cell: _NO_CELL.sub("", cell) if isinstance(cell, str) else cell)
    try:
        with whole_file(path) as part, pd.ExcelWriter(part, engine="openpyxl") as writer:
            sheet.to_excel(writer, index=False)
    except ImportError:
        raise GraceError(f"{path}: writing a sheet needs openpyxl; pip install openpyxl") from None


FORMS: dict[str, tuple[str, Callable[[pd.DataFrame, Iterable[Item], Path], None]]] = {
    "vqav2": ("vqav2.json", _vqav2),
    "vizwiz": ("vizwiz.json", _vizwiz),
    "mmbench-test": ("mmbench-test.xlsx", _mmbench),
}
"""By benchmark: the file's name, and what writes it from predictions and the benchmark's questions."""


def submission_file(out: Path, name: str, protocol: str) -> Path:
    """Where the file for a benchmark's server is."""
    return out / SUBMISSIONS / protocol / FORMS[name][0]


def write_submission(out: Path, name: str, protocol: str, rows: pd.DataFrame, items: Iterable[Item]) -> Path:
    """Write `submission_file`, whole or not at all."""
    path = submission_file(out, name, protocol)
    FORMS[name][1](rows, items, path)
    return path
