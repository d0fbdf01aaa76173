"""Several processes as one job: started again where one of them asks for it, ended with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grace.cluster.launch import launcher, repeated
from grace.errors import GraceError

AGAIN = """
import sys
from pathlib import Path
note, starts = Path(sys.argv[1]), Path(sys.argv[2])
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
if len(starts.read_text()) <= int(sys.argv[3]):
    note.write_text(starts.read_text())
sys.exit(0 if len(starts.read_text()) > int(sys.argv[3]) and int(sys.argv[4]) else 3)
"""


@pytest.fixture(autouse=True)
def handlers():
    """Those of this process as they were."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("asks, well, code, starts", [(0, 1, 0, 1), (2, 1, 0, 3), (0, 0, 3, 1), (2, 0, 3, 3)])
def test_a_changed_note_is_a_new_start_and_a_plain_failure_is_none(tmp_path, asks, well, code, starts):
    (tmp_path / "note").write_text("of an earlier run")
    command = [sys.executable, "-c", AGAIN, str(tmp_path / "note"), str(tmp_path / "starts"), str(asks), str(well)]
    assert repeated(command, dict(os.environ), tmp_path / "note") == code
    assert len((tmp_path / "starts").read_text()) == starts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_processes_end_with_their_parent(tmp_path, number):
    child = f"import os, time; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = "import os, sys; from pathlib import Path; from grace.cluster.launch import repeated; "
    code += f"sys.exit(repeated([sys.executable, '-c', {child!r}], dict(os.environ), Path('no note')))"
    parent = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not ((tmp_path / "child").exists() and (tmp_path / "child").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.send_signal(number)
    assert parent.wait(60) in (128 + number, -number)
    process = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    while process.exists() and ") Z" not in process.read_text():
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)


def test_several_machines_without_a_cluster_are_a_sentence(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(GraceError, match="several machines need a Slurm job"):
        launcher(2, 1)
