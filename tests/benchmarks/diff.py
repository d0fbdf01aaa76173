"""`python tests/benchmarks/diff.py FOLDER`: how long `grace diff` takes on two result trees of the paper's size.

Not a test: it is run by hand, takes some minutes and 4 GB. The trees hold 30 models' simulated predictions on the
paper's 14 benchmarks with their real numbers of questions; in the second every model answers some of them otherwise.
Each comparison is a process of its own, files in the page cache; what is printed goes to docs/log/.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grace.benchmarks.registry import BENCHMARKS
from grace.files import sha256, write_json
from grace.results.predictions import SCHEMA

SIZES = {name: benchmark.size for name, benchmark in BENCHMARKS.items() if not benchmark.mirrors}
MODELS = [(recipe, seed) for recipe in (f"recipe{number}" for number in range(10)) for seed in range(3)]
CHANGED = 0.03  # share of the answers that the second version gives otherwise


def questions(benchmark: str, count: int) -> dict[str, pa.Array]:
    """What every model's file of a benchmark shares."""
    random = np.random.default_rng(count)
    images = np.sort(random.integers(0, max(count // 3, 1), count))
    return {
        "sample_id": pa.array([f"{benchmark}-{number:07}" for number in range(count)]),
        "image_id": pa.array([f"{benchmark}/{image}" for image in images]),
        "group": pa.array(random.choice(["", "other", "number", "yes/no"], count)),
        "prompt_hash": pa.array([f"{value:016x}" for value in random.integers(0, 2**63, count)]),
        "target": pa.array(random.choice(["yes", "no", "two", "a red bus", "left"], count)),
    }


def write_model(folder: Path, shared: dict[str, dict[str, pa.Array]], seed: int, changed: float) -> None:
    """One model's predictions and their manifest."""
    folder.mkdir(parents=True)
    random, other = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    about = {}
    for name, columns in shared.items():
        count = len(columns["sample_id"])
        right = random.random(count) < 0.6
        entropy = random.exponential(1.0, count)
        right ^= other.random(count) < changed
        said = np.where(right, columns["target"].to_numpy(zero_copy_only=False), "none of these")
        values = columns | {
            "prediction": pa.array(said), "extracted": pa.array(said), "score": pa.array(right.astype(float)),
            "logprob": pa.array(-entropy), "entropy": pa.array(entropy),
        }  # fmt: skip
        path = folder / f"{name}.parquet"
        pq.write_table(pa.table([values[field] for field in SCHEMA.names], schema=SCHEMA), path, compression="zstd")
        about[name] = {
            "file": path.name, "sha256": sha256(path), "questions": count, "metric": "exact_match",
            "score": float(right.mean()), "stderr": 0.5,
        }  # fmt: skip
    write_json(folder / "manifest.json", {"benchmarks": about, "harness": {"name": "none"}, "files": {}})


def make(folder: Path) -> None:
    """Both trees; those that are there already stay."""
    shared = {name: questions(name, size) for name, size in SIZES.items()}
    for version, changed in (("a", 0.0), ("b", CHANGED)):
        for number, (recipe, seed) in enumerate(MODELS):
            target = folder / version / "students" / recipe / "int4" / f"seed{seed}" / "predictions"
            if not (target / "manifest.json").exists():
                write_model(target, shared, number, changed)
        print(f"{version}: {len(MODELS)} models, {sum(SIZES.values()):,} questions each", flush=True)


def timed(*command: str) -> None:
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    print(done.stdout.splitlines()[2] if done.returncode == 0 else done.stderr[-2000:])
    print(f"  {wall:.1f} s, {cpu:.1f} s of processor time")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    make(folder)
    for second in ("a", "b"):
        print(f"a against {second}")
        for _ in range(3):
            timed(sys.executable, "-m", "grace.cli", "diff", str(folder / "a"), str(folder / second))
