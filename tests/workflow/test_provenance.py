"""Where an output comes from, and what a run would cost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from fake_results import make_results
from stub_tree import ROOT, Tree, user_cache

from grace.cluster.estimate import left_to_do, plan
from grace.config.accepted import accepted, accepted_file, read_fingerprint
from grace.environment import environment
from grace.errors import GraceError
from grace.files import read_json, sha256, write_json, write_manifest
from grace.provenance.cell import cell
from grace.provenance.snakemake_records import FORMAT, benchmark, read_record, read_rows, write_rows
from grace.provenance.tree import provenance
from grace.provenance.verify import check
from grace.report.tables.write import write_tables
from grace.results.read import read_results

SEED = "results/demo/students/grace/int4/seed0"


@pytest.fixture(autouse=True)
def known_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked here of a tree's code is kept, and known, where its own commands keep it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(user_cache()))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A stubbed experiment up to one packed student, with its records saved."""
    tree = Tree.make(tmp_path_factory.mktemp("provenance") / "tree")
    tree.snakemake("--quiet", "all", "--", f"{SEED}/packed/manifest.json")
    tree.grace("records", "save", "results/demo")
    return tree


@pytest.fixture
def tree(built: Tree, tmp_path: Path) -> Tree:
    return built.copy(tmp_path / "tree")


def made_by(found: dict) -> dict[str, str]:
    return {name.removeprefix("results/demo/"): step["rule"] for name, step in found["chain"].items()}


def test_the_chain_leads_back_to_the_data(built: Tree, capsys: pytest.CaptureFixture) -> None:
    found = provenance(built.folder / SEED / "packed", as_json=True)
    assert json.loads(capsys.readouterr().out) == found
    assert found["output"] == f"{SEED}/packed/manifest.json"
    rules = made_by(found)
    assert rules["students/grace/int4/seed0/packed/manifest.json"] == "pack"
    assert rules["students/grace/int4/seed0/model/manifest.json"] == "distil"
    assert {"train_baseline", "finish_cache", "write_cache", "train_teacher", "prepare"} <= set(rules.values())
    others = [rule for rule in rules.values() if rule.startswith(("evaluate", "quantize", "finetune"))]
    assert not others, "nothing that it was not made from"
    step = found["chain"][f"{SEED}/model/manifest.json"]
    frozen = read_json(built.folder / "results/demo/config/students/grace/int4/seed0.json")
    assert step["parameters"]["values"] == frozen and step["seed"] == frozen["seed"] == 0
    assert "--run results/demo/config/students/grace/int4/seed0.json" in step["command"]
    assert step["code"]["path"] == "results/demo/config/code/train+gated.json" and step["code"]["modules"] > 10
    assert step["code"]["changed"] == [] and step["code"]["accepted"] == []
    assert step["seconds"] >= 0 and step["ended"]
    assert {(i["path"], i["state"]) for i in step["inputs"]} >= {
        ("results/demo/data/manifest.json", "unchanged"), ("results/demo/teacher/cache/manifest.json", "unchanged")
    }  # fmt: skip
    assert all(len(i["sha256"]) == 64 for i in step["inputs"])


def test_the_tree_names_every_step_once(built: Tree, capsys: pytest.CaptureFixture) -> None:
    provenance(built.folder / SEED / "packed")
    said = capsys.readouterr().out
    assert said.count("by train_teacher at") == 1 and said.count("by prepare at") == 1 and "(above)" in said
    assert "by the same job as" in said, "a part of the cache is two files of one job"


def test_changed_inputs_and_code_are_named(tree: Tree) -> None:
    write_json(tree.folder / "results/demo/teacher/cache/manifest.json", {"files": {}, "other": True})
    with (tree.folder / "workflow/grace/train/loop.py").open("a") as file:
        file.write("# a comment changes nothing\nSKIPPED_IN_A_ROW = 7\n")
    found = provenance(tree.folder / SEED / "model", as_json=True)
    step = found["chain"][f"{SEED}/model/manifest.json"]
    assert {i["path"]: i["state"] for i in step["inputs"]}["results/demo/teacher/cache/manifest.json"] == "changed"
    assert step["code"]["changed"] == ["grace.train.loop"]


