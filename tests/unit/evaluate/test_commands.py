"""`grace evaluate`: what is written, what is not done twice, and what is said when something is wrong."""

import json
import shutil
from contextlib import contextmanager

import pandas as pd
import pyarrow.parquet as pq
import pytest
from evaluate_models import rows, write_asked, write_benchmark, write_model

import grace.evaluate.commands as commands
from grace.benchmarks.registry import PACKAGES
from grace.config.accepted import accepted_file
from grace.config.code import CodeIndex
from grace.errors import GraceError
from grace.files import sha256, write_json, write_manifest
from grace.results.keys import model_hash
from grace.results.predictions import SCHEMA

NAMES = ("colour", "presence", "pairs")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_asked(folder)
    write_benchmark(folder / "data/benchmarks/pairs.parquet", rows(12, ("yes", "no"), 2))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def run(folder, *names, **settings):
    evaluation = {"benchmarks": list(names or NAMES), "batch": 8, "max_new_tokens": 3, **settings}
    (folder / "run.json").write_text(json.dumps({"family": "llava", "evaluation": evaluation}))
    commands.evaluate(folder / "run.json", folder / "model", folder / "data", folder / "out")
    return json.loads((folder / "out/manifest.json").read_text())


def test_predictions_and_manifest_are_whole(folder):
    manifest = run(folder)
    assert manifest["model"] == model_hash(folder / "model")
    assert manifest["harness"]["name"] == "lm-eval"
    assert list(manifest["benchmarks"]) == sorted(NAMES)
    for name, entry in manifest["benchmarks"].items():
        path = folder / "out" / entry["file"]
        assert manifest["files"][entry["file"]] == {"bytes": path.stat().st_size, "sha256": sha256(path)}
        table = pq.read_table(path)
        assert table.schema.remove_metadata() == SCHEMA
        kept = table.to_pandas()
        assert entry["questions"] == len(kept) == 12
        assert entry["score"] == kept["score"].mean()
        assert entry["metric"] == {"colour": "exact_match", "presence": "pope", "pairs": "mme"}[name]
    assert manifest["benchmarks"]["pairs"]["also"].keys() == {"accuracy", "score"}


def test_a_model_of_another_family_is_refused(folder):
    settings = {"family": "qwen3_vl", "evaluation": {"benchmarks": ["colour"]}}
    (folder / "other.json").write_text(json.dumps(settings))
    with pytest.raises(GraceError, match=r"model: config\.json says llava and the configuration family: qwen3_vl"):
        commands.evaluate(folder / "other.json", folder / "model", folder / "data", folder / "out")


def test_equal_files_are_the_same_model_whoever_made_them(folder, monkeypatch):
    run(folder)
    asked = _count_predictions(monkeypatch)
    made = json.loads((folder / "model/manifest.json").read_text())
    write_json(folder / "model/manifest.json", {**made, "run": "of another name"})
    write_json(folder / "model/environment.json", {"code": {"revision": "another"}})
    run(folder)
    assert asked == []
    (folder / "model/generation_config.json").write_text("{}")
    write_manifest(folder / "model")
    run(folder)
    assert sorted(asked) == sorted(NAMES)


def test_nothing_is_done_twice(folder, monkeypatch):
    first = run(folder)
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    monkeypatch.setattr(commands, "_asking", lambda *_: pytest.fail("the model was loaded again"))
    assert run(folder) == first
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()} == stamps


def _watch(monkeypatch, seen) -> None:
    """Call `seen(name)` before each benchmark is asked."""
    real = commands._asking

    @contextmanager
    def watched(*arguments):
        with real(*arguments) as (runner, predict):
            yield runner, lambda entry, path, spec: (seen(entry.name), predict(entry, path, spec))[1]

    monkeypatch.setattr(commands, "_asking", watched)


def _count_predictions(monkeypatch) -> list[str]:
    asked: list[str] = []
    _watch(monkeypatch, asked.append)
    return asked


def test_only_what_changed_is_asked_again(folder, monkeypatch):
    first = run(folder)
    asked = _count_predictions(monkeypatch)
    write_benchmark(folder / "data/benchmarks/pairs.parquet", rows(10, ("yes", "no"), 3))
    run(folder)
    assert asked == ["pairs"]
    asked.clear()
    run(folder, "colour")
    assert asked == [] and sorted(p.name for p in (folder / "out").iterdir()) == [
        "colour.parquet",
        "environment.json",
        "manifest.json",
    ]
    run(folder, "colour", limit=5)
    assert asked == ["colour"]
    asked.clear()
    shutil.rmtree(folder / "model")
    write_model(folder / "model", seed=1)
    second = run(folder, "colour")
    assert asked == ["colour"] and second["model"] != first["model"]


