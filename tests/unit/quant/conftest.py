"""What several files take: a quantised student's folder, and a copy of it to damage."""

import shutil
from pathlib import Path

import pytest
from quant_models import make_student


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return make_student(tmp_path_factory.mktemp("student") / "model")


@pytest.fixture
def copied(student, tmp_path):
    return Path(shutil.copytree(student, tmp_path / "copy"))
