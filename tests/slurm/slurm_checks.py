"""The workflow through a real Slurm: run by tests/slurm/run.sh, which starts one; not collected by a plain pytest."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grace.cluster.slurm import check_slurm
from grace.config.sections import Resources
from grace.errors import GraceError
from stub_tree import BIN, ROOT, Tree

# this Slurm keeps no accounting, and a test need not wait as long between two looks as a shared cluster would like
SQUEUE = ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "3"]
PROFILE = ["--workflow-profile", "workflow/profiles/slurm", *SQUEUE]

# What a stubbed verb does before it leaves its marks, by words of its command line.
HOOK = """

_leave_marks = main


def main():
    import os, sys, time
    from pathlib import Path
    from grace.cluster.lock import one_writer

    command = " ".join(sys.argv[1:])
    first = Path("first-" + sys.argv[1])
    if "/students/finetune/" in command and sys.argv[1] == "train":
        if Path("one-writer").exists():
            with one_writer(sys.argv[sys.argv.index("--checkpoints") + 1]), open("writers", "a") as writers:
                writers.write(f"begin {os.environ['SLURM_JOB_ID']}\\n"), writers.flush()
                while not Path("go").exists():
                    time.sleep(0.2)
                writers.write(f"end {os.environ['SLURM_JOB_ID']}\\n"), writers.flush()
                _leave_marks()
                return
        if not first.exists():
            first.touch()
            time.sleep(600)
    if sys.argv[1] == "quantize" and not first.exists():
        first.touch()
        held = bytearray(os.urandom(1)) * (900 * 2**20)
        time.sleep(600)
    _leave_marks()
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """The workflow with stubbed verbs, some of which take their time."""
    tree = Tree.make(tmp_path / "tree")
    with (tree.folder / "workflow/grace/cli.py").open("a") as file:
        file.write(HOOK)
    return tree


def jobs(rule: str, folder: Path) -> list[dict[str, str]]:
    """What Slurm knows of the jobs of a rule that were submitted from a folder, oldest first."""
    shown = subprocess.run(["scontrol", "--oneliner", "show", "jobs"], capture_output=True, text=True, check=True)
    found = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in shown.stdout.splitlines()]
    mine = [job for job in found if job["WorkDir"] == str(folder)]
    return [job for job in mine if re.match(rf"rule_{rule}(_wildcards_|$)", job.get("Comment", ""))]


def until(what: str, true: Callable[[], bool], seconds: float = 240) -> None:
    """Wait for something to be so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.5)


def start(tree: Tree, *arguments: str) -> subprocess.Popen:
    """Snakemake in the background, in a process group of its own, its words in snakemake.txt."""
    here = {"PYTHONPATH": str(tree.folder / "workflow"), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    with (tree.folder / "snakemake.txt").open("w") as words:
        return subprocess.Popen(
            ["snakemake", *PROFILE, *arguments], cwd=tree.folder, env={**os.environ, **here}, stdout=words,
            stderr=words, start_new_session=True,
        )  # fmt: skip


def finish(running: subprocess.Popen, tree: Tree, seconds: float = 300) -> None:
    assert running.wait(seconds) == 0, (tree.folder / "snakemake.txt").read_text()[-4000:]


def test_a_job_asks_for_what_the_configuration_says(tree: Tree) -> None:
    tree.edit(
        resources={
            "prepare": {"cpus": 2, "mem_mb": 1500, "runtime": 7},
            "train_teacher": {"gpus": 2, "mem_mb": 1200, "runtime": 3, "partition": "other"},
        }
    )
    tree.run("snakemake", *PROFILE, "results/demo/teacher/model/manifest.json")
    (prepare,), (teacher,) = jobs("prepare", tree.folder), jobs("train_teacher", tree.folder)
    assert (prepare["NumCPUs"], prepare["MinMemoryNode"], prepare["TimeLimit"]) == ("2", "1500M", "00:07:00")
    assert prepare["Partition"] == "main" and "TresPerJob" not in prepare
    assert (teacher["TresPerJob"], teacher["Partition"], teacher["NumNodes"]) == ("gres:gpu:2", "other", "1")
    assert (teacher["MinMemoryNode"], teacher["TimeLimit"]) == ("1200M", "00:03:00")
    assert tree.planned("results/demo/teacher/model/manifest.json") == [], "a local run finds it done"


def test_a_job_out_of_time_or_memory_is_sent_again_with_more(tree: Tree) -> None:
    tree.edit(resources={"finetune": {"mem_mb": 1000, "runtime": 1}, "quantize": {"mem_mb": 1000, "runtime": 5}})
    goals = [f"results/demo/students/{name}/int4/seed0/model/manifest.json" for name in ("finetune", "rtn")]
    tree.run("snakemake", *PROFILE, *goals)
    slow, large = jobs("finetune", tree.folder), jobs("quantize", tree.folder)
    assert [job["JobState"] for job in slow] == ["TIMEOUT", "COMPLETED"]
    assert [(job["TimeLimit"], job["MinMemoryNode"]) for job in slow] == [("00:01:00", "1000M"), ("00:02:00", "2000M")]
    assert large[0]["JobState"] != "COMPLETED" and large[-1]["JobState"] == "COMPLETED"
    assert [job["MinMemoryNode"] for job in large] == ["1000M", "2000M"]
    assert all((tree.folder / goal).is_file() for goal in goals)


def test_a_drained_node_delays_and_nothing_else(tree: Tree) -> None:
    change = ["scontrol", "update", "nodename=localhost"]
    subprocess.run([*change, "state=drain", "reason=test"], check=True)
    try:
        running = start(tree, "results/demo/data/manifest.json")
        until("the job waits", lambda: [job["JobState"] for job in jobs("prepare", tree.folder)] == ["PENDING"])
        time.sleep(5)
        assert running.poll() is None and not (tree.folder / "results/demo/data/manifest.json").exists()
    finally:
        subprocess.run([*change, "state=resume"], check=True)
    finish(running, tree)
    assert [job["JobState"] for job in jobs("prepare", tree.folder)] == ["COMPLETED"]


def test_a_preempted_job_goes_on_where_it_was_queued_again(tree: Tree) -> None:
    """Slurm puts a preempted job back in its queue; Snakemake waits, and the job's second start finishes it."""
    goal = "results/demo/students/finetune/int4/seed0/model/manifest.json"
    running = start(tree, goal)
    until("the job runs", (tree.folder / "first-train").exists)
    (job,) = jobs("finetune", tree.folder)
    subprocess.run(["scontrol", "requeue", job["JobId"]], check=True)
    finish(running, tree, 600)
    (after,) = jobs("finetune", tree.folder)
    assert (after["JobId"], after["JobState"], after["Restarts"]) == (job["JobId"], "COMPLETED", "1")
    assert (tree.folder / goal).is_file()


