"""What a killed run left is put in order by the next one, and nothing of a living one is touched."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grace.cluster import start
from grace.files import whole_folder
from grace.provenance.snakemake_records import record_path

RUN = """
import sys
from grace.cluster.start import take_over
print(take_over(wait_s=0), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Run:
    """A run in a process of its own, until it ends or is killed."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.alone = self.process.stdout.readline() == "True\n"

    def kill(self):
        self.process.kill()
        self.process.wait()


def lock(folder):
    path = folder / ".snakemake/locks/0.output.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("results/demo/metrics.json\n")
    return path


def test_a_killed_run_s_lock_is_taken_over(folder):
    first = Run()
    left = lock(folder)
    first.kill()
    second = Run()
    assert first.alone and second.alone and not left.exists()
    second.kill()


def test_a_living_run_s_lock_is_not(folder):
    first = Run()
    held = lock(folder)
    second = Run()
    assert not second.alone and held.exists()
    first.kill()
    third = Run()  # the second lives and may have written this lock
    assert not third.alone and held.exists()
    second.kill()
    third.kill()
    assert start.take_over(wait_s=0) and not held.exists()


def test_another_machine_s_lock_is_left_to_the_user(folder, monkeypatch):
    Run().kill()
    held = lock(folder)
    monkeypatch.setattr(start.platform, "node", lambda: "another-machine")
    assert not start.take_over(wait_s=0) and held.exists()


@pytest.mark.parametrize("cut", ["", '{"rule": "pa', "[]", "\x00\x00"])
def test_a_cut_record_is_removed_and_its_output_built_again(folder, cut):
    outputs = ["results/demo/students/rtn/int4/seed0/packed/manifest.json", "results/demo/" + "long/" * 60 + "x.json"]
    for output in outputs:
        record = record_path(output)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(cut)
    whole = record_path("results/demo/metrics.json")
    whole.write_text('{"rule": "metrics"}')
    (whole.parent / "24").write_text("somebody else's")  # no name of a record
    start.mend_records()
    records, marks = (
        {path.relative_to(place): path.read_text() for path in place.rglob("*") if path.is_file()}
        for place in (folder / ".snakemake/metadata", folder / ".snakemake/incomplete")
    )
    assert list(records) == [Path(whole.name)]
    assert marks.keys() == {record_path(output).relative_to(".snakemake/metadata") for output in outputs}
    assert all(json.loads(mark) == {"external_jobid": None} for mark in marks.values())


def test_a_finished_training_is_kept_until_its_output_is_accepted(folder):
    run = "students/finetune/int4/seed0"
    kept = folder / "results/demo/.checkpoints" / run / "finished"
    for place in (kept, folder / "results/demo" / run / "model"):
        with whole_folder(place) as part:
            (part / "w").write_text("weights")
    record = record_path(f"results/demo/{run}/model/manifest.json")
    mark = folder / ".snakemake/incomplete" / record.relative_to(".snakemake/metadata")
    start.drop_accepted("results/demo")
    assert kept.exists(), "no record yet"
    for path in (record, mark):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    start.drop_accepted("results/demo")
    assert kept.exists(), "the job has not ended"
    mark.unlink()
    (folder / "results/demo" / run / "model/manifest.json").rename(folder / "aside")
    start.drop_accepted("results/demo")
    assert kept.exists(), "Snakemake has deleted the output"
    (folder / "aside").rename(folder / "results/demo" / run / "model/manifest.json")
    start.drop_accepted("results/demo")
    assert not kept.exists()


def test_frozen_files_of_a_clone_are_frozen_again(folder):
    for name in ("data.json", "code/train.json", "code/accepted.jsonl"):
        path = folder / "results/demo/config" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    known = record_path("results/demo/config/data.json")
    known.parent.mkdir(parents=True)
    known.write_text("{}")
    start.recover("results/demo")
    train = record_path("results/demo/config/code/train.json")
    mark = folder / ".snakemake/incomplete" / train.relative_to(".snakemake/metadata")
    assert [path for path in (folder / ".snakemake/incomplete").rglob("*") if path.is_file()] == [mark]
    train.parent.mkdir(parents=True, exist_ok=True)
    train.write_text("{}")
    start.doubt_frozen("results/demo")
    assert not mark.exists(), "its record has come"
