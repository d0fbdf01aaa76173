"""The experiment released_qwen3vl, whole and through Snakemake, with small checkpoints in the released formats."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml
from family_run import EXPERIMENTS, ROWS, SMALL, snakemake
from hub_snapshots import snapshot
from released_folders import awq, dense
from user_data import write_benchmarks

from grace.config.constraints import Constraints
from grace.config.frozen import Frozen
from grace.config.load import load_experiment
from grace.config.plan import Plan
from grace.errors import GraceError
from grace.files import read_json
from grace.models import load_model
from grace.report.paper_setup import made_otherwise

FILE = EXPERIMENTS / "released_qwen3vl.yaml"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    made = {role: snapshot(folder / role, "qwen3_vl", role) for role in ("teacher", "student")}
    dense(made["student"], folder / "w8", bits=8, rounded=True)
    dense(made["student"], folder / "w4", rounded=True)
    awq(made["student"], folder / "awq", rounded=True)
    shipped = load_experiment(FILE)
    write_benchmarks(folder / "benchmarks", shipped.evaluation.benchmarks, ROWS)
    released = {"bf16": made["student"], "int8": folder / "w8", "int4": folder / "w4"}
    recipes = {
        name: {"kd": "gated", "rcka": True, "controller": True,
               "released": {precision: {"pretrained": str(path)} for precision, path in paths.items()}}
        for name, paths in (("grace", released), ("awq-folder", {"int4": folder / "awq"}))
    }  # fmt: skip
    changes = {
        "bench": SMALL["bench"], "resources": {kind: {"cpus": 1} for kind in ("evaluate", "bench", "pack")},
        "data": {"benchmarks": str(folder / "benchmarks")}, "recipes": recipes,
        "evaluation": {"limit": ROWS, "max_new_tokens": 4},
        **{role: {"pretrained": str(path)} for role, path in made.items()},
    }  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(changes, sort_keys=False))
    done = snakemake(folder, "--configfile", str(FILE), str(folder / "small.yaml"))
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return folder


@pytest.mark.slow
def test_the_released_students_are_fetched_imported_and_asked_without_any_training(built: Path) -> None:
    results = built / "results/released_qwen3vl"
    assert not list(results.rglob("train*.jsonl")) and not (results / "teacher/cache").exists()
    students = results / "students"
    assert "dense folder" in read_json(students / "grace/int4/seed0/packed/manifest.json")["imported"]
    assert "AWQ folder" in read_json(students / "awq-folder/int4/seed0/packed/manifest.json")["imported"]
    assert not (students / "grace/bf16/seed0/packed").exists()
    asked = [results / "teacher", *sorted(students.glob("*/*/seed0"))]
    assert len(asked) == 6
    for folder in asked:
        for name in load_experiment(FILE).evaluation.benchmarks:
            rows = pd.read_parquet(folder / f"predictions/{name}.parquet")
            assert 0 < len(rows) <= ROWS and rows["score"].between(0, 1).all(), (folder, name)
    table = (results / "tables/table2.md").read_text()
    assert table.count("| GRACE | int") == 2 and "| GRACE, AWQ folder | int4 |" in table
    assert (results / "report/index.html").stat().st_size > 0


@pytest.mark.slow
def test_what_is_asked_is_the_released_weights(built: Path) -> None:
    """The packed folder of a dense release is its function, parameter by parameter."""
    packed = load_model(built / "results/released_qwen3vl/students/grace/int8/seed0/packed").state_dict()
    released = load_model(built / "w8").state_dict()
    assert all((packed[name] == released[name]).all() for name in released)


@pytest.mark.slow
def test_a_checkpoint_that_is_exchanged_is_fetched_again(built: Path) -> None:
    file = built / "w8/config.json"
    before = file.read_text()
    try:
        file.write_text(before + "\n")
        said = snakemake(built, "--configfile", str(FILE), str(built / "small.yaml"), "--dry-run")
        jobs = (said.stdout + said.stderr).splitlines()
        assert any(line.endswith(f"fetch {built / 'w8'}") for line in jobs)
        assert not any(line.endswith(f"fetch {built / 'w4'}") for line in jobs)
    finally:
        file.write_text(before)


def _experiment(**changes: Any) -> Any:
    return load_experiment({**yaml.safe_load(FILE.read_text()), **changes})


GRACE = {"kd": "gated", "rcka": True, "controller": True}
INT4 = {"released": {"int4": {"pretrained": "a/b"}}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipes": {"grace": {**GRACE, **INT4}}}, r"recipes\.grace\.released has no bf16; it has int4"),
        ({"recipes": {"grace": {**INT4, "train": {"steps": 3}}}}, "a released student is not made here"),
        ({"recipes": {"grace": {"released": {"int2": {"pretrained": "a/b"}}}}}, "released.int2: there are releases at"),
        ({"recipes": {}, "runs": [{"recipes": ["grace"], "precisions": ["int4"], "seeds": [0]}]},
         r"finetune: is not set, and runs\[0\] trains `grace`"),
        ({"runs": [{"recipes": ["rtn", "grace"], "precisions": ["int4"], "seeds": [0]}]},
         "data.sources is empty, and `rtn` is made from them"),
        ({"recipes": {"other": {"kd": "plain", "start": "grace/bf16"}, "grace": {**GRACE, **INT4}}},
         "no trained recipe `grace`"),
    ],
)  # fmt: skip
def test_what_a_released_recipe_cannot_have_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(GraceError, match=said):
        _experiment(**changes)


def test_each_student_has_its_own_source_and_no_rule_that_trains(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = Plan(_experiment())
    only = Constraints(plan.experiment)
    wildcards = SimpleNamespace(recipe="grace", precision="int8", seed="0")
    assert '"model": "ForeverBlue/Qwen3-VL-2B-GRACE-W8G128"' in Frozen(plan).student(wildcards)
    assert only.released == r"grace|awq\-folder" and not plan.curves
    for pattern in (only.trained, only.distilled, only.rounded, only.made):
        assert not set(pattern.split("|")) & set(only.released.split("|"))


def test_printed_numbers_stand_beside_the_authors_checkpoints_alone() -> None:
    ours = _experiment()
    assert made_otherwise(ours, ours.recipes["grace"], True) == []
    other = _experiment(
        recipes={"grace": {**GRACE, **INT4}}, runs=[{"recipes": ["grace"], "precisions": ["int4"], "seeds": [0]}]
    )
    assert made_otherwise(other, other.recipes["grace"], True) == ["a/b is no hub id of the authors'"]
