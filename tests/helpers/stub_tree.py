"""A copy of the workflow whose subcommands only leave marks: Snakefile, rules and config code are the real ones.

`grace` in the copy writes, instead of models and predictions, hashes of what it was given, so that outputs change
exactly when inputs do and a whole experiment takes seconds.
"""

import atexit
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import started
import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

STUB = """# Stands in for the command line: every output holds a hash of the command and of what it reads.

import hashlib
import json
import sys
import time
from pathlib import Path


def fingerprint(path):
    path = Path(path)
    path = path.parent if path.name == "development" else path  # a part of the data, which has their manifest
    return hashlib.sha256((path / "manifest.json" if path.is_dir() else path).read_bytes()).hexdigest()


real_main = main


def main():
    words = sys.argv[1:]
    if words[0] in REAL:
        return real_main()
    flags = dict(zip(words, words[1:]))
    read = [fingerprint(b) for a, b in zip(words, words[1:]) if a in READ]
    value = int(hashlib.sha256(json.dumps(read).encode()).hexdigest()[:4], 16) / 1000
    out = Path(flags["--out"])
    if words[0] == "report":
        results = Path(flags["--results"])
        every = sorted(results.rglob("predictions/manifest.json")) + [results / "config/experiment.json"]
        value = sum(json.loads(p.read_text()).get("accuracy", 0) for p in every)
        read = [fingerprint(p) for p in every + (sorted(results.glob("bench/*")) if words[1] == "speed" else [])]
    about = {"benchmarks": ["colour", "object"]} if words[0] == "prepare" else {}  # a list, as in the real data
    text = json.dumps({"accuracy": value, "read": read, "files": {}, **about}) + "\\n"
    targets = [out / "manifest.json"]
    if words[0] == "evaluate":
        asked = [[b for a, b in zip(words, words[1:]) if a == flag] for flag in ("--model", "--out")]
        for model, place in zip(*asked, strict=True):
            made = [fingerprint(path) for path in (flags["--run"], flags["--data"], model)]
            value = int(hashlib.sha256(json.dumps(made).encode()).hexdigest()[:4], 16) / 1000
            Path(place).mkdir(parents=True, exist_ok=True)
            Path(place, "manifest.json").write_text(json.dumps({"accuracy": value, "read": made, "files": {}}) + "\\n")
        return
    if words[:2] == ["cache", "write"]:
        shards = json.loads(Path(flags["--run"]).read_text())["cache"]["shards"]
        stem = f"shard-{int(flags['--shard']):05d}-of-{shards:05d}"
        targets = [out / f"{stem}.safetensors", out / f"{stem}.json"]
    elif out.suffix == ".csv":
        text = f"batch,tokens_per_second\\n1,{time.time_ns()}\\n"  # a time, as all that was measured
        targets = [out, out.with_suffix(".json")]
    elif out.suffix:
        targets = [out, *([out.with_suffix(".md")] if words[0] == "tune" else [])]
    if "--log" in flags:
        targets.append(Path(flags["--log"]))
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent.name == "model":
            target.with_name("timing.jsonl").write_text(json.dumps({"step": 1, "seconds": time.time_ns()}) + "\\n")
        if target.name == "manifest.json":  # another each time, as the machine and the code's revision may be
            target.with_name("environment.json").write_text(json.dumps({**MADE_WITH, "python": str(time.time_ns())}))
        target.write_text(text)


REAL = ("accept", "config", "plan", "provenance", "records", "verify")
MADE_WITH = {
    "code": {"revision": "0" * 40, "modified": False, "sha256": "0" * 64}, "packages": {}, "system": "",
    "arithmetic": {},
    "hardware": {"processor": "", "cores": 1, "memory_gib": 1, "gpus": []},
}  # fmt: skip
READ = ("--run", "--data", "--init", "--cache", "--teacher", "--model")
"""

CONFIG = """
experiment: demo
family: llava
compute_dtype: float32
data: {source: demo, images: 60}
teacher:
  architecture: {hidden_size: 64, intermediate_size: 128, layers: 2, heads: 4}
  train: {steps: 20, learning_rate: 1e-3}
student:
  architecture: {hidden_size: 32, intermediate_size: 64, layers: 2, heads: 4}
  train: {steps: 20, learning_rate: 1e-3}
cache: {shards: 1}
quantization: {group_size: 32}
finetune: {steps: 20, learning_rate: 1e-3}
recipes:
  finetune: {}
  grace: {kd: gated, rcka: true, controller: true}
  rtn: {post_training: rtn}
runs:
  - {recipes: [finetune, grace, rtn], precisions: [int4], seeds: [0]}
evaluation: {benchmarks: [colour, object]}
"""


