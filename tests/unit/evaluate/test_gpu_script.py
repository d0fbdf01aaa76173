"""The script that measures evaluation on a GPU runs to its end with a tiny model on a CPU."""

import json
import subprocess
from pathlib import Path

import started

SCRIPT = Path(__file__).parents[2] / "gpu/bench_evaluate.py"


def test_it_runs_to_its_end(tmp_path: Path) -> None:
    flags = ("--tiny", "--images", "2", "--questions", "2", "--new-tokens", "2", "--batch", "4", "--out", "found.json")
    done = subprocess.run(started.python(SCRIPT, *flags), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["questions"] == 4 and found["runner"] > 0 and found["same_answers"] == 1