def test_a_killed_snakemake_never_makes_two_writers(tree: Tree) -> None:
    """Its job runs on and is submitted again by the next run, where it waits for the first."""
    (tree.folder / "one-writer").touch()
    goal = "results/demo/students/finetune/int4/seed0/model/manifest.json"
    writers = tree.folder / "writers"
    running = start(tree, goal)
    until("the job writes", writers.exists)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert [job["JobState"] for job in jobs("finetune", tree.folder)] == ["RUNNING"], "Slurm's job outlives Snakemake"
    tree.run("snakemake", "--unlock")
    again = start(tree, goal)
    log = tree.folder / "results/demo/logs/students/finetune/int4/seed0/train.log"
    until("the second job waits", lambda: log.exists() and "waiting for process" in log.read_text())
    first, second = (job["JobId"] for job in jobs("finetune", tree.folder))
    assert f"(Slurm job {first}), which writes it" in log.read_text()
    (tree.folder / "go").touch()
    finish(again, tree)
    assert writers.read_text().split() == ["begin", first, "end", first, "begin", second, "end", second]
    assert not list((tree.folder / "results").rglob(".*.lock"))


def test_what_slurm_would_refuse_is_a_sentence_with_its_fix() -> None:
    with pytest.raises(GraceError, match=r"keeps no accounting.*add --slurm-status-command squeue"):
        check_slurm({}, "sacct")
    with pytest.raises(GraceError, match=r"resources\.distil: partition `gpuu`: .*; this Slurm has main, other"):
        check_slurm({"distil": Resources(partition="gpuu"), "pack": Resources()}, "squeue")
    with pytest.raises(GraceError, match=r"resources\.cache: Slurm refuses .*--gpus=8.*sinfo -Nl"):
        check_slurm({"cache": Resources(gpus=8)}, "squeue")
    check_slurm({"cache": Resources(gpus=2), "pack": Resources(partition="other")}, "squeue")


def test_without_accounting_snakemake_says_so_instead_of_waiting_for_ever(tree: Tree) -> None:
    done = tree.run(
        "snakemake", "--workflow-profile", "workflow/profiles/slurm", "results/demo/data/manifest.json", check=False
    )
    assert done.returncode == 1 and "add --slurm-status-command squeue" in done.stdout + done.stderr
    assert jobs("prepare", tree.folder) == []


def test_predictions_are_those_of_a_local_run(tmp_path: Path) -> None:
    """The shrunken experiment with the real verbs, end to end, both ways."""
    command = [str(BIN / "snakemake"), "--snakefile", str(ROOT / "Snakefile")]
    command += ["--configfile", str(ROOT / "tests/end_to_end/config.yaml")]
    profiles = {"slurm": SQUEUE, "default": ["--cores", "2"]}
    for name, more in profiles.items():
        folder = tmp_path / name
        folder.mkdir()
        profile = ["--workflow-profile", str(ROOT / "workflow/profiles" / name)]
        done = subprocess.run([*command, *profile, *more], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = {
        name: {path.relative_to(tmp_path / name): path for path in (tmp_path / name).rglob("predictions/*.parquet")}
        for name in profiles
    }
    assert found["slurm"].keys() == found["default"].keys() and len(found["slurm"]) == 2 * 5
    for name, path in found["slurm"].items():
        pd.testing.assert_frame_equal(pd.read_parquet(path), pd.read_parquet(found["default"][name]), obj=str(name))
    again = [*command, "--dry-run", "--workflow-profile", str(ROOT / "workflow/profiles/default")]
    done = subprocess.run(again, cwd=tmp_path / "slurm", capture_output=True, text=True, check=True)
    assert "Nothing to be done" in done.stdout + done.stderr
