"""Killed in the middle of a benchmark, and shared between processes: predictions as of one undisturbed process."""

import json
import os
import re
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import started
from evaluate_models import rows, write_benchmark, write_model

from grace.benchmarks.extraction import Answer
from grace.evaluate.answer_log import AnswerLog
from grace.evaluate.commands import evaluate
from grace.files import read_json

PROCESS = Path(__file__).parents[2] / "helpers" / "evaluate_process.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("parts")
    write_model(made / "model")
    for seed, name in enumerate(("colour", "object")):
        write_benchmark(made / f"data/benchmarks/{name}.parquet", rows(40, seed=seed))
    evaluation = {"benchmarks": ["colour", "object"], "batch": 8, "max_new_tokens": 3}
    (made / "run.json").write_text(json.dumps({"family": "llava", "evaluation": evaluation}))
    evaluate(made / "run.json", made / "model", made / "data", made / "whole")
    return made


def _evaluate(folder: Path, out: str, batches: int, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--run", "run.json", "--model", "model", "--data", "data", "--out", out, *more]
    launcher = []
    if "--processes" in more:  # as the command line would, but with the counting process
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", more[-1], "--"]
    return subprocess.run(
        started.python(*launcher, PROCESS, batches, "evaluate", *arguments), cwd=folder, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _questions_asked(done: subprocess.CompletedProcess[str]) -> int:
    return sum(int(count) for count in re.findall(r"asked (\d+)", done.stdout))


def _same(folder: Path, out: str) -> None:
    one, other = (read_json(folder / name / "manifest.json") for name in ("whole", out))
    for name in ("colour", "object"):
        tables = [pq.read_table(folder / part / f"{name}.parquet") for part in ("whole", out)]
        assert tables[0].equals(tables[1]) and len(tables[0]) == 40
        assert one["benchmarks"][name] == other["benchmarks"][name]
    assert sorted(path.name for path in (folder / out).iterdir()) == [
        "colour.parquet",
        "environment.json",
        "manifest.json",
        "object.parquet",
    ]


def test_a_killed_process_goes_on_in_the_middle_of_a_benchmark(folder):
    killed = _evaluate(folder, "killed", 7)  # five batches to a benchmark: it dies in the second one
    assert killed.returncode == -9 and _questions_asked(killed) == 56
    assert (folder / "killed/colour.parquet").is_file() and not (folder / "killed/object.parquet").exists()
    (part,) = (folder / "killed/.parts").iterdir()
    newest = sorted(part.iterdir())[-1]
    newest.write_text(newest.read_text()[:20])  # damaged: its batch is asked again
    again = _evaluate(folder, "killed", -1)
    assert again.returncode == 0, again.stderr
    assert _questions_asked(again) == 80 - 56 + 8
    _same(folder, "killed")


def test_two_processes_give_what_one_gives(folder):
    done = _evaluate(folder, "two", -1, "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert _questions_asked(done) == 80, "every question is asked once"
    _same(folder, "two")


def test_two_processes_killed_go_on_as_one(folder):
    killed = _evaluate(folder, "both", 2, "--processes", "2")
    assert killed.returncode != 0 and 0 < _questions_asked(killed) < 80
    kept = sum(len(read_json(path)) for path in (folder / "both").rglob("*.json"))
    again = _evaluate(folder, "both", -1)
    assert again.returncode == 0, again.stderr
    assert kept > 0 and _questions_asked(again) == 80 - kept
    _same(folder, "both")


def test_an_unreadable_image_stops_no_other_process(folder, monkeypatch):
    monkeypatch.setenv("WRITING_TAKES", "1")  # the other process is through long before, and torchrun ends both with it
    broken = rows(40)
    broken[30]["image"]["bytes"] = b"no image"
    write_benchmark(folder / "bad/benchmarks/colour.parquet", broken)
    write_benchmark(folder / "bad/benchmarks/object.parquet", rows(40, seed=1))
    done = _evaluate(folder, "named", -1, "--data", "bad", "--processes", "2")
    assert done.returncode != 0 and re.search(r"colour\.parquet: image of row-\d+: cannot be read", done.stderr)
    tables = [pq.read_table(folder / part / "object.parquet") for part in ("whole", "named")]
    assert tables[0].equals(tables[1]), "the other benchmark is kept"


def test_parts_come_back_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr("grace.evaluate.answer_log.SECONDS_BETWEEN_PARTS", 0.0)
    answers = [Answer("red", -0.1 / 3, 1e-17), Answer("«é»\n", -2.0, 0.0)]
    AnswerLog(tmp_path / "key").add("name", [5, 2], answers)
    AnswerLog(tmp_path / "key", writer=1).add("name", [3], answers[:1])
    assert AnswerLog(tmp_path / "key").read("name") == {5: answers[0], 2: answers[1], 3: answers[0]}
    assert AnswerLog(tmp_path / "key").read("other") == {}
    monkeypatch.setattr("grace.evaluate.answer_log.SECONDS_BETWEEN_PARTS", 60.0)
    waiting = AnswerLog(tmp_path / "later")
    waiting.add("name", [0], answers[:1])
    assert waiting.read("name") == {}, "not every batch is written"


def test_answers_that_wait_stay_with_their_questions(tmp_path):
    """A benchmark is asked in chunks, whose questions are numbered from 0 each."""
    parts = AnswerLog(tmp_path / "key")
    first, second = (Answer(text, -1.0, 0.5) for text in ("first", "second"))
    parts.add("one", [0, 1], [first, first])
    parts.add("two", [0], [second])
    parts.add("three", [0], [second])
    again = AnswerLog(tmp_path / "key")
    assert again.read("one") == {0: first, 1: first}
    assert again.read("two") == {0: second}
