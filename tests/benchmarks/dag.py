"""`python tests/benchmarks/dag.py FOLDER`: how long `snakemake` and `dvc status` take to find nothing to do.

Not a test: it is run by hand and takes some minutes. The tree is workflow/experiments/llava15_7b.yaml with stubbed
subcommands: its jobs, and 100,000 small files, most of them in the data folder and listed in its manifest. What is
printed goes to docs/log/.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml
from stub_tree import BIN, ROOT, Tree

NAME, FILES = "llava15_7b", 100_000

# the stubbed `prepare` makes many files as well and lists them; further processes would only cost time here
HOOK = f"""

_leave_marks = main


def main():
    from grace.files import write_manifest

    _leave_marks()
    if sys.argv[1] == "prepare":
        out = Path(sys.argv[sys.argv.index("--out") + 1])
        for number in range({FILES}):
            path = out / "images" / f"{{number // 1000:03}}" / f"{{number:06}}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(number))
        write_manifest(out, accuracy=0.0)
"""


def make(folder: Path) -> Tree:
    """The tree, built by Snakemake and taken over by DVC."""
    tree = Tree.make(folder)
    with (folder / "workflow/grace/cli/__init__.py").open("a") as file:
        file.write(HOOK)
    shutil.copy(folder / "workflow/experiments" / f"{NAME}.yaml", folder / "config.yaml")
    tree.edit(resources={})
    (folder / "data/images").mkdir(parents=True)
    (folder / "data/llava_v1_5_mix665k.json").write_text("[]")
    for name in (".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "config.local"))
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    stage["stages"]["build"]["foreach"] = {NAME: "config.yaml"}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stage["stages"]}, sort_keys=False))
    tree.run("git", "init", "-q")
    start = time.perf_counter()
    tree.snakemake("--quiet", "all")
    print(f"built by Snakemake in {time.perf_counter() - start:.0f} s", flush=True)
    start = time.perf_counter()
    tree.run("dvc", "repro", "-q")
    print(f"taken over by `dvc repro` in {time.perf_counter() - start:.0f} s", flush=True)
    return tree


def timed(tree: Tree, *command: str) -> None:
    """Run it, and say how long it took and its last words."""
    here = {"PYTHONPATH": str(tree.folder / "workflow"), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(command, cwd=tree.folder, env={**os.environ, **here}, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    said = (done.stdout + done.stderr).strip().splitlines() or ["(nothing)"]
    told = next((line for line in said if re.search("Nothing to be done|up to date", line)), said[-1])
    print(f"{' '.join(command)}: {wall:.1f} s, {cpu:.1f} s of processor time; {told}", flush=True)


if __name__ == "__main__":
    folder = Path(sys.argv[1]).absolute()
    tree = Tree(folder) if (folder / "dvc.lock").exists() else make(folder)
    results = folder / "results" / NAME
    jobs = sum(1 for _ in (folder / ".snakemake/metadata").iterdir())
    files = sum(len(names) for _, _, names in os.walk(results))
    print(f"{files:,} files, {jobs:,} recorded outputs, {os.cpu_count()} cores")
    for _ in range(3):
        timed(tree, "snakemake", "--cores", "2")
        timed(tree, "dvc", "status")