def test_the_records_of_a_clone_tell_the_same(tree: Tree) -> None:
    """Without Snakemake's own records, and without logs: what git and DVC bring."""
    before = provenance(tree.folder / SEED / "packed", as_json=True)
    shutil.rmtree(tree.folder / ".snakemake")
    after = provenance(tree.folder / SEED / "packed", as_json=True)
    assert made_by(after) == made_by(before)
    for name, step in after["chain"].items():
        assert (step["inputs"], step["code"]) == (before["chain"][name]["inputs"], before["chain"][name]["code"])


def test_what_a_job_cost_travels_with_the_records(tree: Tree) -> None:
    """Snakemake's tables lie beside the logs, without git; a second save must not lose what the first knew."""
    table = tree.folder / "results/demo/logs/students/grace/int4/seed0/pack.tsv"
    table.write_text("s\th:m:s\tmax_rss\tcpu_time\n12.5\t0:00:12\t248.5\t7.25\n")
    (tree.folder / "results/demo/provenance.jsonl").unlink()
    tree.grace("records", "save", "results/demo")
    shutil.rmtree(tree.folder / "results/demo/logs")
    shutil.rmtree(tree.folder / ".snakemake")
    tree.grace("records", "restore", "results/demo")
    tree.grace("records", "save", "results/demo")
    step = provenance(tree.folder / SEED / "packed", as_json=True)["chain"][f"{SEED}/packed/manifest.json"]
    assert (step["seconds"], step["peak_mib"], step["cpu_seconds"]) == (12.5, 248.5, 7.25)


def test_a_job_too_short_to_be_measured_has_its_time_alone(tmp_path: Path) -> None:
    (tmp_path / "job.tsv").write_text("s\tmax_rss\tcpu_time\n0.4\t-\tNA\n")
    assert benchmark("job.log", tmp_path) == {"seconds": 0.4}
    assert benchmark("other.log", tmp_path) is None and benchmark(None, tmp_path) is None


def test_a_file_of_a_folder_is_held_against_its_manifest(tree: Tree, capsys: pytest.CaptureFixture) -> None:
    folder = tree.folder / SEED / "packed"
    (folder / "model.safetensors").write_bytes(b"weights")
    write_manifest(folder)
    assert provenance(folder / "model.safetensors")["file"]["state"] == "as its manifest says"
    said = capsys.readouterr().out
    assert f", torch {environment()['packages']['torch']}" in said and "machine  " in said and "code revision" in said
    (folder / "model.safetensors").write_bytes(b"others!")
    assert provenance(folder / "model.safetensors")["file"]["state"] == "differs from its manifest"


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of simulated predictions, with records of one student's evaluation and of its model."""
    root = tmp_path_factory.mktemp("reported")
    folder = make_results(root / "results/fake", seeds=(0,), questions=40)
    write_tables(read_results(folder), folder / "tables")
    frozen = "results/fake/config/students/grace/int4/seed0.json"
    student, data = "results/fake/students/grace/int4/seed0", "results/fake/data/manifest.json"
    made = {"code": {"revision": "c0ffee", "modified": True}, "hardware": {"gpus": [], "visible": None}}
    for part in ("model", "predictions"):
        write_json(root / student / part / "environment.json", made)
    write_json(root / frozen, {"seed": 0})
    write_json(root / "results/fake/config/evaluation.json", {"batch": 1})
    rows = {}
    for part, rule, inputs in (
        ("predictions", "evaluate", ["results/fake/config/evaluation.json", data, f"{student}/model/manifest.json"]),
        ("model", "distil", [frozen, data]),
    ):
        output = f"{student}/{part}/manifest.json"
        sums = {name: f"sha256:{sha256(root / name)}" for name in inputs if (root / name).is_file()}
        record = {"rule": rule, "log": [], "starttime": 1.0, "endtime": 2.0, "input": inputs, "input_checksums": sums}
        rows[output] = {"output": output, "bytes": 1, "sha256": sha256(root / output), "record": record}
    write_rows(folder / "provenance.jsonl", rows)
    return folder


