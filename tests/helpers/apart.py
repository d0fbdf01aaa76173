"""Scripts that need Triton without its interpreter, which the tests' own process has switched on."""

import os
import subprocess
import sys
from pathlib import Path


def run_apart(script: str) -> None:
    """Run a script of tests/compile in a process of its own; it has to succeed."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "compile" / script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
