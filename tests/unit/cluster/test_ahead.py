"""Students that are packed on the way by another student's job, and what their own jobs make of it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from quant_models import make_student
from typer.testing import CliRunner

from grace.cli import app
from grace.cluster.ahead import unpacked
from grace.cluster.lock import one_writer
from grace.files import MANIFEST, check_manifest


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with three students at INT4, a model at bf16 and one that is not whole."""
    results = tmp_path_factory.mktemp("trained") / "results/demo"
    for seed in range(3):
        make_student(_folder(results, seed) / "model", "llava", bits=4 if seed < 2 else 8)
    shutil.copytree(_folder(results, 0) / "model", results / "students/finetune/bf16/seed0/model")
    shutil.copytree(_folder(results, 0) / "model", _folder(results, 3) / "model")
    (_folder(results, 3) / "model" / MANIFEST).unlink()
    return results


@pytest.fixture
def results(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "results/demo")


def _folder(results: Path, seed: int) -> Path:
    return results / f"students/grace/int4/seed{seed}"


def _words(results: Path, seed: int) -> list[str]:
    folder = _folder(results, seed)
    return ["pack", "--model", str(folder / "model"), "--out", str(folder / "packed"), "--others", str(results)]


def _pack(results: Path, seed: int) -> str:
    done = CliRunner().invoke(app, _words(results, seed))
    assert done.exit_code == 0, done.output
    return done.output


def _ahead(results: Path, seed: int) -> list[Path]:
    return list(_folder(results, seed).glob(".packed*"))


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "environment.json"}


def test_students_that_wait_are_packed_too_and_their_own_jobs_take_that_over(results: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(results, tmp_path / "alone")
    _pack(results, 0)
    for seed in (1, 2):
        assert len(_ahead(results, seed)) == 1 and not (_folder(results, seed) / "packed").exists()
    assert not _ahead(results, 3) and not list(results.glob("students/finetune/**/.packed*"))
    heavy = {"torch", "transformers", "numpy"}
    code = f"from grace.cli import app; app({_words(results, 1)}, standalone_mode=False)"
    code += f"\nimport sys; print({heavy} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
    _pack(results, 2)
    for seed in (1, 2):
        words = _words(alone, seed)[:-2]
        assert CliRunner().invoke(app, words).exit_code == 0
        check_manifest(_folder(results, seed) / "packed")
        assert _files(_folder(results, seed) / "packed") == _files(_folder(alone, seed) / "packed")
        assert not _ahead(results, seed)
    assert not list(unpacked(results))


@pytest.mark.parametrize("change", ["another model", "a damaged file", "a file that is gone"])
def test_what_does_not_hold_is_packed_anew(results: Path, change: str) -> None:
    _pack(results, 0)
    (ahead,) = _ahead(results, 1)
    if change == "another model":
        shutil.rmtree(_folder(results, 1) / "model")
        shutil.copytree(_folder(results, 2) / "model", _folder(results, 1) / "model")
    elif change == "a damaged file":
        (ahead / "config.json").write_text("{}")
    else:
        (ahead / "config.json").unlink()
    _pack(results, 1)
    check_manifest(_folder(results, 1) / "packed")
    assert not _ahead(results, 1)
    expected = 2 if change == "another model" else 1
    CliRunner().invoke(app, _words(results, expected))
    assert _files(_folder(results, 1) / "packed") == _files(_folder(results, expected) / "packed")


def test_a_student_that_its_own_job_packs_is_passed_over(results: Path) -> None:
    with one_writer(_folder(results, 1) / "packed"):
        assert "is being written by" in _pack(results, 0)
        assert not list(_folder(results, 1).glob(".packed.*.ahead"))
    assert _ahead(results, 2)