def test_a_cell_of_a_table_leads_to_its_predictions(reported: Path, capsys: pytest.CaptureFixture) -> None:
    told = cell(reported / "tables/table2.md", "GRACE int4", "colour", as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(told))
    (number,), (part,) = told["cells"], told["files"]
    predictions = reported / "students/grace/int4/seed0/predictions/colour.parquet"
    assert float(number["value"]) == pytest.approx(100 * pd.read_parquet(predictions)["score"].mean(), rel=1e-4)
    assert part["file"] == "results/fake/students/grace/int4/seed0/predictions/colour.parquet"
    assert (part["sha256"], part["state"], part["questions"]) == (sha256(predictions), "as its manifest says", 40)
    (model,) = part["models"]
    assert model["path"] == "results/fake/students/grace/int4/seed0/model/manifest.json"
    assert (model["state"], model["revision"], part["revision"]) == ("unchanged", "c0ffee+", "c0ffee+")
    assert model["parameters"]["path"] == "results/fake/config/students/grace/int4/seed0.json"
    assert model["parameters"]["seed"] == 0 and part["parameters"]["path"] == "results/fake/config/evaluation.json"
    cell(reported / "tables/table2.md", "GRACE int4", "colour")
    said = capsys.readouterr().out
    assert (
        "colour.parquet" in said
        and "40 questions, as its manifest says" in said
        and "commit of the model  c0ffee+" in said
    )


def test_a_cell_whose_predictions_are_not_here_says_how_to_get_them(reported: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(reported.parent, tmp_path / "results")
    folder = tmp_path / "results/fake/students/grace/int4/seed0/predictions"
    (folder / "colour.parquet").write_bytes(b"others")
    told = cell(tmp_path / "results/fake/tables", "INT4 GRACE int4", "colour", as_json=True)
    assert told["files"][0]["state"] == "differs from its manifest"
    shutil.rmtree(folder)
    capsys.readouterr()
    cell(tmp_path / "results/fake/tables", "INT4 GRACE int4", "colour")
    said = capsys.readouterr().out
    assert "missing; dvc pull results/fake/students/grace/int4/seed0/predictions/colour.parquet" in said
    assert "results/fake/config/students/grace/int4/seed0.json" in said, "what the records know is told all the same"


def test_a_cell_of_what_is_no_table_is_a_sentence(reported: Path) -> None:
    with pytest.raises(GraceError, match="not a table; give a file of results/fake/tables or results/fake/speed"):
        cell(reported / "bench/decode.csv", "GRACE int4", "colour")
    with pytest.raises(GraceError, match="no table with numbers; there are claims, measures"):
        cell(reported / "tables/table9.md", "GRACE int4", "colour")


def test_what_has_no_provenance_is_a_sentence(built: Tree, tmp_path: Path) -> None:
    with pytest.raises(GraceError, match="not below a results folder"):
        provenance(tmp_path)
    with pytest.raises(GraceError, match=r"no such file or folder; build it, or `dvc pull` it"):
        provenance(built.folder / "results/demo/tables")
    with pytest.raises(GraceError, match=r"typo: no such file or folder"):
        provenance(built.folder / SEED / "model/typo")
    with pytest.raises(GraceError, match=r"no rule made it; give one of .*seed0/model"):
        provenance(built.folder / SEED)


def test_the_environment_is_stable_and_needs_no_torch() -> None:
    about = environment()
    assert {"code", "packages", "hardware", "python", "system", "arithmetic"} == set(about)
    assert about["packages"]["torch"] and about["hardware"]["cores"] >= 1 and len(about["code"]["sha256"]) == 64
    code = "import sys; from grace.environment import environment; environment(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "damaged, said",
    [
        ({"output": None}, "`output`: input should be a valid string"),
        ({"output": "x" * 5000}, "`output`: no file can have this name"),
        ({"bytes": "many"}, "`bytes`: input should be a valid integer"),
        ({"record": {"input": [0], "input_checksums": {}}}, "`record.rule`: field required"),
        ({"record": []}, "list indices must be integers"),
    ],
)
def test_damaged_records_are_a_sentence(reported: Path, tmp_path: Path, damaged: dict, said: str) -> None:
    head, first, *rows = (reported / "provenance.jsonl").read_text().splitlines()
    store = tmp_path / "results/fake/provenance.jsonl"
    store.parent.mkdir(parents=True)
    store.write_text("\n".join([head, json.dumps({**json.loads(first), **damaged}), *rows]))
    with pytest.raises(GraceError, match=rf"provenance\.jsonl: damaged \({said}.*dvc checkout"):
        check(store.parent)


@pytest.mark.parametrize("output", ["/etc/manifest.json", "results/demo/../../../home/manifest.json"])
def test_records_of_others_name_no_output_outside(tmp_path: Path, output: str) -> None:
    """`grace merge` puts the other branch's folder in the place of such an output."""
    record = {"rule": "x", "input": [], "input_checksums": {}, "starttime": 1.0, "endtime": 2.0, "log": None}
    row = {"output": output, "bytes": 1, "sha256": None, "measured": None, "record": record}
    write_rows(tmp_path / "provenance.jsonl", {output: row})
    with pytest.raises(GraceError, match=r"damaged \(`output`: lies outside the folder that Snakemake runs in\)"):
        read_rows(tmp_path / "provenance.jsonl")


