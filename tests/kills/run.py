"""python tests/kills/run.py --kills 200 --seed 0: kill a real experiment again and again, and compare its predictions.

A small experiment with real training is built once untouched. Then, folder by folder, the same is built by a Snakemake
that is killed at random times in random ways and simply started again, as a user would, until the number of kills is
reached and the run ends well. Afterwards every prediction must equal the untouched run's, no `.part` or lock file may
be left, and a dry run must find nothing to do. Nothing is repaired by hand: no --unlock, no deleted file.

Ways: one job (KILL, TERM), Snakemake alone (KILL, TERM, INT; its jobs go on as orphans), the whole group (KILL, INT), the
group halted for a while (STOP and CONT), and a disk that is full (no file may grow beyond a size).
The schedule follows from --seed alone; exit status 0 when everything held.
"""

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
experiment: killed
family: llava
compute_dtype: float32
data: {source: demo, images: 40, questions_per_image: 4, development_questions: 4, benchmark_questions: 12}
teacher:
  architecture: {hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2}
  train: {steps: 40, learning_rate: 3e-3, checkpoint_every: 5}
student:
  architecture: {hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2}
  train: {steps: 40, learning_rate: 3e-3, checkpoint_every: 5}
cache: {shards: 2, audit: 0.05}
quantization: {group_size: 32, calibration: 8}
finetune: {steps: 40, learning_rate: 1e-3, checkpoint_every: 5}
recipes:
  grace: {kd: gated, rcka: true, controller: true}
  rtn: {post_training: rtn}
runs:
  - {recipes: [grace, rtn], precisions: [int4], seeds: [0]}
evaluation: {benchmarks: [colour], batch: 12}
"""
WAYS = (
    "job KILL",
    "job TERM",
    "engine KILL",
    "engine TERM",
    "engine INT",
    "group KILL",
    "group INT",
    "group STOP",
    "disk",
)
ROOM = (3_000, 30_000, 300_000, 1_000_000)  # bytes that a file may have on a full disk
ATTEMPT_S = 1800.0


def start(folder: Path, room: int | None = None, *more: str) -> subprocess.Popen:
    """Snakemake up to the last predictions, in a process group of its own; its words are appended to snakemake.txt."""
    students = "results/killed/students"
    targets = [f"{students}/{recipe}/int4/seed0/predictions/manifest.json" for recipe in ("grace", "rtn")]
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    command += ["--configfile", str(folder / "config.yaml"), "--cores", "2", "--quiet", "all"]
    command += ["--workflow-profile", str(ROOT / "workflow/profiles/default"), *more, "--", *targets]

    def bounded() -> None:
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    here = {"PYTHONPATH": str(ROOT / "workflow"), "OMP_NUM_THREADS": "1"}
    with (folder / "snakemake.txt").open("a") as words:
        return subprocess.Popen(
            command, env={**os.environ, **here}, stdout=words, stderr=words, start_new_session=True, preexec_fn=bounded
        )


def jobs(group: int) -> list[int]:
    """Processes of a group that run a subcommand of the pipeline."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if os.getpgid(int(path.name)) == group and any(word.endswith(b"/grace") for word in words[:2]):
                found.append(int(path.name))
        except (OSError, ProcessLookupError):
            continue
    return found


def kill(running: subprocess.Popen, way: str, chance: random.Random) -> bool:
    """Do it; False where there was nothing to kill."""
    target, name = way.split()
    number = getattr(signal, f"SIG{name}")
    if running.poll() is not None:
        return False
    if target == "job":
        found = jobs(running.pid)
        if not found:
            return False
        os.kill(chance.choice(found), number)
    elif target == "engine":
        os.kill(running.pid, number)
    else:
        os.killpg(running.pid, number)
        if name == "STOP":
            time.sleep(1.0)
            os.killpg(running.pid, signal.SIGCONT)
    return True


