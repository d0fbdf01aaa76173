"""The scripts that measure training on GPUs run to their end with tiny shapes on a CPU."""

import json
import subprocess
from pathlib import Path

import pytest
import started

SCRIPTS = Path(__file__).parents[2] / "gpu"
COMMANDS = {
    "scaling": "bench_scaling.py --shape tiny --batch 8 --processes 1 --steps 1 --warm 1",
    "cache": "bench_cache.py --shape tiny --conversations 12 --ways packed --formats hidden --folder shards",
    "checkpoint": "bench_checkpoint.py --shape tiny --folder checkpoints",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_it_runs_to_its_end(tmp_path, name):
    script, *flags = COMMANDS[name].split()
    command = started.python(SCRIPTS / script, "--out", "found.json", *flags)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    measured = found.get("points") or found.get("rows") or [found]
    assert all(entry.get("tokens_per_second", entry.get("step_s")) > 0 for entry in measured)