@pytest.mark.parametrize("damaged", [{"rule": []}, {"starttime": "early"}, {"endtime": 1e300}, {"input": "x"}])
def test_a_damaged_record_of_snakemake_is_a_sentence(tmp_path: Path, damaged: dict) -> None:
    whole = {"rule": "evaluate", "input": ["x"], "input_checksums": {}, "starttime": 1.0, "endtime": 2.0}
    whole |= {"record_format_version": FORMAT}
    path = tmp_path / "record"
    write_json(path, whole)
    assert read_record(path) == whole
    for value in (whole | damaged, []):
        write_json(path, value)
        with pytest.raises(GraceError, match=r"record: damaged .*records restore"):
            read_record(path)
    write_json(path, whole | damaged | {"incomplete": True})
    assert read_record(path) is None


@pytest.mark.parametrize("line", ["null", "{}", "{", '{"subcommand": "evaluate", "frozen": {}}'])
def test_damaged_changes_of_code_are_a_sentence(tmp_path: Path, line: str) -> None:
    path = tmp_path / "config/code/accepted.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(f"{line}\n")
    with pytest.raises(GraceError, match=r"accepted\.jsonl: damaged \(.*git checkout"):
        accepted(tmp_path)
    path.with_name("evaluate.json").write_text(line)
    with pytest.raises(GraceError, match=r"evaluate\.json: (damaged|not valid JSON)"):
        read_fingerprint(path.with_name("evaluate.json"))


def test_a_merge_keeps_what_both_branches_accepted(tmp_path: Path) -> None:
    """Otherwise what one of them accepted would be trained again."""

    def git(*words: str) -> None:
        who = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    def accept(reason: str) -> None:
        code = {"subcommand": "train", "chosen": [], "code": {"a": reason}, "data": {}}
        about = {"changed": ["a"], "by": "x", "at": "now", "reason": reason}
        with path.open("a") as file:
            file.write(json.dumps({"subcommand": "train", "frozen": code, "accepted": code, **about}) + "\n")

    path = accepted_file(tmp_path / "results/demo")
    path.parent.mkdir(parents=True)
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    accept("before")
    git("init", "-q", "-b", "main")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    for branch in ("ours", "theirs"):
        git("checkout", "-q", "-b", branch, "main")
        accept(branch)
        git("commit", "-q", "-a", "-m", branch)
    git("merge", "-q", "-m", "both", "ours")
    reasons = [change["reason"] for change in accepted(tmp_path / "results/demo")]
    assert sorted(reasons) == ["before", "ours", "theirs"]


def test_single_files_are_held_against_the_saved_records(tree: Tree) -> None:
    folder = tree.folder / "results/demo"
    assert check(folder).wrong == [] and check(folder).unrecorded == []
    curve = folder / "students/grace/int4/seed0/train.jsonl"
    curve.write_text("other")
    (folder / "stray.csv").write_text("1")
    assert check(folder).wrong == [
        f"{SEED}/train.jsonl: differs from provenance.jsonl",
        "results/demo/stray.csv: listed nowhere",
    ]


def test_the_plan_counts_what_is_left_and_its_hours(tree: Tree, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tree.folder)
    monkeypatch.setenv("PYTHONPATH", str(tree.folder / "workflow"))
    tree.edit(
        resources={"train_teacher": {"gpus": 8, "runtime": 90, "cpus": 4}, "finetune": {"gpus": 2, "runtime": 30}}
    )
    shutil.rmtree(tree.folder / "results/demo/teacher/model")
    requests = {request.kind: request for request in plan(Path("config.yaml"), price=2.0)}
    assert requests["train_teacher"].jobs == 1 and "prepare" not in requests, "the data is there"
    assert requests["train_teacher"].gpu_hours == 12.0 and requests["train_teacher"].core_hours == 6.0
    assert requests["report"].jobs == 5
    said = capsys.readouterr().out
    assert "At most 13.0 GPU hours, 26.00 at 2 per GPU hour" in said
    with pytest.raises(GraceError, match=r"nowhere.yaml: cannot be read"):
        plan(Path("nowhere.yaml"))
    with pytest.raises(GraceError, match="Snakemake makes no plan of it"):
        left_to_do(Path("config.yaml"), tree.folder / "nowhere")