def end(running: subprocess.Popen, seconds: float) -> int:
    """Wait for an end; a Snakemake that was asked to end (TERM) may wait for its jobs first."""
    try:
        return running.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        raise SystemExit(f"kills: Snakemake had not ended {seconds:.0f} s later") from None


def predictions(folder: Path) -> dict[str, object]:
    """Every prediction by file and question."""
    return {
        path.relative_to(folder).as_posix(): pq.read_table(
            path, columns=["sample_id", "prediction", "score"]
        ).to_pydict()
        for path in sorted(folder.rglob("predictions/*.parquet"))
    }


def build(folder: Path) -> float:
    """Build untouched; seconds."""
    began = time.monotonic()
    if end(start(folder), ATTEMPT_S):
        raise SystemExit(f"kills: a run that nobody touched failed\n{(folder / 'snakemake.txt').read_text()[-3000:]}")
    return time.monotonic() - began


def ordeal(folder: Path, kills: int, seconds: float, chance: random.Random) -> list[str]:
    """Kill `kills` times or until the build is done, then let it end; returns the ways."""
    done: list[str] = []
    while len(done) < kills:
        way = chance.choice(WAYS)
        room = chance.choice(ROOM) if way == "disk" else None
        running = start(folder, room)
        if room is not None:
            if end(running, ATTEMPT_S) == 0:
                break
        else:
            time.sleep(chance.uniform(2.0, 2.0 + 0.5 * seconds))
            if not kill(running, way, chance):
                if running.poll() == 0:
                    break
                continue
            if end(running, ATTEMPT_S) == 0:  # it was halted, or the job that was killed had ended
                done.append(way)
                break
        done.append(way)
        print(f"  {len(done)}: {way}{f' at {room} bytes' if room else ''}", flush=True)
    for _ in range(3):  # a job that was killed last fails its run; the next start goes on
        if end(start(folder), ATTEMPT_S) == 0:
            return done
    raise SystemExit(f"kills: not built after {done}\n{(folder / 'snakemake.txt').read_text()[-4000:]}")


def check(folder: Path, right: dict[str, object]) -> None:
    """What must hold afterwards."""
    if predictions(folder) != right:
        raise SystemExit(f"kills: {folder}: other predictions than the run that nobody touched")
    left = [p for p in (folder / "results").rglob(".*") if p.name.endswith((".part", ".lock"))]
    if left:
        raise SystemExit(f"kills: left behind: {', '.join(map(str, left))}")
    before = (folder / "snakemake.txt").stat().st_size
    end(start(folder, None, "--dry-run"), ATTEMPT_S)
    said = (folder / "snakemake.txt").read_text()[before:]
    if "rule " in said or "Error" in said:
        raise SystemExit(f"kills: a dry run finds something to do\n{said[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0, help="begin no further folder after so long; 0: no bound")
    chosen = parser.parse_args()
    chance, began, done = random.Random(chosen.seed), time.monotonic(), []
    with TemporaryDirectory(prefix="grace-kills-") as temporary:
        home = Path(temporary)
        (home / "untouched").mkdir()
        (home / "untouched/config.yaml").write_text(CONFIG)
        seconds = build(home / "untouched")
        right = predictions(home / "untouched")
        print(f"untouched: {seconds:.0f} s, {len(right)} files of predictions", flush=True)
        number = 0
        while len(done) < chosen.kills and not (chosen.seconds and time.monotonic() - began > chosen.seconds):
            folder = home / str(number)
            number += 1
            folder.mkdir()
            (folder / "config.yaml").write_text(CONFIG)
            done += ordeal(folder, min(12, chosen.kills - len(done)), seconds, chance)
            check(folder, right)
    counts = ", ".join(f"{way} {done.count(way)}" for way in WAYS if way in done)
    print(f"{len(done)} kills in {number} folders and {time.monotonic() - began:.0f} s, seed {chosen.seed}: {counts}")
    print("predictions equal, nothing left behind, nothing repaired by hand")


if __name__ == "__main__":
    main()
