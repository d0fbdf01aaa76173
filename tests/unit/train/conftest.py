"""An experiment with tiny models, which tests only read."""

import pytest
from tiny_runs import make_home


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("experiment"))
