"""The DAG: what a change of config or code re-runs, and what every rule must declare."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from stub_tree import ROOT, Tree

from grace.benchmarks.registry import ADAPTERS
from grace.config.load import load_experiment
from grace.config.plan import Plan

REPORT = ["build the page", "draw the figures", "write the metrics", "write the tables"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """An experiment that was built once."""
    tree = Tree.make(tmp_path_factory.mktemp("built") / "tree")
    tree.snakemake("--quiet", "all")
    return tree


@pytest.fixture
def tree(built: Tree, tmp_path: Path) -> Tree:
    return built.copy(tmp_path / "tree")


def test_a_second_run_finds_nothing_to_do(built: Tree) -> None:
    assert built.planned() == []


def test_a_recipes_setting_reruns_that_recipe_and_what_follows(tree: Tree) -> None:
    tree.edit(recipes__finetune={"train": {"learning_rate": 2e-3}})
    name = "finetune at int4, seed 0"
    assert tree.planned() == sorted([f"train {name}", f"pack {name}", f"evaluate {name}", *REPORT])


def test_a_label_reruns_the_report_alone(tree: Tree) -> None:
    tree.edit(recipes__rtn={"post_training": "rtn", "label": "Rounding"})
    assert tree.planned() == REPORT


def test_the_distillations_constants_rerun_what_is_distilled(tree: Tree) -> None:
    tree.edit(method={"omega": 1.0})
    name = "grace at int4, seed 0"
    timed = ["time prefill and decoding", "time the integer product against the dense one"]
    assert tree.planned() == sorted([f"distil {name}", f"pack {name}", f"evaluate {name}", *timed, *REPORT])


def test_a_further_recipe_builds_that_recipe(tree: Tree) -> None:
    tree.edit(recipes__kd={"kd": "plain"})
    tree.edit(runs=[{"recipes": ["finetune", "grace", "rtn", "kd"], "precisions": ["int4"], "seeds": [0]}])
    name = "kd at int4, seed 0"
    assert tree.planned() == sorted([f"distil {name}", f"pack {name}", f"evaluate {name}", *REPORT])


def test_a_further_seed_builds_its_baseline_and_students(tree: Tree) -> None:
    tree.edit(
        baseline_seeds=[0, 1],
        runs=[
            {"recipes": ["finetune", "grace", "rtn"], "precisions": ["int4"], "seeds": [0]},
            {"recipes": ["finetune"], "precisions": ["int4"], "seeds": [1]},
        ],
    )
    name = "finetune at int4, seed 1"
    expected = ["train the baseline, seed 1", "evaluate baseline, 2 students", "evaluate finetune, 2 students"]
    assert tree.planned() == sorted([*expected, f"train {name}", f"pack {name}", *REPORT])


def test_a_further_benchmark_trains_nothing(tree: Tree) -> None:
    tree.edit(evaluation={"benchmarks": ["colour", "object", "count"]})
    jobs = tree.planned()
    assert [job for job in jobs if not job.startswith("evaluate ")] == REPORT
    assert len(jobs) == len(REPORT) + 5


def test_with_gpus_each_student_is_asked_by_a_job_of_its_own(tree: Tree) -> None:
    tree.edit(runs=[{"recipes": ["finetune", "grace", "rtn"], "precisions": ["int4", "int8"], "seeds": [0]}])
    assert "evaluate grace, 2 students" in tree.planned()
    tree.edit(resources={"evaluate": {"gpus": 1}})
    planned = tree.planned()
    asked = [job for job in planned if job.startswith("evaluate ")]
    assert asked == [f"evaluate {recipe} at int8, seed 0" for recipe in ("finetune", "grace", "rtn")], "int4 is there"


def test_code_reruns_the_jobs_that_import_it(tree: Tree) -> None:
    """The report's code reaches the report; the config's reaches none, because frozen parameters stand for it."""
    for name in ("report/commands.py", "config/schema.py", "cli.py"):
        with (tree.folder / "workflow/grace" / name).open("a") as file:
            file.write("# another comment\n")
    assert tree.planned() == REPORT


@pytest.mark.parametrize("harness", ADAPTERS)
def test_evaluation_follows_the_code_of_the_chosen_harness(harness: str) -> None:
    experiment = load_experiment(ROOT / "config.yaml")
    evaluation = experiment.evaluation.model_copy(update={"harness": harness})
    plan = Plan(experiment.model_copy(update={"evaluation": evaluation}))
    assert plan.adapter == ADAPTERS[harness]
    assert any(path.endswith(f"{plan.adapter.rpartition('.')[2]}.py") for path in plan.code(plan.adapter))
    assert "plan.adapter" in (ROOT / "rules/eval.smk").read_text()


def test_a_tuned_tile_reruns_no_training() -> None:
    plan = Plan(load_experiment(ROOT / "config.yaml"))
    for subcommand in ("train.commands", "teacher.commands", "quant.pack"):
        assert not any("w4a16_table" in path for path in plan.code(f"grace.{subcommand}"))
    assert any(path.endswith("w4a16_table/configs.json") for path in plan.code("grace.bench.commands"))


def test_touched_code_and_other_resources_rerun_nothing(tree: Tree) -> None:
    for path in (tree.folder / "workflow/grace").rglob("*.py"):
        path.touch()
    tree.edit(resources={"distil": {"mem_mb": 4000, "runtime": 5}})
    assert tree.planned() == []


def test_an_edit_while_jobs_wait_reaches_no_job(tree: Tree) -> None:
    """A job's parameters are the frozen ones, which an edit changes only in the next run."""
    frozen = tree.folder / "results/demo/config/students/grace/int4/seed0.json"
    before = frozen.read_text()
    tree.edit(method={"omega": 1.0})
    tree.snakemake("--quiet", "all", "--until", "freeze_student")
    assert frozen.read_text() != before and '"omega": 1.0' in frozen.read_text()


