"""docs/my-model.md, followed to the letter."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from family_run import ROOT, snakemake
from hub_snapshots import snapshot
from user_data import write_benchmarks, write_conversations

PAGE = (ROOT / "docs/my-model.md").read_text()
LACKING, READY = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
(MINE,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
(CHECK,) = re.findall(r"```bash\n(grace check mine.yaml)\n```", PAGE)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for role in ("teacher", "student"):
        snapshot(tmp_path / "models" / role, "qwen2_vl", role)
    (tmp_path / "data").mkdir()
    write_conversations(tmp_path / "data/images", tmp_path / "data/conversations.json", 4)
    write_benchmarks(tmp_path / "data/benchmarks", ["mmbench"], 4, tsv=("mmbench",))
    (tmp_path / "mine.yaml").write_text(MINE)
    return tmp_path


def _check(place: Path) -> str:
    words = [sys.executable, "-m", "grace.cli", *CHECK.split()[1:]]
    path = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home"), "PYTHONPATH": str(ROOT / "workflow")}
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, env={**os.environ, **path})
    return done.stdout + done.stderr


@pytest.mark.slow
def test_the_page_is_what_is_printed(place: Path) -> None:
    assert _check(place) == READY
    planned = snakemake(place, "--configfile", "mine.yaml", "--dry-run")
    assert planned.returncode == 0 and "not ready" not in planned.stdout + planned.stderr
    assert "distil grace at int4, seed 0" in planned.stdout + planned.stderr
    shutil.rmtree(place / "data/benchmarks")
    shutil.rmtree(place / "models/student")
    assert _check(place) == LACKING


@pytest.mark.slow
def test_a_run_stops_before_its_first_job_and_a_dry_run_shows_its_plan(place: Path) -> None:
    (place / "data/conversations.json").unlink()
    planned = snakemake(place, "--configfile", "mine.yaml", "--dry-run")
    said = planned.stdout + planned.stderr
    assert planned.returncode == 0 and "not ready: data/conversations.json: no such file" in said
    assert "distil grace at int4, seed 0" in said
    begun = snakemake(place, "--configfile", "mine.yaml")
    said = begun.stdout + begun.stderr
    assert begun.returncode != 0 and "nothing was started" in said and "data/conversations.json: no such file" in said
    assert not list((place / "results").rglob("manifest.json"))
