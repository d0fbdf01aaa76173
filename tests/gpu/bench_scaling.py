"""GRACE steps on 1, 2, 4 and 8 GPUs of one host: the same global batch (strong scaling), and the same per GPU (weak).

    python tests/gpu/bench_scaling.py --out scaling.json                       # as many GPUs as there are
    python tests/gpu/bench_scaling.py --out scaling.json --shape tiny          # CPU processes over gloo: losses alone

Each point is a torchrun of its own with the trainer of `bench_step.py`; decoder layers are sharded by FSDP2. The table printed
last has tokens/s, the speed over one GPU per GPU, MFU over the GEMM rate measured beside it, memory, and the largest relative
difference of a loss from one GPU's with the same batch. Beside --out a PNG shows both curves. Exits with status 1 if losses
differ by more than bf16's noise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_step
import torch

from grace.bench.machine import describe
from grace.distributed import join_world

NOISE = 5e-3  # relative, of a loss in bf16 after a few steps


def work(shape: bench_step.Shape, steps: int, out: Path) -> None:
    """One process of a run; the first writes what was found."""
    world = join_world()
    rate = bench_step.gemm_rate(world.device)
    model = bench_step.build_model(shape, world.device)
    examples = bench_step.build_examples(shape, 2 * shape.batch)
    with tempfile.TemporaryDirectory() as scratch:
        cache = bench_step.build_cache(Path(scratch) / "cache", shape, examples, world.device)
        found = bench_step.run_recipe("GRACE", model, shape, examples, cache, steps, world, Path(scratch))
        world.barrier()
    if world.first:
        out.write_text(json.dumps(found | {"gemm_flop_s": rate}))
    if world.size > 1:
        torch.distributed.destroy_process_group()


def run(processes: int, shape: str, batch: int, steps: int) -> dict[str, Any]:
    """The result of a torchrun of so many processes with so many conversations a step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [__file__, "--out", str(out), "--shape", shape, "--steps", str(steps), "--worker", str(batch)]
        subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        return json.loads(out.read_text())


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Tokens/s by GPUs, both kinds of scaling, with the ideal line."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.6))
    one = points[0]["tokens_per_second"]
    for kind, marker in (("strong", "o"), ("weak", "s")):
        own = [p for p in points if p["gpus"] == 1 or p["scaling"] == kind]
        axes.plot([p["gpus"] for p in own], [p["tokens_per_second"] for p in own], marker=marker, label=kind)
    most = max(p["gpus"] for p in points)
    axes.plot([1, most], [one, one * most], color="0.6", linestyle=":", label="ideal")
    axes.set(xlabel="GPUs", ylabel="tokens per second", xscale="log", yscale="log")
    axes.set_xticks([p["gpus"] for p in points], [str(p["gpus"]) for p in points])
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shape", choices=bench_step.SHAPES, default="llava15-7b")
    parser.add_argument("--steps", type=int, default=3, help="timed optimiser steps")
    parser.add_argument(
        "--processes", type=int, nargs="*", help="how many; default: 1, 2, 4, 8 as far as there are GPUs"
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = bench_step.SHAPES[arguments.shape]
    if arguments.worker:
        work(replace(shape, batch=arguments.worker), arguments.steps, arguments.out)
        return 0
    cuda = torch.cuda.is_available()
    there = torch.cuda.device_count() if cuda else 4
    counts = arguments.processes or [n for n in (1, 2, 4, 8) if n <= there]
    points, losses = [], {}
    for count in counts:
        for scaling in ("strong", "weak") if count > 1 else ("strong",):
            batch = shape.batch * (count if scaling == "weak" else 1)
            found = run(count, arguments.shape, batch, arguments.steps)
            reference = losses.setdefault(batch, found["losses"])
            apart = max(abs(a / b - 1) for a, b in zip(reference, found["losses"], strict=True))
            rate = found["gemm_flop_s"] * count
            speed = found["tokens_per_second"]
            points.append(
                {
                    "gpus": count, "scaling": scaling, "batch": batch, "tokens_per_second": speed,
                    "efficiency": speed / count / (points[0]["tokens_per_second"] if points else speed),
                    "mfu": speed * found["flops_per_token"] / rate if rate else None, "peak_gib": found["peak_gib"],
                    "losses_apart": apart if scaling == "strong" else None,
                }
            )  # fmt: skip
            print(json.dumps(points[-1]), flush=True)
    about = {"shape": arguments.shape, **describe(torch.device("cuda" if cuda else "cpu"))}
    arguments.out.write_text(json.dumps({"points": points, "about": about}, indent=2) + "\n")
    draw(points, arguments.out.with_suffix(".png"))
    return int(any((point["losses_apart"] or 0) > NOISE for point in points))


if __name__ == "__main__":
    sys.exit(main())
