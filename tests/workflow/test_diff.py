"""Differences between versions: planted changes are found, and nothing else is."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import started
from fake_results import results_folder

from grace.diff.compare import compare_folders, diff
from grace.diff.render import to_html, to_markdown, to_terminal
from grace.errors import GraceError
from grace.files import sha256, write_manifest
from grace.results.read import Row

__all__ = ["results_folder"]  # a fixture

GRACE = Row("grace", "int4")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def version(results_folder, tmp_path):
    """A copy that a test may change."""
    folder = tmp_path / "b"
    shutil.copytree(results_folder, folder)
    return folder


def edit(folder, change, benchmark="colour", recipe="grace", precision="int4", seed=0):
    """Rewrite one predictions file and its manifest."""
    below = folder / f"students/{recipe}/{precision}/seed{seed}/predictions"
    path = below / f"{benchmark}.parquet"
    change(pd.read_parquet(path)).to_parquet(path)
    about = json.loads((below / "manifest.json").read_text())
    about["benchmarks"][benchmark] |= {"sha256": sha256(path), "score": float(pd.read_parquet(path)["score"].mean())}
    write_manifest(below, **{key: value for key, value in about.items() if key != "files"})


def spoil(count):
    """Make the first `count` right answers wrong."""

    def change(frame):
        right = frame.index[frame["score"] == 1][:count]
        frame.loc[right, ["score", "prediction"]] = [0.0, "green"]
        return frame

    return change


def test_equal_versions_differ_in_nothing(results_folder, version):
    found = compare_folders(results_folder, version)
    assert len(found.changes) == 4 * 19
    assert all(change.comparison is None for change in found.changes) and not found.regressions
    assert not (found.flips or found.settings or found.environment or found.artifacts or found.only)
    assert "All 76 comparisons have identical scores" in to_markdown(found)


def test_equal_files_of_another_commit_are_equal(results_folder, version):
    """What a folder was made with is no artifact."""
    for path in version.glob("**/environment.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "code": {"revision": "0" * 40}, "python": "4.0"}))
    found = compare_folders(results_folder, version)
    assert not found.artifacts
    assert {name for name, _, _ in found.environment} >= {"environment.code.revision", "environment.python"}


def test_a_planted_drop_is_found_and_named(results_folder, version):
    for seed in (0, 1):
        edit(version, spoil(15), seed=seed)
    found = compare_folders(results_folder, version)
    changed = {(change.row, change.benchmark): change for change in found.changes if change.comparison is not None}
    assert set(changed) == {(GRACE, "colour"), (GRACE, "average")}
    drop = changed[GRACE, "colour"]
    assert drop.comparison.difference == pytest.approx(-100 * 15 / 80)
    assert (drop.comparison.gained, drop.comparison.lost) == (0, 30) and drop.regressed
    assert drop.after - drop.before == pytest.approx(drop.comparison.difference)
    assert changed[GRACE, "average"].comparison.difference == pytest.approx(-100 * 15 / 80 / 3)
    assert len(found.flips) == 30 and {flip.after for flip in found.flips} == {"green"}
    question, image = found.questions["colour", found.flips[0].sample]
    assert question.startswith("what is thing") and image.startswith(b"\x89PNG")
    assert [name for name, _ in found.artifacts] == [f"students/grace/int4/seed{s}/predictions" for s in (0, 1)]


def test_one_flip_is_noise(results_folder, version, capsys):
    edit(version, spoil(1))
    found = diff(results_folder, version, fail_on_regression=True)
    assert not found.regressions and len(found.flips) == 1
    assert "noise" in capsys.readouterr().out


def test_answers_are_no_markup(results_folder, version, capsys):
    """A model may say anything; a reader of the pull request sees what it said."""
    answer = "</details> | **[a](http://x)** `b`\r\n$c$"

    def say(frame):
        right = frame.index[frame["score"] == 1][:1]
        frame.loc[right, ["score", "prediction"]] = [0.0, answer]
        return frame

    edit(version, say)
    found = diff(results_folder, version)
    assert found.flips[0].after == answer
    text = to_markdown(found)
    assert r"| &lt;/details> \| \*\*\[a](http://x)\*\* \`b\` \$c\$ |" in text and text.count("</details>") == 1
    found.only["benchmarks only in [/b]"] = ["[/b]"]
    found.changes[0].benchmark = "[/b]"
    to_terminal(found)
    assert "Benchmarks only in [/b]" in capsys.readouterr().out


def test_an_edited_file_is_seen_without_its_manifest(results_folder, version):
    path = version / "students/grace/int4/seed0/predictions/colour.parquet"
    spoil(20)(frame := pd.read_parquet(path))
    frame.to_parquet(path)
    assert len(compare_folders(results_folder, version).flips) == 20


def test_fail_on_regression_says_which(results_folder, version, tmp_path):
    for seed in (0, 1):
        edit(version, spoil(20), seed=seed)
    with pytest.raises(GraceError, match=r"2 significant drops .* \(grace int4 on colour\)"):
        diff(results_folder, version, markdown=tmp_path / "d.md", page=tmp_path / "d.html", fail_on_regression=True)
    assert "**drop**" in (tmp_path / "d.md").read_text()
    page = (tmp_path / "d.html").read_text()
    assert page.count("data:image/png;base64,") == 40 and "http" not in page
    assert not diff(version, results_folder, fail_on_regression=True).regressions  # the other way it is a gain


def test_added_removed_reworded_and_redefined_questions(results_folder, version):
    def change(frame):
        frame = frame.iloc[5:].copy()
        frame.loc[frame.index[0], "target"] = "blue"
        frame.loc[frame.index[1], "prompt_hash"] = "1" * 16
        more = frame.tail(3).assign(sample_id=["new-1", "new-2", "new-3"])
        return pd.concat([frame, more], ignore_index=True)

    for seed in (0, 1):
        edit(version, change, seed=seed)
    found = compare_folders(results_folder, version)
    moved = next(change for change in found.changes if (change.row, change.benchmark) == (GRACE, "colour"))
    assert (moved.shared, moved.added, moved.removed, moved.reworded, moved.redefined) == (74, 3, 5, 1, 1)
    assert moved.comparison is None and moved.before == moved.after
    assert "74 shared, 3 added, 5 removed, 1 reworded, 1 redefined" in to_markdown(found)


def test_models_seeds_and_benchmarks_of_one_side(results_folder, version):
    shutil.rmtree(version / "students/kd/int4")
    shutil.copytree(version / "students/kd/bf16", version / "students/fresh/bf16")
    for seed in (0, 1):
        below = version / f"students/qat/int4/seed{seed}/predictions"
        about = json.loads((below / "manifest.json").read_text())
        about["benchmarks"].pop("pairs")
        (below / "manifest.json").write_text(json.dumps(about))
    found = compare_folders(results_folder, version)
    assert found.only == {
        "models only in A": ["kd int4 seed 0", "kd int4 seed 1"],
        "models only in B": ["fresh bf16 seed 0", "fresh bf16 seed 1"],
        "benchmarks only in A": ["pairs of qat int4 seed 0, qat int4 seed 1"],
    }


def test_nothing_shared_is_an_error(results_folder, version, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(GraceError, match="no model has predictions in both"):
        compare_folders(results_folder, tmp_path / "empty")
    for path in version.glob("**/predictions/*.parquet"):
        frame = pd.read_parquet(path)
        frame.assign(sample_id="other-" + frame["sample_id"]).to_parquet(path)
    with pytest.raises(GraceError, match="no model was asked the same questions in both"):
        compare_folders(results_folder, version)


def test_settings_environment_and_speed(results_folder, version):
    path = version / "config" / "experiment.json"
    config = json.loads(path.read_text())
    config["quantization"]["group_size"] = 64
    path.write_text(json.dumps(config))
    below = version / "teacher" / "predictions"
    about = json.loads((below / "manifest.json").read_text())
    about["harness"]["version"] = "0.5"
    (below / "manifest.json").write_text(json.dumps(about))
    decode = pd.read_csv(version / "bench" / "decode.csv")
    decode["tokens_per_second"] *= np.where(decode["model"] == "teacher", 0.5, 1)
    decode.to_csv(version / "bench" / "decode.csv", index=False)
    found = compare_folders(results_folder, version)
    assert found.settings == [("quantization.group_size", 32, 64)]
    assert found.environment == [("harness.version", "0.4.13", "0.5")]
    slower = found.speed[found.speed["ratio"] != 1]
    assert slower["measure"].tolist() == ["tokens_per_second"] * 2 and not slower["better"].any()
    assert "x0.50 | worse" in to_markdown(found).replace("\\|", "|") and "group_size" in to_html(found)


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    """A git repository without commits."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    return folder