def test_edited_code_and_other_instructions_ask_again_and_accepted_code_does_not(folder, monkeypatch):
    first = run(folder, "colour")
    asked = _count_predictions(monkeypatch)
    real = CodeIndex.fingerprint

    def edited(self, *names):
        return {**real(self, *names), "data": {"benchmarks/edited.csv": "0"}}

    monkeypatch.setattr(CodeIndex, "fingerprint", edited)
    index = CodeIndex()
    frozen, now = (told(index, "evaluate", "grace.evaluate.harness_lm_eval") for told in (real, edited))
    about = {"changed": [], "by": "", "at": "", "reason": "none of it is read"}
    accepted = accepted_file(folder.parent)  # `run` is folder/run.json, so the results are its parent
    accepted.parent.mkdir(parents=True)
    accepted.write_text(json.dumps({"subcommand": "evaluate", "frozen": frozen, "accepted": now, **about}) + "\n")
    assert run(folder, "colour") == first and asked == []
    accepted.unlink()
    assert run(folder, "colour")["benchmarks"] == first["benchmarks"] and asked == ["colour"]
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "another")
    run(folder, "colour")
    assert asked == ["colour"] * 2


def test_a_stopped_suite_goes_on_where_it_was(folder, monkeypatch):
    def stop(name):
        if name == "pairs":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        _watch(patched, stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["colour.parquet", "presence.parquet"]
    asked = _count_predictions(monkeypatch)
    run(folder)
    assert asked == ["pairs"]


def test_the_same_run_gives_the_same_predictions(folder):
    first = run(folder)
    shutil.rmtree(folder / "out")
    second = run(folder)
    assert first == second and set(first["benchmarks"]) == set(NAMES)  # with the files' hashes: bytes are equal


def _break_image(folder):
    made = rows(12)
    made[4]["image"]["bytes"] = b"no image"
    write_benchmark(folder / "data/benchmarks/colour.parquet", made)


def _drop_image(folder):
    made = rows(12)
    made[4]["image"] = None
    write_benchmark(folder / "data/benchmarks/colour.parquet", made)


def _drop_column(folder):
    path = folder / "data/benchmarks/colour.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["image_id", "answer"]), path)


def _repeat(folder):
    made = rows(12)
    made[5]["id"] = made[4]["id"]
    write_benchmark(folder / "data/benchmarks/colour.parquet", made)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_break_image, r"colour\.parquet.*image of row-4: cannot be read"),
        (_drop_image, r"colour\.parquet: row row-4 has no image"),
        (_drop_column, r"colour\.parquet: column image_id, answer is missing"),
        (_repeat, r"colour\.parquet: id row-4 stands on more than one row"),
        (
            lambda folder: write_benchmark(folder / "data/benchmarks/colour.parquet", []),
            r"colour\.parquet: has no rows",
        ),
        (
            lambda folder: (folder / "data/benchmarks/colour.parquet").write_bytes(b"x"),
            r"colour\.parquet: not a readable",
        ),
        (
            lambda folder: (folder / "data/benchmarks/colour.parquet").unlink(),
            r"colour\.parquet: no such benchmark file",
        ),
    ],
    ids=["broken image", "no image", "no column", "repeated id", "no rows", "not parquet", "no file"],
)
def test_a_failed_benchmark_is_named_and_the_others_are_kept(folder, damage, said):
    damage(folder)
    with pytest.raises(GraceError, match=said):
        run(folder)
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["pairs.parquet", "presence.parquet"]


def test_a_model_that_answers_nothing_is_an_error_however_often_it_is_asked(folder, monkeypatch):
    import grace.evaluate.harness_lm_eval as harness

    real = harness.predict
    monkeypatch.setattr(harness, "predict", lambda *a: real(*a).assign(prediction=" "))
    for _ in range(2):
        with pytest.raises(GraceError, match="answered nothing to any question"):
            run(folder, "colour")
    assert not (folder / "out/manifest.json").exists()


def test_wrong_settings_are_said_in_a_sentence(folder, monkeypatch):
    with pytest.raises(GraceError, match="`color` is not in the registry"):
        run(folder, "color")
    with pytest.raises(GraceError, match="lm-eval has no task for `vqav2`; use grace or lmms-eval"):
        run(folder, "vqav2")
    with pytest.raises(GraceError, match="vlmeval_checkout: is not set"):
        run(folder, harness="vlmeval")
    with pytest.raises(GraceError, match="is no checkout of VLMEvalKit"):
        run(folder, harness="vlmeval", vlmeval_checkout=str(folder))
    monkeypatch.setitem(PACKAGES, "lmms-eval", "no_such_package")
    with pytest.raises(
        GraceError, match=r"lmms-eval is not installed in this environment; bash workflow/setup\.sh lmms-eval"
    ):
        run(folder, harness="lmms-eval")


def test_predictions_are_readable_as_plain_parquet(folder):
    run(folder, "colour")
    kept = pd.read_parquet(folder / "out/colour.parquet")
    assert kept["sample_id"].is_unique and kept["score"].between(0, 1).all()
