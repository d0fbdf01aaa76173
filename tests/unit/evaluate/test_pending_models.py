"""Models that wait to be asked: which they are, and that being asked on the way changes nothing for their own job."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from evaluate_models import write_asked, write_model
from typer.testing import CliRunner

import grace.models
from grace.cli import app
from grace.cluster import ahead
from grace.cluster.lock import one_writer
from grace.config.evaluation import Evaluation
from grace.config.job_parameters import EvaluateRun
from grace.evaluate.pending_models import pending
from grace.files import MANIFEST, write_json


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with three bf16 students that nobody asked, and one that is not whole."""
    folder = tmp_path_factory.mktemp("waiting") / "results/demo"
    write_asked(folder)
    evaluation = Evaluation(benchmarks=["colour", "presence"], batch=4)
    write_json(folder / "run.json", EvaluateRun(family="llava", evaluation=evaluation).model_dump(mode="json"))
    for seed in range(3):
        write_model(folder / f"students/baseline/bf16/seed{seed}/model", seed=seed)
    shutil.copytree(folder / "students/baseline/bf16/seed0/model", folder / "students/baseline/bf16/seed3/model")
    (folder / "students/baseline/bf16/seed3/model" / MANIFEST).unlink()
    return folder


@pytest.fixture
def results(asked: Path, tmp_path: Path) -> Path:
    return shutil.copytree(asked, tmp_path / "results/demo")


def _seed(results: Path, seed: int) -> Path:
    return results / f"students/baseline/bf16/seed{seed}"


def _words(results: Path, seed: int) -> list[str]:
    words = ["evaluate", "--run", results / "run.json", "--data", results / "data"]
    words += ["--model", _seed(results, seed) / "model", "--out", _seed(results, seed) / "predictions"]
    return list(map(str, words))


def _evaluate(results: Path, seed: int, *more: str):
    return CliRunner().invoke(app, [*_words(results, seed), *more])


def _predictions(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "predictions").iterdir())}


def test_integers_are_asked_packed_and_those_with_predictions_are_not_asked(tmp_path: Path) -> None:
    for name in (
        "teacher/model",
        "students/a/int4/seed0/model",
        "students/a/int4/seed1/packed",
        "students/a/int8-outliers/seed0/packed",
        "students/b/bf16/seed0/model",
        "students/b/bf16/seed1/model",
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / MANIFEST).write_text("{}")  # fmt: skip
    (tmp_path / "students/b/bf16/seed1/predictions").mkdir()
    found = [model.relative_to(tmp_path).as_posix() for model, _ in pending(tmp_path)]
    assert found == [
        "teacher/model", "students/a/int4/seed1/packed", "students/a/int8-outliers/seed0/packed",
        "students/b/bf16/seed0/model",
    ]  # fmt: skip


def test_a_model_asked_on_the_way_gives_what_its_own_job_gives(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = shutil.copytree(results, results.parent / "alone")
    assert _evaluate(alone, 1).exit_code == 0
    done = _evaluate(results, 0, "--others", str(results))
    assert done.exit_code == 0, done.output
    assert (_seed(results, 0) / "predictions" / MANIFEST).is_file()
    found = _predictions(_seed(results, 1))
    assert MANIFEST not in found, "the manifest is its own job's"
    assert {name for name in found if name.endswith(".parquet")} == {"colour.parquet", "presence.parquet"}
    assert not (_seed(results, 3) / "predictions").exists(), "a folder without a manifest is no model yet"
    monkeypatch.setattr(grace.models, "load_model", lambda *_: pytest.fail("its own job loaded the model again"))
    assert _evaluate(results, 1).exit_code == 0
    own, theirs = _predictions(_seed(results, 1)), _predictions(_seed(alone, 1))
    assert own.pop("environment.json") and theirs.pop("environment.json")
    assert own == theirs


def test_a_job_whose_answers_are_there_imports_neither_torch_nor_pandas(results: Path) -> None:
    assert _evaluate(results, 0, "--others", str(results)).exit_code == 0
    words = [*_words(results, 1), "--others", str(results)]
    heavy = {"torch", "transformers", "numpy", "pandas", "scipy", "pyarrow", "datasets"}
    code = f"from grace.cli import app; app({words}, standalone_mode=False)"
    code += f"\nimport sys; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
    assert (_seed(results, 1) / "predictions" / MANIFEST).is_file()


@pytest.mark.parametrize("damage", ["a file is cut off", "a file is gone", "other settings", "the sums are damaged"])
def test_sums_that_do_not_hold_are_not_taken_over(results: Path, damage: str) -> None:
    assert _evaluate(results, 0, "--others", str(results)).exit_code == 0
    folder = _seed(results, 1) / "predictions"
    alone = shutil.copytree(results, results.parent / "alone")
    shutil.rmtree(_seed(alone, 1) / "predictions")
    if damage == "a file is cut off":
        (folder / "colour.parquet").write_bytes(b"PAR1")
    elif damage == "a file is gone":
        (folder / "colour.parquet").unlink()
    elif damage == "the sums are damaged":
        next(folder.glob(".*.json")).write_text('{"key": 1}')
    else:
        evaluation = Evaluation(benchmarks=["colour", "presence"], batch=4, limit=5)
        for place in (results, alone):
            run = EvaluateRun(family="llava", evaluation=evaluation)
            write_json(place / "run.json", run.model_dump(mode="json"))
    assert _evaluate(results, 1).exit_code == 0
    assert _evaluate(alone, 1).exit_code == 0
    own, expected = _predictions(_seed(results, 1)), _predictions(_seed(alone, 1))
    assert own.pop("environment.json") and expected.pop("environment.json")
    assert own == expected


def test_another_models_fault_is_left_to_its_own_job(results: Path) -> None:
    (_seed(results, 1) / "model/model.safetensors").write_bytes(b"cut off")
    done = _evaluate(results, 0, "--others", str(results))
    assert done.exit_code == 0, done.output
    assert (_seed(results, 2) / "predictions/colour.parquet").is_file(), "the next one is asked all the same"
    assert _evaluate(results, 1).exit_code != 0


def test_a_model_that_its_own_job_asks_is_passed_over(results: Path) -> None:
    with one_writer(_seed(results, 1) / "predictions"):
        assert _evaluate(results, 0, "--others", str(results)).exit_code == 0
    assert not (_seed(results, 1) / "predictions/colour.parquet").exists()
    assert (_seed(results, 2) / "predictions/colour.parquet").is_file()


def test_slow_models_are_left_to_jobs_of_their_own(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Path] = []
    now = time.monotonic()
    ahead.while_quick(pending(results), now - ahead.QUICK - 1, lambda model, out: called.append(model))
    assert not called, "its own model took long"
    monkeypatch.setattr(ahead, "ALTOGETHER", 10.0)
    ahead.while_quick(pending(results), now - 11, lambda model, out: called.append(model))
    assert not called, "the job has run long enough"
    ahead.while_quick(pending(results), now, lambda model, out: called.append(model))
    assert len(called) == 3
