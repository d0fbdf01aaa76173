"""The workflow through a real Slurm: run by tests/slurm/run.sh, which starts one; not collected by a plain pytest."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from stub_tree import BIN, ROOT, Tree

from grace.cluster.lock import lock_path
from grace.cluster.retry import limits
from grace.cluster.slurm import check_slurm
from grace.config.resources import Resources
from grace.errors import GraceError

SNAKEMAKE = [sys.executable, str(ROOT / "tests/slurm/quick_snakemake.py")]
# this Slurm keeps no accounting, and a test need not wait 40 s for its first look at a job
SQUEUE = ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "1"]
PROFILE = ["--workflow-profile", "workflow/profiles/slurm", *SQUEUE]

SHRUNKEN = Path(os.environ["GRACE_SHRUNKEN"]).absolute()  # built by a local run, by tests/slurm/run.sh
RESULTS = Path("results/shrunken")
STEPS = yaml.safe_load((ROOT / "tests/slurm/config.yaml").read_text())["finetune"]["steps"]
FINETUNE = RESULTS / "students/finetune/int4/seed0"
TRAINED = str(FINETUNE / "model/manifest.json")
AGAIN = ["--force", "--rerun-triggers", "mtime", "--", TRAINED]  # this job alone, though the folder has moved

# What a stubbed subcommand does before it leaves its marks, by words of its command line.
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
    if sys.argv[1] == "quantize" and not first.exists():
        first.touch()
        held = bytearray(os.urandom(1)) * (900 * 2**20)
        time.sleep(600)
    _leave_marks()
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """The workflow with stubbed subcommands, some of which take their time."""
    tree = Tree.make(tmp_path / "tree")
    with (tree.folder / "workflow/grace/cli/__init__.py").open("a") as file:
        file.write(HOOK)
    return tree


def jobs(rule: str, folder: Path) -> list[dict[str, str]]:
    """What Slurm knows of the jobs of a rule that were submitted from a folder, oldest first."""
    shown = subprocess.run(["scontrol", "--oneliner", "show", "jobs"], capture_output=True, text=True, check=True)
    found = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in shown.stdout.splitlines()]
    mine = [job for job in found if job.get("WorkDir") == str(folder)]
    return [job for job in mine if re.match(rf"rule_{rule}(_wildcards_|$)", job.get("Comment", ""))]


def until(what: str, true: Callable[[], bool], seconds: float = 400, every: float = 0.5) -> None:
    """Wait for something to be so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(every)


@pytest.fixture
def shrunken(tmp_path: Path) -> Path:
    """The shrunken experiment as a local run built it, with Snakemake's records, in a folder of its own."""
    shutil.copytree(SHRUNKEN, tmp_path / "shrunken", symlinks=True, ignore=shutil.ignore_patterns("locks"))
    return tmp_path / "shrunken"


def real(folder: Path, *arguments: str, **resources: dict) -> subprocess.Popen:
    """Snakemake with the real subcommands and the shrunken experiment, through Slurm; it writes snakemake.txt."""
    (folder / "resources.yaml").write_text(yaml.safe_dump({"resources": resources}))
    command = [*SNAKEMAKE, "--snakefile", str(ROOT / "Snakefile"), *SQUEUE]
    command += ["--workflow-profile", str(ROOT / "workflow/profiles/slurm")]
    command += ["--configfile", str(ROOT / "tests/slurm/config.yaml"), "resources.yaml"]
    with (folder / "snakemake.txt").open("w") as words:
        return subprocess.Popen([*command, *arguments], cwd=folder, stdout=words, stderr=words, start_new_session=True)


def ended(running: subprocess.Popen, folder: Path, seconds: float = 500) -> str:
    """Snakemake's words, once it has ended well."""
    try:
        code = running.wait(seconds)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    said = (folder / "snakemake.txt").read_text()
    assert code == 0, said[-4000:]
    return said


