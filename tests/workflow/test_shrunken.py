"""The whole pipeline for real, shrunken: images to page by Snakemake, then again, then after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import started

from grace.files import MANIFEST, check_manifest, read_json, sha256

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("results/shrunken")
STUDENTS = [
    "baseline/bf16", "finetune/int4", "grace/int4", "rtn/int4", "reverse_kl/bf16", "jensen_shannon/bf16", "dist/bf16",
]  # fmt: skip


def _arguments(*more: str) -> list[str]:
    """Of Snakemake on the repository's own Snakefile, with everything that it writes in the working directory."""
    return [
        "--snakefile", str(ROOT / "Snakefile"), "--configfile", str(ROOT / "tests/workflow/config.yaml"),
        "--workflow-profile", str(ROOT / "workflow/profiles/default"), "--cores", "2", *more,
    ]  # fmt: skip


def _snakemake(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        started.snakemake(*_arguments(*arguments)),
        cwd=folder,
        capture_output=True,
        text=True,
        env=started.environment(),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shrunken")
    _snakemake(folder)
    return folder


@pytest.mark.slow
def test_every_output_is_there_and_whole(built: Path) -> None:
    results = built / RESULTS
    folders = ["data", "teacher/model", "tables", "figures", "speed"]
    folders += [f"students/{name}/seed0/model" for name in STUDENTS]
    folders += [f"students/{name}/seed0/packed" for name in STUDENTS if "int4" in name]
    for folder in folders:
        check_manifest(results / folder)
    assert (results / "report/index.html").stat().st_size > 0
    assert json.loads((results / "metrics.json").read_text())
    assert not list(results.rglob("*.part")), "nothing half-written is left"
    left = [path for path in results.glob(".checkpoints/**/*.*") if "finished" not in path.parts]
    assert not left, "checkpoints go when a run ends well; the finished run stays until a later start has accepted it"


@pytest.mark.slow
def test_every_question_has_its_prediction(built: Path) -> None:
    results = built / RESULTS
    for name in ["colour", "object"]:
        asked = pd.read_parquet(results / f"data/benchmarks/{name}.parquet", columns=["id", "answer"])
        assert len(asked) == 30
        for folder in ["teacher", *(f"students/{student}/seed0" for student in STUDENTS)]:
            file = results / folder / f"predictions/{name}.parquet"
            answered = pd.read_parquet(file)
            assert read_json(file.with_name(MANIFEST))["files"][file.name]["sha256"] == sha256(file)
            assert sorted(answered["sample_id"]) == sorted(asked["id"]), folder
            assert answered["score"].between(0, 1).all()


@pytest.mark.slow
def test_a_second_run_finds_nothing_to_do(built: Path) -> None:
    assert "Nothing to be done" in _snakemake(built)


@pytest.mark.slow
def test_a_killed_job_goes_on_from_its_checkpoint(built: Path) -> None:
    """Snakemake and its job are killed during training; the next run finishes it, with the steps that were left."""
    seed = built / RESULTS / "students/finetune/int4/seed0"
    before = {path.name: path.read_bytes() for path in (seed / "model").glob("*.safetensors")}
    curve = (seed / "train.jsonl").read_text()
    goal = str(RESULTS / "students/finetune/int4/seed0/model/manifest.json")
    checkpoints = built / RESULTS / ".checkpoints/students/finetune/int4/seed0"
    running = subprocess.Popen(
        [Path(sys.executable).with_name("snakemake"), *_arguments("--force", goal)], cwd=built,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=started.environment(),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while running.poll() is None and not (checkpoints.is_dir() and any(checkpoints.iterdir())):
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.01)
        assert running.poll() is None, "the job was over before it could be killed"
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert not (seed / "model/manifest.json").exists(), "a killed job leaves no output that looks whole"
    _snakemake(built, "--unlock")
    said = _snakemake(built, goal)
    assert re.search(r"train finetune at int4, seed 0", said)
    logs = [(seed / name).read_text().splitlines() for name in ("train.jsonl", "model/timing.jsonl")]
    steps, timed = ([json.loads(line)["step"] for line in lines] for lines in logs)
    assert steps == timed == sorted(set(steps)) and len(steps) == 40
    assert all(json.loads(line)["seconds"] > 0 for line in logs[1])
    after = {path.name: path.read_bytes() for path in (seed / "model").glob("*.safetensors")}
    assert after == before, "the resumed run ends where the whole one did"
    assert (seed / "train.jsonl").read_text() == curve, "with the same losses, in another time"
