"""Versions by DVC over Snakemake: nothing is built again that is already here, wherever it came from."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer
from stub_tree import ROOT, Tree

from grace.diff.compare import diff
from grace.diff.revisions import results_of
from grace.errors import GraceError
from grace.provenance import snakemake_records as records
from grace.provenance.chain import Results
from grace.provenance.merge import merge
from grace.provenance.verify import verify

UP_TO_DATE = "didn't change, skipping"


def _git(tree: Tree, *words: str) -> None:
    tree.run("git", "-c", "user.name=Test", "-c", "user.email=test@example.org", *words)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A small experiment that was built by `dvc repro`, committed, and pushed to a local remote."""
    folder = tmp_path_factory.mktemp("dvc")
    tree = Tree.make(folder / "tree")
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, tree.folder)
    (tree.folder / ".dvc").mkdir()
    for name in (".gitignore", "config"):  # not config.local: its remote is the user's own
        shutil.copy(ROOT / ".dvc" / name, tree.folder / ".dvc")
    _git(tree, "init", "-q", "-b", "main")
    tree.run("dvc", "remote", "add", "-q", "-d", "storage", str(folder / "storage"))
    tree.run("dvc", "repro", "-q")
    _git(tree, "add", "-A")
    _git(tree, "commit", "-q", "-m", "first")
    tree.run("dvc", "push", "-q")
    return tree


def _clone(published: Tree, folder: Path) -> Tree:
    published.run("git", "clone", "-q", str(published.folder), str(folder))
    return Tree(folder)


def test_both_engines_find_nothing_to_do_afterwards(published: Tree) -> None:
    assert published.planned() == []
    assert UP_TO_DATE in published.run("dvc", "repro").stdout


def test_light_outputs_are_in_git_and_heavy_ones_are_not(published: Tree) -> None:
    tracked = published.run("git", "ls-files", "results").stdout.split()
    assert {"results/demo/metrics.json", "results/demo/tables/manifest.json"} <= set(tracked)
    heavy = ("students", "data", "bench", "speed", "report")
    assert not [name for name in tracked if name.startswith(tuple(f"results/demo/{folder}/" for folder in heavy))]


def test_a_build_elsewhere_makes_what_git_keeps_again_bit_for_bit(published: Tree, tmp_path: Path) -> None:
    """Another folder, where everything takes another time on another machine, without the remote."""
    clone = _clone(published, tmp_path / "clone")
    clone.snakemake("--quiet", "all")
    assert clone.run("git", "status", "--porcelain").stdout == ""
    student = "students/grace/int4/seed0/model"
    timed = ["bench/decode.csv", "speed/manifest.json", f"{student}/timing.jsonl", f"{student}/environment.json"]
    for name in (*timed, "tables/environment.json", "figures/environment.json"):
        mine, theirs = (tree.folder / "results/demo" / name for tree in (clone, published))
        assert mine.read_bytes() != theirs.read_bytes(), name
    model = f"results/demo/{student}/manifest.json"
    assert (clone.folder / model).read_bytes() == (published.folder / model).read_bytes()
    clone.run("dvc", "repro", "-q")
    assert clone.run("git", "status", "--porcelain").stdout == " M dvc.lock\n"


def test_a_clone_that_pulled_knows_what_its_tables_were_made_with(published: Tree, tmp_path: Path) -> None:
    clone = _clone(published, tmp_path / "clone")
    clone.run("dvc", "pull", "-q")
    output = "results/demo/tables/manifest.json"
    assert not (clone.folder / output).with_name("environment.json").exists()
    made = [Results(tree.folder / output).step(output).environment for tree in (published, clone)]
    assert made[0] is not None and made[0] == made[1]
    assert clone.planned() == []
    clone.run("grace", "records", "save", "results/demo")
    assert Results(clone.folder / output).step(output).environment == made[0], "saving again forgets nothing"