def stop_after_a_checkpoint(folder: Path) -> None:
    """Halt the training of `finetune` between its first and its last checkpoint, without ending it."""
    checkpoints = folder / RESULTS / ".checkpoints/students/finetune/int4/seed0"
    until("a checkpoint", lambda: any(checkpoints.glob("step-*/checkpoint.json")), every=0.01)
    os.kill(json.loads(lock_path(checkpoints).read_text())["process"], signal.SIGSTOP)
    assert not (folder / TRAINED).exists(), "the job was over before it could be stopped"


def go_on(folder: Path) -> None:
    """Let a training that was halted go on."""
    checkpoints = folder / RESULTS / ".checkpoints/students/finetune/int4/seed0"
    os.kill(json.loads(lock_path(checkpoints).read_text())["process"], signal.SIGCONT)


def weights(folder: Path) -> dict:
    """Tensors by name. torch comes late: most of the test processes do without its seconds."""
    from safetensors.torch import load_file

    return load_file(folder / FINETUNE / "model/model.safetensors")


def losses(folder: Path) -> list[float]:
    """Of every step, over the global batch."""
    return [json.loads(line)["loss"] for line in (folder / FINETUNE / "train.jsonl").read_text().splitlines()]


def resumed_to_the_same_bits(folder: Path) -> bool:
    steps = [json.loads(line)["step"] for line in (folder / FINETUNE / "train.jsonl").read_text().splitlines()]
    before, after = weights(SHRUNKEN), weights(folder)
    return steps == list(range(steps[0], steps[0] + STEPS)) and all(after[name].equal(before[name]) for name in before)


