"""Two GPUs over one: the same GRACE steps of the same global batch, their losses and their times.

    python tests/gpu/bench_two_gpus.py --out two.json                  # a host with two GPUs of 80 GB
    python tests/gpu/bench_two_gpus.py --out two.json --shape tiny     # two CPU processes over gloo: losses alone

Each run is a torchrun of its own with the trainer of `bench_step.py`; decoder layers are sharded by FSDP2. Exits with
status 1 if a loss differs by more than bf16's noise, or on GPUs if the second one is worth less than 1.8x.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_step
import torch

from grace.bench.machine import describe
from grace.distributed import join_world

GOAL, NOISE = 1.8, 5e-3  # NOISE: relative, of a loss in bf16 after a few steps


def work(shape: bench_step.Shape, steps: int, out: Path) -> None:
    """One process of a run; the first writes what was found."""
    world = join_world()
    model = bench_step.build_model(shape, world.device)
    examples = bench_step.build_examples(shape, 2 * bench_step.BATCH)
    with tempfile.TemporaryDirectory() as scratch:
        cache = bench_step.build_cache(Path(scratch) / "cache", shape, examples, world.device)
        found = bench_step.run_recipe("GRACE", model, shape, examples, cache, steps, world, Path(scratch))
        world.barrier()
    if world.first:
        out.write_text(json.dumps(found))
    if world.size > 1:
        torch.distributed.destroy_process_group()


def run(processes: int, shape: str, steps: int) -> dict:
    """The result of a torchrun of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [__file__, "--out", str(out), "--shape", shape, "--steps", str(steps), "--worker"]
        subprocess.run(command, check=True)
        return json.loads(out.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shape", choices=bench_step.SHAPES, default="llava15-7b")
    parser.add_argument("--steps", type=int, default=6, help="timed optimiser steps")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(bench_step.SHAPES[arguments.shape], arguments.steps, arguments.out)
        return 0
    cuda = torch.cuda.is_available()
    if cuda and torch.cuda.device_count() < 2:
        parser.error("this host has one GPU; two are needed")
    one, two = (run(n, arguments.shape, arguments.steps) for n in (1, 2))
    apart = max(abs(a / b - 1) for a, b in zip(one["losses"], two["losses"], strict=True))
    ratio = one["step_ms"] / two["step_ms"]
    summary = {"largest_relative_difference_of_losses": apart, "speed_ratio": ratio if cuda else None}
    about = {"shape": arguments.shape, "batch": bench_step.BATCH, **describe(torch.device("cuda" if cuda else "cpu"))}
    arguments.out.write_text(json.dumps({"summary": summary, "one": one, "two": two, "about": about}, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    return 0 if apart <= NOISE and (ratio >= GOAL or not cuda) else 1


if __name__ == "__main__":
    sys.exit(main())
