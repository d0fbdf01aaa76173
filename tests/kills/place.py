"""A small experiment with real training in a folder of its own, and the processes that build it."""

import ctypes
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grace.files import sha256

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
RESULTS = Path("results/killed")
MARK = "GRACE_KILLS_FOLDER"  # in the environment of every process that builds in a folder
DISK = 192 * 2**20  # bytes of a folder's own file system
CONFIG = """
experiment: killed
family: llava
compute_dtype: float32
data: {source: demo, images: 40, questions_per_image: 4, development_questions: 4, benchmark_questions: 12}
teacher:
  architecture: {hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2}
  train: {steps: 60, learning_rate: 3e-3, checkpoint_every: 5}
student:
  architecture: {hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2}
  train: {steps: 60, learning_rate: 3e-3, checkpoint_every: 5}
cache: {shards: 1, audit: 0.05}
quantization: {group_size: 32, calibration: 8}
finetune: {steps: 60, learning_rate: 1e-3, checkpoint_every: 5}
recipes:
  grace: {kd: gated, rcka: true, controller: true}
runs:
  - {recipes: [grace], precisions: [int4], seeds: [0]}
evaluation: {benchmarks: [colour], batch: 12}
"""
GOAL = f"{RESULTS}/students/grace/int4/seed0/predictions/manifest.json"
SNAKEMAKE = [
    "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--configfile", "config.yaml", "--cores", "2", "--quiet",
    "all",
    "--workflow-profile", str(ROOT / "workflow/profiles/default"),
]  # fmt: skip
DVC = f"""
stages:
  build:
    cmd:
      - {" ".join([*SNAKEMAKE, "--", GOAL])}
      - grace records save {RESULTS}
    params:
      - config.yaml:
    outs:
      - {RESULTS}/data: {{persist: true}}
      - {RESULTS}/students: {{persist: true}}
      - {RESULTS}/provenance.jsonl: {{persist: true}}
"""


class Place:
    """One folder; every program that is started in it can be found, also when it has outlived its parents."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.words = folder, folder / "words.txt"
        folder.mkdir()
        self.own_disk = _mounted(folder)
        (folder / "config.yaml").write_text(CONFIG)
        (folder / "dvc.yaml").write_text(DVC)
        self.remote = folder.with_name(f"{folder.name}-remote")
        self.run("dvc", "init", "--no-scm", "-q")
        self.run("dvc", "remote", "add", "-q", "-d", "storage", str(self.remote))

    def _environment(self) -> dict[str, str]:
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        own = {"PYTHONPATH": str(ROOT / "workflow"), "OMP_NUM_THREADS": "1", "PATH": path, MARK: str(self.folder)}
        return {**os.environ, **own, "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": f"{self.folder}-site"}

    def start(self, *command: str) -> subprocess.Popen:
        """A program in a process group of its own; its words are appended to words.txt, beside the folder's disk."""
        with self.words.open("a") as words:
            return subprocess.Popen(
                command, cwd=self.folder, env=self._environment(), stdout=words, stderr=words, start_new_session=True
            )

    def build(self, *more: str) -> subprocess.Popen:
        """Snakemake, up to the last predictions."""
        return self.start(*SNAKEMAKE, *more, "--", GOAL)

    def run(self, *command: str, folder: Path | None = None) -> str:
        """A program that nobody kills; its words."""
        done = subprocess.run(
            command, cwd=folder or self.folder, env=self._environment(), capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"kills: {' '.join(command)} failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout + done.stderr

    def processes(self, word: str) -> list[int]:
        """Living processes of this folder whose program is `word`, such as `grace` or `snakemake`."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")[:2]
                if any(part.endswith(f"/{word}".encode()) for part in words):
                    mine = f"{MARK}={self.folder}".encode() in (path / "environ").read_bytes().split(b"\0")
                    if mine and b") Z" not in (path / "stat").read_bytes():
                        found.append(int(path.name))
        return sorted(found)

    def written(self) -> set[str]:
        """Checkpoints, and what is being written at this moment."""
        found = set()
        for top, folders, files in os.walk(self.folder / RESULTS):
            found |= {f"{top}/{name}" for name in (*folders, *files) if name.endswith(".part") or "step-" in name}
        return found

    @contextmanager
    def full_disk(self, room: int) -> Iterator[None]:
        """Within the block only `room` more bytes can be written; without a disk of its own, into any one file."""
        if self.own_disk:
            ballast = self.folder / ".ballast"
            about = os.statvfs(self.folder)
            with ballast.open("wb") as file, suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(1, about.f_bavail * about.f_bsize - room))
            try:
                yield
            finally:
                ballast.unlink()
            return
        self._limit(room)
        try:
            yield
        finally:
            self._limit(resource.RLIM_INFINITY)

    def _limit(self, size: int) -> None:
        for word in ("snakemake", "dvc", "grace"):
            for process in self.processes(word):
                with suppress(OSError):
                    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def made(self) -> dict[str, str]:
        """Hashes of all predictions, weights and manifests of the students."""
        return hashes(self.folder / RESULTS / "students")

    def left(self) -> list[str]:
        """Files that a writer should have taken away."""
        return sorted(str(p) for p in (self.folder / RESULTS).rglob(".*") if p.name.endswith((".part", ".lock")))

    def remove(self) -> None:
        """The folder, its disk and its remote."""
        for word in ("snakemake", "dvc", "grace"):  # where a check failed, others may still build here
            for process in self.processes(word):
                with suppress(ProcessLookupError):
                    os.kill(process, 9)
        if self.own_disk:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
        for path in (self.folder, self.remote, Path(f"{self.folder}-site")):
            shutil.rmtree(path, ignore_errors=True)


def hashes(students: Path) -> dict[str, str]:
    """Of all predictions, weights and manifests below a folder of students."""
    kinds = ("predictions/*.parquet", "*/model.safetensors", "*/manifest.json")
    return {p.relative_to(students).as_posix(): sha256(p) for kind in kinds for p in sorted(students.rglob(kind))}


def own_mounts() -> None:
    """What this process mounts is seen by it and its children alone, and goes with them; as root only."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, recursive_private = 0x00020000, 0x44000
    if os.geteuid() == 0 and libc.unshare(new_namespace) == 0:
        libc.mount(b"none", b"/", None, recursive_private, None)
        os.environ[f"{MARK}_DISK"] = "1"


def _mounted(folder: Path) -> bool:
    """Give a folder a small file system of its own, which can be filled; False where that is not allowed."""
    if f"{MARK}_DISK" not in os.environ:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "kills", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def wait(running: subprocess.Popen, seconds: float) -> int:
    """The exit status; a program that does not end is killed, and the whole run has failed."""
    try:
        return running.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, 9)
        running.wait()
        program = running.args[0]  # type: ignore[index]
        raise SystemExit(f"kills: {program} had not ended {seconds:.0f} s later") from None


def until(true, seconds: float, every: float = 0.02) -> bool:
    """Wait until something holds; False where it did not in time."""
    end = time.monotonic() + seconds
    while not (found := bool(true())) and time.monotonic() < end:
        time.sleep(every)
    return found