@pytest.mark.parametrize("pushed", [True, False])
def test_a_revision_without_its_times_is_compared_all_the_same(
    published: Tree, tmp_path: Path, capsys: pytest.CaptureFixture, pushed: bool
) -> None:
    clone = _clone(published, tmp_path / "clone")
    storage = shutil.copytree(published.folder.parent / "storage", tmp_path / "storage")
    clone.run("dvc", "remote", "modify", "-q", "storage", "url", str(storage))
    _git(clone, "commit", "-q", "-a", "-m", "another remote")
    outs = yaml.safe_load((clone.folder / "dvc.lock").read_text())["stages"]["build@demo"]["outs"]
    (bench,) = (out["md5"] for out in outs if out["path"] == "results/demo/bench")
    if not pushed:
        (storage / "files/md5" / bench[:2] / bench[2:]).unlink()
    with results_of("HEAD", "demo", clone.folder) as folder:
        assert (folder / "metrics.json").is_file() and (folder / "teacher/predictions/manifest.json").is_file()
        assert (folder / "bench/decode.csv").is_file() == pushed
    said = capsys.readouterr().err
    assert said == ("" if pushed else "HEAD: DVC has no copy of results/demo/bench; its speeds are not compared\n")


def test_after_a_clone_and_a_pull_both_find_nothing_to_do(published: Tree, tmp_path: Path) -> None:
    clone = _clone(published, tmp_path / "clone")
    assert clone.planned(), "without the results there is something to do"
    clone.run("dvc", "pull", "-q")
    assert clone.planned() == []
    assert UP_TO_DATE in clone.run("dvc", "repro").stdout


def test_a_damaged_output_gets_no_record(published: Tree, tmp_path: Path) -> None:
    clone = _clone(published, tmp_path / "clone")
    clone.run("dvc", "pull", "-q")
    damaged = clone.folder / "results/demo/students/rtn/int4/seed0/packed/manifest.json"
    damaged.unlink()
    damaged.write_text(json.dumps({"files": {}, "accuracy": 99}))
    assert "evaluate students/rtn/int4/seed0" in clone.planned()


def test_a_changed_config_shows_in_the_metrics_and_goes_back(published: Tree, tmp_path: Path) -> None:
    clone = _clone(published, tmp_path / "clone")
    clone.run("dvc", "pull", "-q")
    clone.edit(recipes__finetune={"train": {"learning_rate": 2e-3}})
    ran = clone.run("dvc", "repro")
    said = ran.stdout + ran.stderr
    assert "train finetune at int4, seed 0" in said and "distil grace" not in said
    changes = json.loads(clone.run("dvc", "metrics", "diff", "--json").stdout)
    assert changes["results/demo/metrics.json"]["accuracy"]["diff"] != 0
    _git(clone, "commit", "-q", "-a", "-m", "second")
    _git(clone, "checkout", "-q", "HEAD~1")
    clone.run("dvc", "checkout", "-q")
    assert clone.planned() == []
    assert UP_TO_DATE in clone.run("dvc", "repro").stdout


def test_a_plain_run_first_leaves_dvc_nothing_to_build(published: Tree, tmp_path: Path) -> None:
    tree = published.copy(tmp_path / "tree")
    with (tree.folder / "workflow/grace/report/commands.py").open("a") as file:
        file.write("# the same outputs from other code\n")
    tree.snakemake("--quiet", "all")
    said = tree.run("dvc", "repro")
    assert "Nothing to be done" in said.stdout + said.stderr
    assert tree.planned() == []


