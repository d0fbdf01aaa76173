"""A job's result takes its place only when it was made alone and from what is there at the end."""

import os
import subprocess
import sys
import time

import pytest

from grace.cluster import job as jobs
from grace.cluster.job import job
from grace.errors import GraceError
from grace.files import read_json, whole_file, whole_folder, write_json


@pytest.fixture
def place(tmp_path):
    write_json(tmp_path / "run.json", {"seed": 0})
    with whole_folder(tmp_path / "model") as folder:
        (folder / "weights").write_bytes(bytes(1000))
    (tmp_path / "old").mkdir()
    (tmp_path / "old/kept").write_text("the old result")
    return tmp_path


def write(place, meanwhile=lambda: None):
    with (
        job(place / "old", files=[place / "run.json"], folders=[place / "model", None]),
        whole_folder(place / "old") as out,
    ):
        (out / "made").write_text("the new result")
        meanwhile()


def test_reports_read_tables_beside_frozen_parameters(tmp_path):
    (tmp_path / "kernel.csv").write_text("rows,seconds\n1,2\n")
    with job(tmp_path / "out.md", files=(tmp_path / "kernel.csv",), subcommand="report-tables"):
        (tmp_path / "out.md").write_text("made")


def test_a_result_replaces_the_old_one(place):
    write(place)
    assert (place / "old/made").is_file() and not (place / "old/kept").exists()
    assert sorted(path.name for path in place.iterdir()) == ["model", "old", "run.json"]


def edited_parameters(place):
    write_json(place / "run.json", {"seed": 1})


def removed_parameters(place):
    (place / "run.json").unlink()


def rebuilt_input(place):
    with whole_folder(place / "model") as folder:
        (folder / "weights").write_bytes(b"1" * 1000)


@pytest.mark.parametrize("meanwhile", [edited_parameters, removed_parameters, rebuilt_input])
def test_an_input_that_changed_meanwhile_leaves_the_old_result(place, meanwhile):
    with pytest.raises(GraceError, match=r"an input of this job, edited or replaced since it started"):
        write(place, lambda: meanwhile(place))
    assert (place / "old/kept").is_file() and not list(place.rglob("*.part"))


def test_an_edit_that_keeps_size_and_time_is_seen(place):
    path = place / "run.json"
    before = path.stat()

    def edit():
        path.write_text(path.read_text().replace("0", "7"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(GraceError, match=r"run\.json: an input of this job"):
        write(place, edit)


def test_equal_contents_at_another_time_are_no_change(place):
    write(place, lambda: write_json(place / "run.json", {"seed": 0}))
    assert (place / "old/made").is_file()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_folder_is_refused_before_the_work(place, damage):
    weights = place / "model/weights"
    if damage == "flip":
        with weights.open("r+b") as file:
            file.seek(500)
            file.write(b"\x10")
    elif damage == "cut":
        os.truncate(weights, 999)
    else:
        weights.unlink()
    started = []
    with pytest.raises(GraceError, match=r"model: damaged \(weights (differs|is missing)\)"):
        write(place, lambda: started.append(1))
    assert not started and (place / "old/kept").is_file()


def test_what_killed_writers_left_is_removed(place):
    left = [place / ".old.1-aaaa.part", place / "old/.kept.1-bbbb.part"]
    for path in left:
        path.mkdir()
    (place / ".other.1-cccc.part").mkdir()  # another output's, whose writer may live
    with job(place / "old"):
        assert not any(path.exists() for path in left)
    assert (place / ".other.1-cccc.part").exists()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with one subcommand, in the place of ours."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "cli.py").write_text("def work():\n    from grace.steps import step\n    step()\n")
    (folder / "steps.py").write_text("def step():\n    return 1\n\n\ndef other():\n    return 1\n")
    monkeypatch.setattr(jobs, "PACKAGE", folder)
    return folder


def test_code_that_was_edited_meanwhile_is_named(place, package):
    with (
        pytest.raises(GraceError, match=r"^grace\.steps: the code of this job, edited"),
        job(place / "old", subcommand="work"),
        whole_file(place / "old/made") as part,
    ):
        part.write_text("made by the code as it was")
        (package / "steps.py").write_text("def step():\n    return 2\n\n\ndef other():\n    return 1\n")
    assert not (place / "old/made").exists()


def test_a_comment_and_code_of_others_edited_meanwhile_do_not_matter(place, package):
    with job(place / "old", subcommand="work"), whole_file(place / "old/made") as part:
        part.write_text("made by the code as it was")
        (package / "steps.py").write_text("def step():\n    # why\n    return 1\n\n\ndef other():\n    return 2\n")
    assert (place / "old/made").exists()


ORPHAN = """
import sys, time
from pathlib import Path
from grace.cluster.job import job
from grace.files import whole_folder
place = Path(sys.argv[1])
with job(place / "old", files=[place / "run.json"]), whole_folder(place / "old") as out:
    (out / "made").write_text("by the orphan")
    print("writing", flush=True)
    sys.stdin.readline()
"""


def test_an_orphan_under_older_parameters_renames_nothing_over_a_newer_result(place):
    """What a killed Snakemake leaves running when the next one has frozen other parameters."""
    orphan = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    assert orphan.stdout.readline() == "writing\n"
    write_json(place / "run.json", {"seed": 1})
    _, said = orphan.communicate("\n")
    assert orphan.returncode and "run.json: an input of this job" in said
    write(place)
    assert (place / "old/made").read_text() == "the new result"
    assert "weights" in read_json(place / "model/manifest.json")["files"]


HOLDER = """
import sys, time
from pathlib import Path
from grace.cluster.job import job

with job(Path(sys.argv[1])):
    Path(sys.argv[2]).touch()
    time.sleep(60)
"""


def test_a_second_job_of_an_output_waits_for_the_first_however_that_ends(tmp_path):
    held = tmp_path / "held"
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out"), str(held)])
    try:
        while not held.exists():
            assert first.poll() is None
            time.sleep(0.02)
        with (
            pytest.raises(GraceError, match=f"is being written by process {first.pid} on"),
            job(tmp_path / "out", wait_s=0.2),
        ):
            pass
        with job(tmp_path / "other", wait_s=0.2):
            pass
    finally:
        first.kill()
        first.wait()
    with job(tmp_path / "out", wait_s=5.0):
        pass
