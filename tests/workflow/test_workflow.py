"""The DAG: what a change of config or code re-runs, and what every rule must declare."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from stub_tree import ROOT, Tree

from grace.benchmarks.registry import ADAPTERS
from grace.cluster.kinds import kinds
from grace.config.frozen import Frozen
from grace.config.load import load_experiment
from grace.config.plan import Plan
from grace.errors import GraceError

REPORT = ["build the page", "draw the figures", "show what was timed", "write the metrics", "write the tables"]
TIMED = ["time prefill and decoding", "time the INT4 GEMM against the dense one"]


def follows(recipe: str, precision: str = "int4", seed: int = 0) -> list[str]:
    """What a new student of this name makes necessary, besides the report."""
    return [f"pack {recipe} at {precision}, seed {seed}", f"evaluate students/{recipe}/{precision}/seed{seed}"]


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


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    """Of another user or on a read-only disk; played by a file where a folder has to be, which stops root too."""
    tree = Tree.make(tmp_path / "tree")
    (tree.folder / ".snakemake").mkdir()
    (tree.folder / ".snakemake/grace").touch()
    done = tree.snakemake("--dry-run", check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and ".snakemake/grace: File exists; Snakemake has to write here" in said
    assert "Traceback" not in said


def test_a_recipes_setting_reruns_that_recipe_and_what_follows(tree: Tree) -> None:
    tree.edit(recipes__finetune={"train": {"learning_rate": 2e-3}})
    name = "finetune at int4, seed 0"
    assert tree.planned() == sorted([f"train {name}", *follows("finetune"), *REPORT])


def test_a_label_reruns_the_report_alone(tree: Tree) -> None:
    tree.edit(recipes__rtn={"post_training": "rtn", "label": "Rounding"})
    assert tree.planned() == REPORT


def test_the_distillations_constants_rerun_what_is_distilled(tree: Tree) -> None:
    tree.edit(method={"omega": 1.0})
    name = "grace at int4, seed 0"
    assert tree.planned() == sorted([f"distil {name}", *follows("grace"), *TIMED, *REPORT])


def test_a_further_recipe_builds_that_recipe(tree: Tree) -> None:
    tree.edit(recipes__kd={"kd": "plain"})
    tree.edit(runs=[{"recipes": ["finetune", "grace", "rtn", "kd"], "precisions": ["int4"], "seeds": [0]}])
    name = "kd at int4, seed 0"
    assert tree.planned() == sorted([f"distil {name}", *follows("kd"), *REPORT])


def test_a_further_seed_builds_its_baseline_and_students(tree: Tree) -> None:
    tree.edit(
        baseline_seeds=[0, 1],
        runs=[
            {"recipes": ["finetune", "grace", "rtn"], "precisions": ["int4"], "seeds": [0]},
            {"recipes": ["finetune"], "precisions": ["int4"], "seeds": [1]},
        ],
    )
    name = "finetune at int4, seed 1"
    baseline = ["train the baseline, seed 1", "evaluate students/baseline/bf16/seed1"]
    assert tree.planned() == sorted([*baseline, f"train {name}", *follows("finetune", seed=1), *REPORT])


def test_a_further_benchmark_trains_nothing(tree: Tree) -> None:
    tree.edit(evaluation={"benchmarks": ["colour", "object", "count"]})
    jobs = tree.planned()
    assert [job for job in jobs if not job.startswith("evaluate ")] == REPORT
    assert len(jobs) == len(REPORT) + 5


def _sources(tree: Tree) -> list[Path]:
    return sorted((tree.folder / "workflow/grace").rglob("*.py"))


def test_comments_docstrings_and_formatting_rerun_nothing(tree: Tree) -> None:
    """In every file of the package."""
    for path in _sources(tree):
        text = path.read_text()
        if not text.startswith(('"', "#")) and text:
            text = f'"""A docstring."""\n{text}'
        text = re.sub(r"^( +)return ", r"\1# why\n\1return ", text, flags=re.MULTILINE)
        path.write_text(f"# a comment\n{text}\n\n# another\n")
    assert tree.planned() == []


@pytest.mark.parametrize(
    "place", [("relational_cka", "relational_cka_sum"), ("objectives/gated", "gated"), ("sampled", "_loss")]
)
def test_a_loss_function_reruns_what_is_distilled_and_what_follows(tree: Tree, place: tuple[str, str]) -> None:
    folder = "teacher" if place[0] == "sampled" else "distill"
    edit_function(tree, f"{folder}/{place[0]}.py", place[1])
    name = "grace at int4, seed 0"
    assert tree.planned() == sorted([f"distil {name}", *follows("grace"), *TIMED, *REPORT])


def test_a_tables_code_reruns_the_tables_and_the_page_that_shows_them(tree: Tree) -> None:
    edit_function(tree, "report/tables/pairs.py", "pairs_table")
    assert tree.planned() == ["build the page", "write the tables"]


def test_the_code_of_a_table_of_times_writes_no_other_table(tree: Tree) -> None:
    edit_function(tree, "report/tables/deployment.py", "deployment_table")
    assert tree.planned() == ["build the page", "show what was timed"]


def test_printing_code_retrains_nothing(tree: Tree) -> None:
    edit_function(tree, "teacher/summary.py", "summary")
    edit_function(tree, "progress.py", "progress")
    edit_function(tree, "environment.py", "environment")
    assert tree.planned() == []


def test_the_configs_code_reruns_nothing(tree: Tree) -> None:
    """Frozen parameters stand for it."""
    edit_function(tree, "config/load.py", "load_experiment")
    assert tree.planned() == []


def test_equal_bits_rerun_nothing(tree: Tree) -> None:
    """A folder made again with the same files, by another revision of the code: what follows holds."""
    packed = "results/demo/students/rtn/int4/seed0/packed"
    before = (tree.folder / packed / "environment.json").read_text()
    tree.snakemake("--quiet", "all", "--force", f"{packed}/manifest.json")
    assert (tree.folder / packed / "environment.json").read_text() != before, "it was made again"
    assert tree.planned() == []


def test_an_accepted_change_reruns_nothing_and_leaves_a_trace(tree: Tree) -> None:
    edit_function(tree, "quant/pack.py", "pack")
    assert len(tree.planned()) == 3 + 3 + len(TIMED) + len(REPORT)
    refused = tree.grace("accept", "--reason", " ", check=False)
    assert refused.returncode == 1 and "--reason is empty" in refused.stderr
    tree.grace("accept", "--reason", "the same numbers in another order")
    assert tree.planned() == []
    (change,) = map(json.loads, (tree.folder / "results/demo/config/code/accepted.jsonl").read_text().splitlines())
    assert (change["subcommand"], change["changed"]) == ("pack", ["grace.quant.pack"])
    said = tree.grace("provenance", "results/demo/students/rtn/int4/seed0/packed").stdout
    assert "accepted" in said and "the same numbers in another order" in said and change["by"] in said
    again = tree.grace("accept", "--reason", "more", check=False)
    assert again.returncode == 1 and "nothing to accept" in again.stderr
    edit_function(tree, "quant/pack.py", "pack")
    assert len(tree.planned()) == 3 + 3 + len(TIMED) + len(REPORT), "a further change is not accepted with it"


def test_an_edit_that_is_undone_runs_nothing_again(tree: Tree) -> None:
    """Of configuration and code, also where a run has frozen it and built something before it was ended."""
    code = tree.folder / "workflow/grace/quant/pack.py"
    texts = code.read_text(), (tree.folder / "config.yaml").read_text()
    edit_function(tree, "quant/pack.py", "pack")
    tree.edit(recipes__rtn={"post_training": "rtn", "scale": "best"})
    frozen = ["code/pack", "students/rtn/int4/seed0", "experiment"]
    packed = "results/demo/students/finetune/int4/seed0/packed/manifest.json"
    tree.snakemake("--quiet", "all", "--", *(f"results/demo/config/{name}.json" for name in frozen), packed)
    (tree.folder / "results/demo/config/experiment.json").unlink()  # as by a run that was ended in the act
    code.write_text(texts[0])
    (tree.folder / "config.yaml").write_text(texts[1])
    assert tree.planned() == sorted([*follows("finetune"), *REPORT]), "what was built from the edited code"


def test_what_a_run_that_was_ended_has_frozen_can_still_be_accepted(tree: Tree) -> None:
    """Only when jobs start does one see that they do, and then their code is frozen."""
    tree.run("git", "init", "-q")
    tree.run("git", "add", "results/demo/config")
    tree.run("git", "-c", "user.name=Test", "-c", "user.email=test@example.org", "commit", "-q", "-m", "built")
    edit_function(tree, "quant/pack.py", "pack")
    tree.snakemake("--quiet", "all", "--", "results/demo/config/code/pack.json")
    refused = tree.grace("accept", "--reason", "the same numbers", check=False)
    assert refused.returncode == 1 and tree.planned() != []
    (command,) = re.findall("`(git checkout .*?)`", refused.stderr)
    tree.run(*command.split())
    tree.grace("accept", "--reason", "the same numbers")
    assert tree.planned() == []


def edit_function(tree: Tree, file: str, name: str) -> None:
    """Let a function do one thing more."""
    path = tree.folder / "workflow/grace" / file
    module = ast.parse(path.read_text())
    (function,) = [n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == name]
    function.body.insert(0, ast.parse(f"edited = {len(function.body)}").body[0])
    path.write_text(ast.unparse(module))


@pytest.mark.parametrize("harness", ADAPTERS)
def test_evaluation_follows_the_code_of_the_chosen_harness(harness: str) -> None:
    experiment = load_experiment(ROOT / "config.yaml")
    evaluation = experiment.evaluation.model_copy(update={"harness": harness})
    frozen = Frozen(Plan(experiment.model_copy(update={"evaluation": evaluation})))
    reached = set(frozen.fingerprint("evaluate")["code"])
    harnesses = {module for module in ADAPTERS.values() if "harness_" in module}
    assert ADAPTERS[harness] in reached and not (harnesses - {ADAPTERS[harness]}) & reached


def test_a_tuned_tile_reruns_no_training() -> None:
    frozen = Frozen(Plan(load_experiment(ROOT / "config.yaml")))
    table = "kernels/w4a16_table/configs.json"
    for subcommand in ("train", "cache-write", "quantize", "pack"):
        assert table not in frozen.fingerprint(subcommand)["data"]
    assert table in frozen.fingerprint("bench-kernel")["data"]


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
    assert tree.planned() == sorted([*follows("rtn"), *REPORT])


@pytest.mark.parametrize("file", ["config.yaml", "workflow/experiments/llava15_7b.yaml"])
def test_shipped_experiments_make_a_dag(tmp_path: Path, file: str) -> None:
    """One whose models are made here and one whose models are fetched."""
    tree = Tree.make(tmp_path / "tree")
    (tree.folder / "config.yaml").write_bytes((ROOT / "config.yaml").read_bytes())
    assert {"evaluate teacher", *REPORT} <= set(tree.planned("--configfile", file))


def test_a_file_of_a_pretrained_folder_that_is_exchanged_is_fetched_again(tmp_path: Path) -> None:
    """By content, also where size and time stay; and a clone that has the results does without the folder."""
    tree = Tree.make(tmp_path / "tree")
    for name in ("teacher", "student"):
        (tree.folder / "models" / name).mkdir(parents=True)
        (tree.folder / "models" / name / "model.safetensors").write_text(f"weights of {name}")
        (tree.folder / "models" / name / "config.json").write_text('{"model_type": "llava"}')
    tree.edit(teacher={"pretrained": "models/teacher"}, student={"pretrained": "models/student"})
    goal = ["results/demo/teacher/model/manifest.json", "results/demo/students/baseline/bf16/seed0/model/manifest.json"]
    tree.snakemake("--quiet", "all", "--", *goal)
    assert tree.planned("--", *goal) == []
    weights = tree.folder / "models/teacher/model.safetensors"
    state, text = weights.stat(), weights.read_text()
    weights.write_text(text.upper())
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert tree.planned("--", *goal) == ["fetch the teacher models/teacher"]
    weights.write_text(text)
    assert tree.planned("--", *goal) == []
    (tree.folder / "models").rename(tmp_path / "elsewhere")
    assert tree.planned("--", *goal) == []


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


def _rules() -> dict[str, str]:
    """The text of every rule."""
    found: dict[str, str] = {}
    for file in sorted((ROOT / "rules").glob("*.smk")):
        _, *parts = re.split(r"^rule (\w+):\n", file.read_text(), flags=re.MULTILINE)
        for name, text in zip(parts[::2], parts[1::2], strict=True):
            assert name not in found, f"{name} stands twice"
            found[name] = text
    return found


@pytest.mark.parametrize("name", _rules())
def test_every_rule_declares_what_it_needs(name: str) -> None:
    """Log, environment and message on each; benchmark, threads, kind and code on each that computes."""
    text = _rules()[name]
    wanted = ["log:", "conda:", "message:", "shell:"]
    wanted += ["params:"] if name != "plan" else []
    wanted += ["output:"] if name not in ("diff", "plan") else []  # what these say is for people: they make nothing
    if "localrule: True" not in text:
        wanted += ["input:", "benchmark:"]
        (kind,) = re.findall(r'\*\*jobs\.resources\("(\w+)"\)', text)
        assert re.findall(r'threads: jobs\.threads\("(\w+)"\)', text) == [kind]
        (subcommand,) = re.findall(r'^ +"grace ([\w ]+)"$', text, re.MULTILINE)
        code = (
            "train"
            if re.search(r"code=(plan\.distil_code|trials\.code)", text)
            else re.findall(r'code=plan\.code\("([\w-]+)"\)', text)[0]
        )
        assert subcommand.replace(" ", "-") == code, "its code is that of the subcommand it calls"
    missing = [word for word in wanted if word not in text]
    assert not missing, f"lacks {missing}"
    shell = text.split("shell:")[1]
    assert not re.findall(r"\{(?:input|output|log)(?:\.\w+)?\}", shell), "quoting"
    assert all(line.count(" --") <= 1 for line in shell.splitlines()), "one flag a line"


def test_every_rule_has_its_kind_of_job(tmp_path: Path) -> None:
    found = kinds(ROOT / "rules")
    assert found["evaluate"] == "evaluate" and found["finish_cache"] == "cache" and found["freeze_code"] is None
    assert set(found) == set(_rules())
    (tmp_path / "new.smk").write_text("rule new:\n    output:\n        'a',\n    shell:\n        'touch {output}'\n")
    with pytest.raises(GraceError, match=r"new.smk: rule new has no kind; give it `resources: "):
        kinds(tmp_path)


def test_linter_and_formatter_pass(tmp_path: Path) -> None:
    tree = Tree.make(tmp_path / "tree")
    tree.run("snakemake", "--lint")
    tree.run("snakefmt", "--check", "Snakefile", "rules")


def test_jobs_per_second_are_limited_on_a_cluster_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Slurm that answers; the rule that runs is a local one."""
    tree = Tree.make(tmp_path / "tree")
    with (tree.folder / "Snakefile").open("a") as file:
        file.write("\n\nonsuccess:\n    print('limited:', workflow.scheduler.job_rate_limiter is not None)\n")
    slurm = tmp_path / "slurm"
    slurm.mkdir()
    for name in ("sbatch", "scontrol"):
        (slurm / name).write_text("#!/bin/sh\n")
        (slurm / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{slurm}{os.pathsep}{os.environ['PATH']}")
    frozen = "results/demo/config/cache.json"
    assert "limited: False" in tree.snakemake("--executor", "local", frozen).stdout
    flags = ("--executor", "slurm", "--slurm-status-command", "squeue", "--jobs", "1", "--force")
    flags += ("--slurm-init-seconds-before-status-checks", "1")
    assert "limited: True" in tree.run("snakemake", *flags, frozen).stdout


def test_a_dry_run_imports_no_torch(tmp_path: Path) -> None:
    wanted = ["grace.config.load", "grace.config.frozen", "grace.config.generate", "grace.provenance.snakemake_records"]
    code = f"import sys; import {', '.join(wanted)}; print(*{{'torch', 'transformers', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_trials_are_made_when_asked_for_alone_and_change_nothing_else(tree: Tree) -> None:
    trials = {"finetune": [{}, {"train": {"learning_rate": 2e-3}}], "grace": [{}, {"method": {"omega": 1.0}}]}
    tree.edit(tuning={"precision": "int4", "seeds": [0], "trials": trials})
    assert tree.planned() == []
    tree.snakemake("--quiet", "all", "--", "tune")
    assert (tree.folder / "results/demo/tuning/trials.md").is_file()
    assert tree.planned() == [] and tree.planned("--", "tune") == []
    tree.grace("records", "save", "results/demo")
    records = (tree.folder / "results/demo/provenance.jsonl").read_text()
    assert '"output":"results/demo/tuning/trials.json"' in records and '"output":"results/demo/.trials' not in records
    trials["grace"][1]["method"]["omega"] = 2.0
    tree.edit(tuning__trials=trials)
    assert tree.planned("--", "tune") == [
        "choose the best trial of each recipe", "evaluate trial 2 of grace, seed 0", "train trial 2 of grace, seed 0",
    ]  # fmt: skip
    assert tree.planned() == []