def start(tree: Tree, *arguments: str) -> subprocess.Popen:
    """Snakemake in the background, in a process group of its own, its words in snakemake.txt."""
    here = {"PYTHONPATH": str(tree.folder / "workflow"), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    with (tree.folder / "snakemake.txt").open("w") as words:
        return subprocess.Popen(
            [*SNAKEMAKE, *PROFILE, *arguments], cwd=tree.folder, env={**os.environ, **here}, stdout=words,
            stderr=words, start_new_session=True,
        )  # fmt: skip


def finish(running: subprocess.Popen, tree: Tree, seconds: float = 500) -> None:
    assert running.wait(seconds) == 0, (tree.folder / "snakemake.txt").read_text()[-4000:]


def test_predictions_are_those_of_a_local_run(tmp_path: Path) -> None:
    """The shrunken experiment with the real subcommands, from nothing to the page; the cache's parts as an array."""
    import pandas as pd

    ended(real(tmp_path), tmp_path)
    found = {path.relative_to(tmp_path): path for path in tmp_path.rglob("predictions/*.parquet")}
    assert found.keys() == {path.relative_to(SHRUNKEN) for path in SHRUNKEN.rglob("predictions/*.parquet")}
    assert len(found) == 1 * 4
    for name, path in found.items():
        pd.testing.assert_frame_equal(pd.read_parquet(path), pd.read_parquet(SHRUNKEN / name), obj=str(name))
    assert len({job["ArrayJobId"] for job in jobs("write_cache", tmp_path)}) == 1, "the cache's parts are one array"
    again = [str(BIN / "snakemake"), "--snakefile", str(ROOT / "Snakefile"), "--dry-run"]
    again += ["--configfile", str(ROOT / "tests/slurm/config.yaml")]
    again += ["--workflow-profile", str(ROOT / "workflow/profiles/default")]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Nothing to be done" in done.stdout + done.stderr


def test_a_job_asks_for_what_the_configuration_says(tree: Tree) -> None:
    tree.edit(
        resources={
            "prepare": {"cpus": 2, "mem_mb": 1500, "runtime": 7},
            "train_teacher": {"gpus": 2, "mem_mb": 1200, "runtime": 3, "partition": "other"},
        }
    )
    tree.run(*SNAKEMAKE, *PROFILE, "results/demo/teacher/model/manifest.json")
    (prepare,), (teacher,) = jobs("prepare", tree.folder), jobs("train_teacher", tree.folder)
    assert (prepare["NumCPUs"], prepare["MinMemoryNode"], prepare["TimeLimit"]) == ("2", "1500M", "00:07:00")
    assert prepare["Partition"] == "main" and "TresPerJob" not in prepare
    assert (teacher["TresPerJob"], teacher["Partition"], teacher["NumNodes"]) == ("gres:gpu:2", "other", "1")
    assert (teacher["MinMemoryNode"], teacher["TimeLimit"]) == ("1200M", "00:03:00")
    assert tree.planned("results/demo/teacher/model/manifest.json") == [], "a local run finds it done"


def test_a_job_out_of_memory_is_sent_again_with_more(tree: Tree) -> None:
    tree.edit(resources={"quantize": {"mem_mb": 1000, "runtime": 5}})
    goal = "results/demo/students/rtn/int4/seed0/model/manifest.json"
    tree.run(*SNAKEMAKE, *PROFILE, goal)
    large = jobs("quantize", tree.folder)
    assert large[0]["JobState"] != "COMPLETED" and large[-1]["JobState"] == "COMPLETED"
    assert [(job["MinMemoryNode"], job["TimeLimit"]) for job in large] == [("1000M", "00:05:00"), ("2000M", "00:05:00")]
    assert (tree.folder / goal).is_file()


def test_a_job_out_of_time_goes_on_from_its_checkpoint_with_more(shrunken: Path) -> None:
    """Slurm ends a training that takes too long; what is sent again has twice the time and ends with the same bits."""
    running = real(shrunken, *AGAIN, finetune={"runtime": 30})
    stop_after_a_checkpoint(shrunken)
    (slow,) = jobs("finetune", shrunken)  # how long a busy machine takes to get here is not known before
    subprocess.run(["scontrol", "update", f"jobid={slow['JobId']}", "timelimit=1"], check=True)
    ended(running, shrunken)
    both = jobs("finetune", shrunken)
    assert [(job["JobState"], job["TimeLimit"]) for job in both] == [("TIMEOUT", "00:01:00"), ("COMPLETED", "01:00:00")]
    assert resumed_to_the_same_bits(shrunken)


def test_a_preempted_job_goes_on_from_its_checkpoint(shrunken: Path) -> None:
    """A job of a partition with a higher tier takes the node; Slurm queues the training again, and it goes on."""
    running = real(shrunken, *AGAIN, finetune={"partition": "scraps"})
    stop_after_a_checkpoint(shrunken)
    (job,) = jobs("finetune", shrunken)
    urgent = ["sbatch", "--partition", "urgent", "--exclusive", "--output", "/dev/null", "--wrap", "true"]
    subprocess.run(urgent, check=True, capture_output=True)

    def runs_again() -> bool:
        """Slurm would wait 2 minutes, which it begins to count only once the job has left its node."""
        subprocess.run(["scontrol", "update", f"jobid={job['JobId']}", "starttime=now"], capture_output=True)
        (now,) = jobs("finetune", shrunken)
        return now["Restarts"] == "1" and now["JobState"] in ("RUNNING", "COMPLETED")

    until("the job runs again", runs_again, every=2)
    ended(running, shrunken)
    (after,) = jobs("finetune", shrunken)
    assert (after["JobId"], after["JobState"], after["Restarts"]) == (job["JobId"], "COMPLETED", "1")
    assert resumed_to_the_same_bits(shrunken)


def test_a_training_out_of_memory_is_sent_again_with_twice_as_much(shrunken: Path) -> None:
    """The real subcommand needs more than 600 MB beside the Snakemake that Slurm runs it in; Slurm ends it."""
    ended(real(shrunken, *AGAIN, finetune={"mem_mb": 600}), shrunken)
    small, large = jobs("finetune", shrunken)
    assert (small["MinMemoryNode"], large["MinMemoryNode"]) == ("600M", "1200M")
    assert small["JobState"] != "COMPLETED" and large["JobState"] == "COMPLETED"
    assert resumed_to_the_same_bits(shrunken)


def test_a_training_on_a_node_that_is_drained_ends_there_and_the_next_one_waits(shrunken: Path) -> None:
    """Draining ends no job; what is submitted meanwhile waits for the node, and Snakemake for that."""
    change = ["scontrol", "update", "nodename=third"]
    running = real(shrunken, *AGAIN, finetune={"partition": "spare"})
    stop_after_a_checkpoint(shrunken)
    subprocess.run([*change, "state=drain", "reason=test"], check=True)
    try:
        go_on(shrunken)
        ended(running, shrunken)
        assert [job["JobState"] for job in jobs("finetune", shrunken)] == ["COMPLETED"]
        assert resumed_to_the_same_bits(shrunken)
        again = real(shrunken, *AGAIN, finetune={"partition": "spare"})
        until("the second job waits", lambda: [j["JobState"] for j in jobs("finetune", shrunken)][1:] == ["PENDING"])
        assert again.poll() is None
    finally:
        subprocess.run([*change, "state=resume"], check=True)
    ended(again, shrunken)
    assert [j["JobState"] for j in jobs("finetune", shrunken)] == ["COMPLETED"] * 2
    assert resumed_to_the_same_bits(shrunken)


def test_a_snakemake_killed_while_a_training_runs_is_started_again(shrunken: Path) -> None:
    """Slurm's job outlives it; the next run's job waits for that one and finds its training done."""
    running = real(shrunken, *AGAIN)
    stop_after_a_checkpoint(shrunken)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert [job["JobState"] for job in jobs("finetune", shrunken)] == ["RUNNING"]
    again = real(shrunken, *AGAIN)
    log = shrunken / RESULTS / "logs/students/finetune/int4/seed0/train.log"
    until("the second job waits", lambda: log.exists() and "waiting for process" in log.read_text())
    first, _ = jobs("finetune", shrunken)
    assert f"(Slurm job {first['JobId']}), which writes it" in log.read_text()
    go_on(shrunken)
    ended(again, shrunken)
    assert [job["JobState"] for job in jobs("finetune", shrunken)] == ["COMPLETED"] * 2
    assert resumed_to_the_same_bits(shrunken) and not list((shrunken / RESULTS / "students").rglob(".*.part"))


def test_two_machines_share_a_training(shrunken: Path) -> None:
    """`nodes: 2`: one torchrun on each, with gloo between them; a step's two micro-batches are one's each."""
    import torch

    ended(real(shrunken, *AGAIN, finetune={"nodes": 2, "partition": "both"}), shrunken)
    (job,) = jobs("finetune", shrunken)
    assert (job["NumNodes"], job["JobState"], job["NodeList"]) == ("2", "COMPLETED", "first,second")
    log = (shrunken / RESULTS / "logs/students/finetune/int4/seed0/train.log").read_text()
    assert "srun --overlap --nodes=2" in log
    assert losses(shrunken)[:10] == pytest.approx(losses(SHRUNKEN)[:10], rel=1e-4)
    one, two = weights(SHRUNKEN), weights(shrunken)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name].float(), one[name].float(), atol=2e-2, rtol=0, msg=name)


