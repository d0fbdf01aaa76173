"""A shipped experiment with small models and data of the same form in place of its own, through Snakemake."""

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import started
import yaml
from hub_snapshots import snapshot
from user_data import write_benchmarks, write_conversations

from grace.config.load import load_experiment
from grace.files import check_manifest, read_json

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "workflow/experiments"
ROWS = 4
CONVERSATIONS = 8
PASS = 256  # tokens of a pass, each of which is filled up to so many; two conversations need more than one
RUNS = [{"recipes": ["finetune", "kd", "grace", "rtn", "awq", "gptq"], "precisions": ["int4"], "seeds": [0]}]
# One process for many on a machine without GPUs, and as little of each stage as shows that it works.
# bf16 takes a processor a hundred times as long as fp32: one family trains in it.
SMALL = {
    "compute_dtype": "float32",
    "cache": {"shards": 1, "audit": 0.1, "pass_tokens": PASS},
    "quantization": {"calibration": 8},
    "finetune": {"epochs": 1, "pass_tokens": PASS},
    "runs": RUNS,
    "bench": {"rows": [1], "batches": [1], "new_tokens": 4, "repeats": 1},
    "resources": {
        kind: {"cpus": 1, "gpus": 0} for kind in ("cache", "finetune", "distil", "quantize", "evaluate", "bench")
    },
}


def swapped(folder: Path, family: str, benchmarks: list[str]) -> dict:
    """Make models and data below `folder`; return what points an experiment to them, and no more."""
    models = {role: snapshot(folder / role, family, role) for role in ("teacher", "student")}
    images, mix = folder / "images", folder / "mix.json"
    write_conversations(images, mix, CONVERSATIONS)
    write_benchmarks(folder / "benchmarks", benchmarks, ROWS, tsv=("mmbench",) if family == "llava" else ())
    return {
        "data": {"sources": [{"path": str(mix), "images": str(images)}], "benchmarks": str(folder / "benchmarks")},
        **{role: {"pretrained": str(path)} for role, path in models.items()},
        "evaluation": {"limit": ROWS, "max_new_tokens": 4},
    }


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The repository's workflow, with everything that it writes below `folder`."""
    profile = ROOT / "workflow/profiles/default"
    command = started.snakemake(
        "--snakefile", ROOT / "Snakefile", "--workflow-profile", profile, "--cores", "2", *arguments
    )
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=started.environment())


def run(folder: Path, name: str, model: str, **more: Any) -> Path:
    """Build everything of the shipped experiment `name` in small; the folder of its results."""
    file = EXPERIMENTS / f"{name}.yaml"
    shipped = load_experiment(file)
    benchmarks = more.get("evaluation", {}).get("benchmarks", shipped.evaluation.benchmarks)
    changes = swapped(folder / "made", model, benchmarks)
    changes["evaluation"] |= more.pop("evaluation", {})
    (folder / "small.yaml").write_text(yaml.safe_dump({**SMALL, **changes, **more}, sort_keys=False))
    done = snakemake(folder, "--configfile", str(file), str(folder / "small.yaml"))
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return folder / "results" / shipped.experiment


def check_whole(results: Path) -> None:
    """Every output of an experiment of `RUNS` is there and holds what it must."""
    experiment = load_experiment(read_json(results / "config/experiment.json"))
    recipes = RUNS[0]["recipes"]
    students = [f"students/{recipe}/int4/seed0" for recipe in recipes]
    for folder in [
        "data",
        "teacher/cache",
        "tables",
        "figures",
        "speed",
        *(f"{student}/packed" for student in students),
    ]:
        check_manifest(results / folder)
    for folder in ["teacher", "students/baseline/bf16/seed0", *students]:
        for name in experiment.evaluation.benchmarks:
            answered = pd.read_parquet(results / folder / f"predictions/{name}.parquet")
            assert 0 < len(answered) <= ROWS and answered["score"].between(0, 1).all(), (folder, name)
    for recipe in ("finetune", "kd", "grace"):
        log = [
            json.loads(line)
            for line in (results / f"students/{recipe}/int4/seed0/train.jsonl").read_text().splitlines()
        ]
        finetune = experiment.recipe_optimisation(experiment.recipes[recipe])
        assert len(log) == finetune.epochs * -(-CONVERSATIONS // finetune.batch), recipe
        assert all(math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in log)
    assert "rcka" in log[0] and "kd" in log[0]
    for name in ("kernel", "decode"):
        assert len(pd.read_csv(results / f"bench/{name}.csv"))
    table = (results / "tables/table2.md").read_text()
    assert all(word in table for word in ("RTN", "AWQ", "GPTQ", "GRACE")), table
    assert (results / "report/index.html").stat().st_size > 0 and read_json(results / "metrics.json")