def commit_results(repository, source, message):
    target = repository / "results" / "demo"
    shutil.rmtree(target, ignore_errors=True)
    for recipe in ("students/grace/int4", "students/qat/int4"):
        shutil.copytree(source / recipe, target / recipe)
    shutil.copytree(source / "config", target / "config")
    git(repository, "add", "-A")
    git(repository, "commit", "-m", message)


def test_two_git_revisions(results_folder, version, repository):
    commit_results(repository, results_folder, "one")
    for seed in (0, 1):
        edit(version, spoil(20), seed=seed)
    commit_results(repository, version, "two")
    found = diff("HEAD~1", "HEAD", repository=repository)
    assert [change.benchmark for change in found.regressions] == ["colour", "average"] and found.a == "HEAD~1"
    assert len(diff("HEAD~1", repository, repository=repository).regressions) == 2  # a folder as it stands
    with pytest.raises(GraceError, match="nowhere: neither a results folder nor a git revision"):
        diff("nowhere", "HEAD", repository=repository)
    with pytest.raises(GraceError, match="has no results/other; give --experiment"):
        diff("HEAD~1", "HEAD", experiment="other", repository=repository)


def test_revisions_whose_predictions_dvc_keeps(results_folder, version, repository, tmp_path):
    from dvc.repo import Repo

    with Repo.init(str(repository)) as dvc:
        students = repository / "results" / "demo" / "students"
        for turn, source in enumerate((results_folder, version)):
            if turn:
                for seed in (0, 1):
                    edit(version, spoil(20), seed=seed)
            shutil.rmtree(students, ignore_errors=True)
            shutil.copytree(source / "students/grace/int4", students / "grace/int4")
            dvc.add(str(students))
            git(repository, "add", "-A")
            git(repository, "commit", "-m", f"turn {turn}")
    found = diff("HEAD~1", "HEAD", repository=repository)
    assert [change.benchmark for change in found.regressions] == ["colour", "average"]
    shutil.rmtree(repository / ".dvc" / "cache")
    shutil.rmtree(students)
    with pytest.raises(GraceError, match=r"no remote is set; .*dvc remote add -d NAME URL"):
        diff("HEAD~1", "HEAD", repository=repository)
    with Repo(str(repository)) as dvc, dvc.config.edit() as config:
        config["remote"] = {"storage": {"url": str(tmp_path / "storage")}}
        config["core"] = {"remote": "storage"}
    git(repository, "commit", "-a", "-m", "a remote that has nothing")
    with pytest.raises(GraceError, match=r"HEAD~2: DVC has no copy of its results.*dvc fetch"):
        diff("HEAD~2", "HEAD~1", repository=repository)