def test_records_survive_the_round_trip(published: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Snakemake reads is as it was written, but for the times of the files as they are here."""
    tree = published.copy(tmp_path / "tree")
    monkeypatch.chdir(tree.folder)
    metadata = tree.folder / ".snakemake/metadata"
    before = {path.name: json.loads(path.read_text()) for path in metadata.iterdir()}
    shutil.rmtree(metadata)
    assert records.restore("results/demo") == len(before)
    for path in metadata.iterdir():
        record = json.loads(path.read_text())
        for key in ("rule", "input", "params", "shellcmd", "code", "input_checksums", "record_format_version"):
            assert record[key] == before[path.name][key], f"{key} of {path.name}"
    assert records.restore("results/demo") == 0


def test_the_format_is_that_of_the_installed_snakemake() -> None:
    from snakemake.persistence import RECORD_FORMAT_VERSION

    assert records.FORMAT == RECORD_FORMAT_VERSION


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[str, dict[str, str]]]:
    """An S3 server on the loopback address: its URL, and the keys that it takes."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="grace")
        yield f"http://{host}:{port}", keys
    server.stop()


def test_through_s3_wholly_and_in_part(published: Tree, bucket: tuple, tmp_path: Path) -> None:
    """What was pushed to a bucket builds nothing elsewhere; a single student comes alone."""
    source = published.copy(tmp_path / "source")
    source.run("dvc", "remote", "add", "-q", "-d", "--force", "storage", "s3://grace/results")
    source.run("dvc", "remote", "modify", "-q", "storage", "endpointurl", bucket[0])
    _git(source, "commit", "-q", "-a", "-m", "a bucket")
    source.run("dvc", "push", "-q")

    part = _clone(source, tmp_path / "part")
    packed, store = "results/demo/students/grace/int4/seed0/packed", "results/demo/provenance.jsonl"
    part.run("dvc", "pull", "-q", packed, store)
    students = part.folder / "results/demo/students"
    assert {path.parent.name for path in students.rglob("manifest.json")} == {"packed"}
    assert (part.folder / "results/demo/tables/manifest.json").is_file(), "tables come with git"
    verify(part.folder / packed)

    whole = _clone(source, tmp_path / "whole")
    whole.run("dvc", "pull", "-q")
    assert whole.planned() == []
    assert UP_TO_DATE in whole.run("dvc", "repro").stdout


def test_what_is_not_pushed_stays_here(published: Tree, tmp_path: Path) -> None:
    """`push: false` leaves a large folder out; a clone has the rest."""
    source = published.copy(tmp_path / "source")
    stage = source.folder / "dvc.yaml"
    line = "results/${key}/teacher/cache: {persist: true}"
    assert line in stage.read_text()
    stage.write_text(stage.read_text().replace(line, "results/${key}/teacher/cache: {persist: true, push: false}"))
    source.run("dvc", "remote", "modify", "-q", "storage", "url", str(tmp_path / "storage"))
    source.run("dvc", "commit", "-q", "-f")
    _git(source, "commit", "-q", "-a", "-m", "keep the cache here")
    source.run("dvc", "push", "-q")
    clone = _clone(source, tmp_path / "clone")
    clone.run("dvc", "pull", "-q", "--allow-missing", check=False)
    assert not list((clone.folder / "results/demo/teacher").glob("cache/*.safetensors"))
    assert (clone.folder / "results/demo/students/grace/int4/seed0/model/manifest.json").is_file()


def test_a_stale_file_of_equal_size_is_not_taken_for_built(published: Tree, tmp_path: Path, monkeypatch) -> None:
    """Records come back for contents, not for sizes; and a record that a kill cut stops no start."""
    tree = published.copy(tmp_path / "tree")
    packed = tree.folder / "results/demo/students/rtn/int4/seed0/packed"
    manifest = json.loads((packed / "manifest.json").read_text())
    (packed / "weights").write_text("stale")
    right = hashlib.sha256(b"fresh").hexdigest()
    (packed / "manifest.json").write_text(json.dumps({**manifest, "files": {"weights": {"bytes": 5, "sha256": right}}}))
    monkeypatch.chdir(tree.folder)
    row = {"output": str((packed / "manifest.json").relative_to(tree.folder))}
    row |= records._identity(packed / "manifest.json")
    assert not records.as_recorded(packed / "manifest.json", row)
    (packed / "weights").write_text("fresh")
    assert records.as_recorded(packed / "manifest.json", row)


def test_after_a_cut_record_and_a_left_lock_the_next_start_goes_on(published: Tree, tmp_path: Path) -> None:
    tree = published.copy(tmp_path / "tree")
    record = tree.folder / records.record_path("results/demo/metrics.json")
    record.write_text(record.read_text()[:100])
    lock = tree.folder / ".snakemake/locks/0.output.lock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text("results/demo/metrics.json\n")
    said = tree.snakemake()
    assert "metrics" in said.stdout + said.stderr and not lock.exists()
    assert tree.planned() == []


@pytest.mark.parametrize("remote", ["none", "empty"])
def test_a_difference_without_the_results_is_a_sentence(published: Tree, tmp_path: Path, remote: str) -> None:
    """A clone where nothing was pulled, and that has no remote or one that holds nothing."""
    clone = _clone(published, tmp_path / "clone")
    if remote == "none":
        clone.run("dvc", "remote", "remove", "storage")
    else:
        clone.run("dvc", "remote", "modify", "-q", "storage", "url", str(tmp_path / "empty"))
    _git(clone, "commit", "-q", "-a", "-m", "another remote")
    with pytest.raises(GraceError, match="DVC has no copy of its results") as said:
        diff("HEAD", "HEAD", repository=clone.folder)
    assert "\n" not in str(said.value)


def test_two_branches_that_both_built_are_merged_and_nothing_is_trained_again(
    published: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = published.copy(tmp_path / "tree")
    monkeypatch.chdir(tree.folder)
    for name in ("user.name", "user.email"):
        tree.run("git", "config", name, "test@example.org")
    config = tree.folder / "config.yaml"
    text = config.read_text()
    changes = {"a": ("controller: true}", "controller: true, method: {tau: 1.0}}"),
               "b": ("finetune: {}", "finetune: {train: {learning_rate: 0.002}}")}  # fmt: skip
    built = {}
    for branch, (old, new) in changes.items():
        tree.run("git", "checkout", "-q", "main")
        tree.run("dvc", "checkout", "-q")
        tree.run("git", "checkout", "-q", "-b", branch)
        assert old in text
        config.write_text(text.replace(old, new))
        ran = tree.run("dvc", "repro")
        assert "at int4, seed 0" in ran.stdout + ran.stderr
        for recipe in ("finetune", "grace"):
            model = Path(f"results/demo/students/{recipe}/int4/seed0/model/manifest.json")
            built[branch, recipe] = model.read_text()
        tree.run("git", "commit", "-q", "-a", "-m", branch)
    tree.run("git", "checkout", "-q", "a")
    tree.run("dvc", "checkout", "-q")
    with pytest.raises(GraceError, match=r"config\.yaml: both branches changed"):  # lines beside each other
        merge("b")
    for old, new in changes.values():
        text = text.replace(old, new)
    config.write_text(text)
    tree.run("git", "add", "config.yaml")
    taken = merge("b")["demo"]
    assert "results/demo/students/finetune/int4/seed0/model/manifest.json" in taken
    assert not [output for output in taken if "/grace/" in output]
    jobs = tree.planned()
    assert not [job for job in jobs if job.startswith(("train", "distil", "pack", "round", "evaluate", "compose"))], (
        jobs
    )
    ran = tree.run("dvc", "repro")
    assert "train" not in ran.stdout + ran.stderr and "distil" not in ran.stdout + ran.stderr
    for branch, recipe in (("a", "grace"), ("b", "finetune")):
        model = Path(f"results/demo/students/{recipe}/int4/seed0/model/manifest.json")
        assert model.read_text() == built[branch, recipe]
    tree.run("git", "add", "-A")
    tree.run("git", "commit", "-q", "-m", "merged")
    assert tree.planned() == [] and UP_TO_DATE in tree.run("dvc", "repro").stdout
    assert "tau: 1.0" in config.read_text() and "learning_rate: 0.002" in config.read_text()


def test_a_merge_waits_for_what_people_write(published: Tree, tmp_path: Path) -> None:
    tree = published.copy(tmp_path / "tree")
    for branch, rate in (("a", "0.002"), ("b", "0.003")):
        _git(tree, "checkout", "-q", "-b", branch, "main")
        tree.edit(finetune__learning_rate=float(rate))
        _git(tree, "commit", "-q", "-a", "-m", branch)
    tree.edit(finetune__steps=21)
    with pytest.raises(GraceError, match="uncommitted changes; commit them"):
        merge("a", tree.folder)
    _git(tree, "checkout", "-q", "config.yaml")
    with pytest.raises(GraceError, match=r"config\.yaml: both branches changed the same lines; resolve and `git add`"):
        merge("a", tree.folder)