@cache
def _programs() -> Path:
    """A folder with Snakemake as DVC starts it."""
    file = user_cache() / "bin/snakemake"
    file.parent.mkdir()
    file.write_text(f'#!/bin/sh\nexec {shlex.join(started.python("-m", "snakemake"))} "$@"\n')
    file.chmod(0o755)
    return file.parent


@cache
def user_cache() -> Path:
    """In place of the user's cache folder, in which every tree would leave what was parsed of its code."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Tree:
    """A folder with the workflow, a small experiment and stubbed subcommands."""

    parsed: Path | None = None  # what `grace.config.definitions` keeps of the code of the last tree that was run

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def make(cls, folder: Path) -> "Tree":
        """Copy what decides the DAG; data files of the package stay behind, nothing reads them."""
        shutil.copytree(
            ROOT / "workflow", folder / "workflow",
            ignore=shutil.ignore_patterns("__pycache__", "*.npz", "*.safetensors", "*.egg-info"),
        )  # fmt: skip
        shutil.copytree(ROOT / "rules", folder / "rules")
        shutil.copytree(ROOT / "envs", folder / "envs")
        (folder / "profiles").symlink_to("workflow/profiles")
        shutil.copy(ROOT / "Snakefile", folder)
        with (folder / "workflow/grace/cli/__init__.py").open(
            "a"
        ) as file:  # the subcommands stay: what they reach is their code
            file.write(f"\n\n{STUB}")
        (folder / "config.yaml").write_text(CONFIG)
        return cls(folder)

    def copy(self, folder: Path) -> "Tree":
        """The same tree elsewhere, with times, results and records."""
        shutil.copytree(self.folder, folder, symlinks=True)
        tree = Tree(folder)
        tree._know()
        return tree

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in the tree, with its own copy of the package first.

        Snakemake's jobs start as a user's do, for they import next to nothing. What was parsed of another tree's code,
        which is kept by the hash of each file's text, is known here as if Snakemake had been started before.
        """
        self._know()
        if command[0] in ("snakemake", "dvc"):
            command = tuple(started.python("-m", *command))
        elif command[0] == "grace":
            command = tuple(started.grace(*command[1:]))
        here = {
            "PYTHONPATH": str(self.folder / "workflow"),
            "PATH": os.pathsep.join([str(_programs()), str(BIN), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            "DVC_NO_ANALYTICS": "1",
            "XDG_CACHE_HOME": str(user_cache()),
        }
        done = subprocess.run(command, cwd=self.folder, env={**os.environ, **here}, capture_output=True, text=True)
        if self._parsed().exists():
            Tree.parsed = self._parsed()
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command[-9:])} failed\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done

    def _know(self) -> None:
        """Have what was parsed of the last tree for this one."""
        parsed = self._parsed()
        if not parsed.exists() and Tree.parsed is not None:
            shutil.copy(Tree.parsed, parsed)

    def _parsed(self) -> Path:
        package = hashlib.sha256(bytes(self.folder / "workflow/grace")).hexdigest()[:16]
        return user_cache() / f"grace/definitions/{package}.json"

    def snakemake(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run Snakemake on two cores."""
        return self.run("snakemake", "--cores", "2", *arguments, check=check)

    def grace(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a subcommand of `REAL`, which looks at the tree's results and code."""
        return self.run("grace", *arguments, check=check)

    def planned(self, *arguments: str) -> list[str]:
        """What a dry run would do: the jobs' messages, sorted, without the frozen parameters; empty for a no-op."""
        said = self.snakemake("--dry-run", *arguments)
        assert self._parsed().exists(), "`grace.config.definitions` keeps it elsewhere"
        jobs = re.findall(r"^Job \d+: (.*)$", said.stdout + said.stderr, re.MULTILINE)
        return sorted(job for job in jobs if not job.startswith("freeze "))

    def edit(self, **changes: object) -> None:
        """Set keys of the config; `a__b` is key b of section a."""
        path = self.folder / "config.yaml"
        config = yaml.safe_load(path.read_text())
        for key, value in changes.items():
            *sections, last = key.split("__")
            place = config
            for section in sections:
                place = place[section]
            place[last] = value
        path.write_text(yaml.safe_dump(config, sort_keys=False))