def test_a_drained_node_delays_and_nothing_else(tree: Tree) -> None:
    tree.edit(resources={"prepare": {"partition": "spare"}})
    change = ["scontrol", "update", "nodename=third"]
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
    again = start(tree, goal)
    log = tree.folder / "results/demo/logs/students/finetune/int4/seed0/train.log"
    until("the second job waits", lambda: log.exists() and "waiting for process" in log.read_text())
    first, second = (job["JobId"] for job in jobs("finetune", tree.folder))
    assert f"(Slurm job {first}), which writes it" in log.read_text()
    (tree.folder / "go").touch()
    finish(again, tree)
    assert writers.read_text().split() == ["begin", first, "end", first, "begin", second, "end", second]
    assert not list((tree.folder / "results").rglob(".*.lock"))


def test_an_array_larger_than_the_jobs_at_once_is_refused(tree: Tree) -> None:
    tree.edit(cache={"shards": 8})
    goal = "results/demo/teacher/cache/manifest.json"
    done = tree.run(*SNAKEMAKE, *PROFILE, "--jobs", "3", goal, check=False)
    assert done.returncode == 1 and "give --jobs 8 or more" in done.stdout + done.stderr
    assert jobs("prepare", tree.folder) == [], "before anything is submitted"


def test_a_job_that_fails_for_another_reason_asks_for_the_same(tree: Tree) -> None:
    """And for no more than its node has, where it did run out of memory."""
    code = (tree.folder / "workflow/grace/cli/__init__.py").read_text()
    code = code.replace("held = bytearray(os.urandom(1)) * (900 * 2**20)\n        time.sleep(600)", "sys.exit(1)")
    (tree.folder / "workflow/grace/cli/__init__.py").write_text(code)
    tree.edit(resources={"quantize": {"mem_mb": 20000, "runtime": 5}})
    tree.run(*SNAKEMAKE, *PROFILE, "results/demo/students/rtn/int4/seed0/model/manifest.json")
    asked = [(job["MinMemoryNode"], job["TimeLimit"]) for job in jobs("quantize", tree.folder)]
    assert asked == [("20000M", "00:05:00")] * 2