def test_snakemake_diff_holds_the_results_against_the_last_commit(results_folder, version, repository):
    commit_results(repository, results_folder, "one")
    for seed in (0, 1):
        edit(repository / "results/demo", spoil(20), seed=seed)
    command = started.snakemake(
        "--snakefile", ROOT / "Snakefile", "--cores", "1", "--configfile", ROOT / "config.yaml",
        "--workflow-profile", ROOT / "workflow/profiles/default", "diff",
    )  # fmt: skip
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "2 significant drops" in done.stdout
        and "2 significant drops" in (repository / "results/demo/logs/diff.md").read_text()
    )


def test_the_exit_status_under_fail_on_regression(results_folder, version):
    command = started.grace("diff", results_folder, version)
    assert subprocess.run([*command, "--fail-on-regression"], capture_output=True).returncode == 0
    for seed in (0, 1):
        edit(version, spoil(20), seed=seed)
    assert subprocess.run(command, capture_output=True).returncode == 0
    done = subprocess.run([*command, "--fail-on-regression"], capture_output=True, text=True)
    assert done.returncode == 1 and "2 significant drops" in done.stderr


def test_files_that_another_library_wrote_are_compared_all_the_same(results_folder, version):
    """Equal questions in other bytes and another order: nothing changed, and a planted change is found."""
    for path in version.glob("students/grace/int4/*/predictions/*.parquet"):
        pd.read_parquet(path).sample(frac=1, random_state=0).to_parquet(path, compression="gzip")
    assert not compare_folders(results_folder, version).flipped
    edit(version, spoil(7))
    assert compare_folders(results_folder, version).flipped == 7


def drop_benchmark(folder, benchmark, recipe="grace", precision="int4", seed=0):
    below = folder / f"students/{recipe}/{precision}/seed{seed}/predictions"
    (below / f"{benchmark}.parquet").unlink()
    about = json.loads((below / "manifest.json").read_text())
    del about["benchmarks"][benchmark]
    about["files"] = {name: entry for name, entry in about["files"].items() if name != f"{benchmark}.parquet"}
    (below / "manifest.json").write_text(json.dumps(about))


def test_what_one_model_lost_is_named_with_it(results_folder, version):
    drop_benchmark(version, "colour", seed=1)
    found = compare_folders(results_folder, version)
    assert found.only["benchmarks only in A"] == ["colour of grace int4 seed 1"]


def test_every_seed_s_flips_are_shown(results_folder, version):
    for seed in (0, 1):
        edit(version, spoil(40), seed=seed)
    found = compare_folders(results_folder, version)
    assert {flip.seed for flip in found.flips} == {0, 1}


def test_json_says_what_the_tables_say(results_folder, version, capsys):
    for seed in (0, 1):
        edit(version, spoil(15), seed=seed)
    diff(results_folder, version, as_json=True)
    said = json.loads(capsys.readouterr().out)
    (drop,) = [c for c in said["changes"] if c["model"] == "grace int4" and c["benchmark"] == "colour"]
    assert drop["difference"] == pytest.approx(-100 * 15 / 80) and (drop["gained"], drop["lost"]) == (0, 30)
    assert said["flipped"] == 30 == len(said["flips"]) and not drop["identical"] and drop["seeds"] == [0, 1]
    assert sum(not change["identical"] for change in said["changes"]) == 2


def test_damaged_files_are_named(results_folder, version):
    (version / "bench/decode.csv").write_text("model,precision\n1,2\n1,2,3,4\n")
    with pytest.raises(GraceError, match=r"bench/decode\.csv: not a readable CSV file"):
        compare_folders(results_folder, version)
    manifest = version / "teacher/predictions/manifest.json"
    manifest.write_text('"all of it"')
    with pytest.raises(GraceError, match=r"teacher/predictions/manifest\.json: not a manifest"):
        compare_folders(results_folder, version)