def test_a_missing_output_is_made_again_with_what_follows(tree: Tree) -> None:
    (tree.folder / "results/demo/students/rtn/int4/seed0/packed/manifest.json").unlink()
    assert tree.planned() == sorted(["pack rtn at int4, seed 0", "evaluate rtn at int4, seed 0", *REPORT])


@pytest.mark.parametrize("file", ["config.yaml", "workflow/experiments/llava15_7b.yaml"])
def test_shipped_experiments_make_a_dag(tmp_path: Path, file: str) -> None:
    """One whose models are made here and one whose models are fetched."""
    tree = Tree.make(tmp_path / "tree")
    (tree.folder / "config.yaml").write_bytes((ROOT / "config.yaml").read_bytes())
    assert {"evaluate the teacher", *REPORT} <= set(tree.planned("--configfile", file))


def test_the_slurm_profile_makes_the_same_jobs(built: Tree, tmp_path: Path) -> None:
    tree = Tree.make(tmp_path / "tree")
    said = tree.run("snakemake", "--dry-run", "--workflow-profile", "workflow/profiles/slurm")
    assert "distil grace at int4, seed 0" in said.stdout + said.stderr


def test_the_kubernetes_job_runs_a_command_that_makes_a_dag(tmp_path: Path) -> None:
    """Its container's own words, as a dry run; the job itself needs a cluster."""
    job = yaml.safe_load((ROOT / "workflow/profiles/kubernetes/job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (script,) = container["args"]
    *_, last = script.splitlines()
    tree = Tree.make(tmp_path / "tree")
    said = tree.run(*container["command"], script.replace(last, f"{last} --dry-run").replace(".venv/bin/", ""))
    assert "distil grace at int4, seed 0" in said.stdout + said.stderr


def test_a_wrong_key_stops_before_anything_runs(tree: Tree) -> None:
    tree.edit(recipes__grace={"kd": "gated", "rkca": True})
    done = tree.snakemake(check=False)
    assert done.returncode == 1
    assert "config.yaml: `recipes.grace.rkca` is not a key; did you mean `rcka`?" in done.stderr


def test_every_rule_declares_what_it_needs() -> None:
    """Log, environment and message on each; benchmark, threads, resources and code on each that computes."""
    for file in sorted((ROOT / "rules").glob("*.smk")):
        rules = re.split(r"^ *rule ?(\w*):\n", file.read_text(), flags=re.MULTILINE)
        for name, text in zip(rules[1::2], rules[2::2], strict=True):
            text = text.split("\nuse rule ")[0]
            wanted = ["log:", "conda:", "params:", "message:", "shell:"]
            wanted += ["output:"] if name != "diff" else []  # it compares, and makes nothing that others need
            if name != "diff" and not name.startswith("freeze"):
                wanted += ["input:", "code=plan.code(", "benchmark:", "threads: plan.threads(", "**plan.resources("]
                assert len(re.findall(r'^ +"grace ', text, re.MULTILINE)) == 1, f"{file.name}: {name}: one subcommand"
            missing = [word for word in wanted if word not in text]
            assert not missing, f"{file.name}: {name} lacks {missing}"
            assert not re.findall(r"\{(?:input|output|log)(?:\.\w+)?\}", text.split("shell:")[1]), f"{name}: quoting"


def test_linter_and_formatter_pass(tmp_path: Path) -> None:
    tree = Tree.make(tmp_path / "tree")
    tree.run("snakemake", "--lint")
    tree.run("snakefmt", "--check", "Snakefile", "rules")


def test_a_dry_run_imports_no_torch(tmp_path: Path) -> None:
    wanted = ["grace.config.load", "grace.config.plan", "grace.config.generate", "grace.provenance.snakemake_records"]
    code = f"import sys; import {', '.join(wanted)}; print(*{{'torch', 'transformers', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
