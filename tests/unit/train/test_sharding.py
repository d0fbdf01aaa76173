"""Layers are sharded under one root: one is gathered while another computes; every way gives the same gradients."""

import json
import subprocess
from pathlib import Path

import pytest
import started

HELPER = Path(__file__).parents[2] / "helpers" / "sharded_steps.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded") / "found.json"
    command = started.python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", HELPER, out)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "view tensor" not in done.stderr
    return json.loads(out.read_text())


def test_every_way_gives_the_whole_model_s_gradients(found):
    assert len(found) == 4
    for way in found:
        assert way["apart"] < 1e-5, way


def test_layers_share_their_streams_under_one_root(found):
    assert [(way["roots"], way["streams"], way["sharded"]) for way in found] == [(0, 1, True)] * 4
