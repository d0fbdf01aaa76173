"""workflow/setup.sh: installs once, adds extras, and never takes one away."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Stands in for the environment's Python: notes what pip is asked for, and runs everything else.
PYTHON = f"""#!/usr/bin/env bash
if [ "$1" = "-m" ] && [ "$2" = "pip" ]; then shift 2; echo "$*" >> pip.log; exit 0; fi
exec {sys.executable} "$@"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in (
        "workflow/setup.sh",
        "envs/constraints.txt",
        "envs/lmms-eval.txt",
        "envs/test-material.txt",
        "pyproject.toml",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def _setup(checkout: Path, *extras: str) -> list[str]:
    """What pip was asked for."""
    log = checkout / "pip.log"
    log.unlink(missing_ok=True)
    subprocess.run(["bash", "workflow/setup.sh", *extras], cwd=checkout, check=True, capture_output=True)
    return log.read_text().splitlines() if log.exists() else []


def test_it_installs_once_and_adds_extras(checkout: Path) -> None:
    first = _setup(checkout)
    assert first[0].endswith("torch==2.13.0") and first[1].endswith("-c envs/constraints.txt -e .[pipeline]")
    assert _setup(checkout) == []
    tests = _setup(checkout, "test")
    assert (
        tests[1].endswith("-e .[pipeline,test]")
        and tests[2].endswith("--no-deps -r envs/lmms-eval.txt")
        and tests[3].endswith("--no-deps -r envs/test-material.txt")
        and len(first) == 2
    )
    assert _setup(checkout, "cluster")[1].endswith("-e .[cluster,pipeline,test]")
    assert _setup(checkout) == []


def test_lmms_eval_comes_without_its_dependencies(checkout: Path) -> None:
    asked = _setup(checkout, "lmms-eval")
    assert asked[1].endswith("-e .[lmms-eval,pipeline]") and asked[2].endswith("--no-deps -r envs/lmms-eval.txt")


def test_it_installs_again_when_pins_change(checkout: Path) -> None:
    _setup(checkout, "test")
    with (checkout / "envs/constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert _setup(checkout)[1].endswith("-e .[pipeline,test]")


def test_an_unknown_extra_is_named(checkout: Path) -> None:
    done = subprocess.run(["bash", "workflow/setup.sh", "tests"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 2 and "no extra 'tests'; use test, docs, lmms-eval, cluster, s3 or kernels" in done.stderr


def test_pins_are_whole_and_name_no_local_build() -> None:
    lines = (ROOT / "envs/constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(pin.count("==") == 1 and "+" not in pin for pin in pins)
    assert not [pin for pin in pins if pin.startswith("triton=")]