def test_what_a_partition_can_never_give_is_said_before_anything_is_submitted(tree: Tree) -> None:
    subprocess.run(["scontrol", "update", "partitionname=scraps", "maxtime=15"], check=True)
    limits.cache_clear()
    try:
        with pytest.raises(GraceError, match="runtime 60 is above the 15 minutes of partition `scraps`"):
            check_slurm({"prepare": Resources(partition="scraps", runtime=60)}, "squeue")
    finally:
        subprocess.run(["scontrol", "update", "partitionname=scraps", "maxtime=infinite"], check=True)
        limits.cache_clear()
    with pytest.raises(GraceError, match="mem_mb 40000 is above the 32000 MB of the largest node"):
        check_slurm({"prepare": Resources(mem_mb=40000)}, "squeue")


def test_what_slurm_would_refuse_is_a_sentence_with_its_fix() -> None:
    with pytest.raises(GraceError, match=r"keeps no accounting.*add --slurm-status-command squeue"):
        check_slurm({}, "sacct")
    with pytest.raises(
        GraceError,
        match=r"resources\.distil: partition `gpuu`: .*; this Slurm has main, other, both, spare, scraps, urgent",
    ):
        check_slurm({"distil": Resources(partition="gpuu"), "pack": Resources()}, "squeue")
    with pytest.raises(GraceError, match=r"resources\.cache: Slurm refuses .*--gpus=8.*sinfo -Nl"):
        check_slurm({"cache": Resources(gpus=8)}, "squeue")
    check_slurm({"cache": Resources(gpus=2), "pack": Resources(partition="other")}, "squeue")


def test_snakemake_says_what_slurm_would_refuse_before_it_submits_anything(tree: Tree) -> None:
    goal = "results/demo/data/manifest.json"
    done = tree.run(*SNAKEMAKE, "--workflow-profile", "workflow/profiles/slurm", goal, check=False)
    assert done.returncode == 1 and "add --slurm-status-command squeue" in done.stdout + done.stderr
    tree.edit(resources={"prepare": {"partition": "gpuu"}, "distil": {"partition": "notasked"}})
    done = tree.run(*SNAKEMAKE, *PROFILE, goal, check=False)
    assert done.returncode == 1 and "resources.prepare: partition `gpuu`" in done.stdout + done.stderr
    assert "notasked" not in done.stdout + done.stderr and jobs("prepare", tree.folder) == []
