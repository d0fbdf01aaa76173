"""GRACE steps on several GPUs of one host: the same global batch (strong scaling), and the same per GPU (weak).

    python tests/gpu/bench_scaling.py --out scaling.json                       # as many GPUs as there are
    python tests/gpu/bench_scaling.py --out two.json --processes 1 2 --scaling strong --seconds 340 \\
        --sharding step layer step,bf16 pass layer,prefetch2                   # which way of sharding is best
    python tests/gpu/bench_scaling.py --out tiny.json --shape tiny --batch 8   # CPU processes over gloo: losses alone

Each number of processes is a torchrun of its own with the trainer of `bench_step.py`; it tries every --sharding on a
model of its own. A sharding is `layer`, `pass` or `step` (how long layers stay gathered), with `,bf16` where gradients
are summed in bf16 instead of fp32 and `,prefetchN` where N layers are gathered ahead by order. After --seconds nothing
new is begun; --out is written after every point. The table has tokens/s, the speed over one GPU, MFU over the GEMM rate
measured beside it, passes per step (an odd number of rows leaves a GPU idle for one), memory, the share of a step's
time in which NCCL ran (beside computation or not), and the largest relative difference of a loss from one GPU's with
the same batch. With --also, a shard of the teacher's cache per GPU (`bench_cache.py`) and evaluation
(`bench_evaluate.py`), which share nothing but the host, run once per GPU at the same time. Beside --out a PNG shows
both curves. Exits with status 1 if losses differ by more than bf16's noise.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import bench_step
import torch

from grace.bench.machine import describe
from grace.distributed import Sharding, join_world
from grace.files import write_json

NOISE = 5e-3  # relative, of a loss in bf16 after a few steps


def sharding(text: str) -> Sharding:
    """`layer`, `pass` or `step`, then any of `bf16` and `prefetchN`, with commas between."""
    gathered, *rest = text.split(",")
    prefetch = [int(part.removeprefix("prefetch")) for part in rest if part.startswith("prefetch")]
    unknown = [part for part in rest if part != "bf16" and not part.startswith("prefetch")]
    if gathered not in ("layer", "pass", "step") or unknown:
        raise argparse.ArgumentTypeError(f"{text}: write layer, pass or step, then ,bf16 and ,prefetchN")
    return Sharding(gathered, "bf16" not in rest, *prefetch)


def work(shape: bench_step.Shape, arguments: argparse.Namespace) -> None:
    """One process of a run; the first writes what was found of every sharding after each."""
    begun = time.monotonic()
    world = join_world()
    device = world.device
    rate = bench_step.gemm_rate(device)
    examples = bench_step.build_examples(shape, 2 * shape.batch)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        cache = bench_step.build_cache(Path(scratch) / "cache", shape, examples, device)
        for way in arguments.sharding:
            if found and world.agreed(time.monotonic() - begun > arguments.seconds):
                break
            start = time.monotonic()
            model = bench_step.build_model(shape, device)
            row = bench_step.run_recipe(
                "GRACE", model, shape, examples, cache, arguments.steps, world, Path(scratch), arguments.warm,
                apart=1, sharding=way, traced=True,
            )  # fmt: skip
            about = {"sharding": asdict(way), "gemm_flop_s": rate, "whole_s": time.monotonic() - start}
            found.append(row | about)
            if world.first:
                arguments.out.write_text(json.dumps(found))
            del model
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        world.barrier()
    if world.size > 1:
        torch.distributed.destroy_process_group()


def run(processes: int, batch: int, seconds: float, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What a torchrun of so many processes with so many conversations a step found, one entry a sharding."""
    ways = [",".join(flags(way)) for way in (arguments.sharding if processes > 1 else arguments.sharding[:1])]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [__file__, "--out", str(out), "--shape", arguments.shape, "--worker", "--batch", str(batch)]
        command += ["--steps", str(arguments.steps), "--warm", str(arguments.warm), "--seconds", str(seconds)]
        subprocess.run([*command, "--sharding", *ways], check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        return json.loads(out.read_text())


def side_by_side(part: str, count: int, tiny: bool) -> dict[str, Any]:
    """The rate of `count` processes at once, one a GPU, that cache a shard or answer questions."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for gpu in range(count):
            out = Path(folder) / f"{gpu}.json"
            command = [sys.executable, str(here / f"bench_{part}.py"), "--out", str(out)]
            if part == "cache":
                command += ["--folder", str(Path(folder) / f"shard{gpu}"), "--ways", "packed"]
                command += ["--shape", "tiny", "--conversations", "16"] if tiny else ["--conversations", "192"]
            else:
                command += ["--runner", "--images", "4" if tiny else "32", *(["--tiny"] if tiny else [])]
            environment = {"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
            started.append((subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL), out))
        if any([process.wait() for process, _ in started]):
            raise SystemExit(f"{part}: a process failed")
        found = [json.loads(out.read_text()) for _, out in started]
    if part == "cache":
        rates = [one["rows"][0]["tokens_per_second"] for one in found]
    else:
        rates = [one["runner"] for one in found]
    unit = "tokens/s" if part == "cache" else "questions/s"
    return {"part": part, "gpus": count, "rate": sum(rates), "unit": unit, "slowest": min(rates)}


def flags(way: Sharding) -> list[str]:
    """What `sharding` reads back."""
    return [way.gathered, *([] if way.fp32_sums else ["bf16"]), *([f"prefetch{way.prefetch}"] if way.prefetch else [])]


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Tokens/s by GPUs, both kinds of scaling, the best sharding of each, with the ideal line."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.6))
    one = next(p["tokens_per_second"] for p in points if p["gpus"] == points[0]["gpus"]) / points[0]["gpus"]
    counts = sorted({p["gpus"] for p in points})
    for kind, marker in (("strong", "o"), ("weak", "s")):
        best: dict[int, float] = {}
        for p in points:
            if p["gpus"] == 1 or p["scaling"] == kind:
                best[p["gpus"]] = max(best.get(p["gpus"], 0.0), p["tokens_per_second"])
        axes.plot(list(best), list(best.values()), marker=marker, label=kind)
    axes.plot([1, counts[-1]], [one, one * counts[-1]], color="0.6", linestyle=":", label="ideal")
    axes.set(xlabel="GPUs", ylabel="tokens per second", xscale="log", yscale="log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def point(found: dict[str, Any], count: int, scaling: str, batch: int) -> dict[str, Any]:
    """A line of the table, before it is compared with one GPU."""
    speed = sum(found["tokens"]) / (sum(found["steps_ms"]) / 1e3)
    rate = found["gemm_flop_s"] * count
    return {
        "gpus": count, "scaling": scaling, "sharding": found["sharding"], "batch": batch, "tokens_per_second": speed,
        "mfu": speed * found["flops_per_token"] / rate if rate else None, "steps_ms": found["steps_ms"],
        "passes": found["passes"], "peak_gib": found["peak_gib"], "reserved_gib": found["reserved_gib"],
        "communication": found["communication"], "gemm_tflop_s": found["gemm_flop_s"] / 1e12, "losses": found["losses"],
        "whole_s": found["whole_s"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shape", choices=bench_step.SHAPES, default="llava15-7b")
    parser.add_argument("--batch", type=int, help="conversations a step; default: the shape's")
    parser.add_argument("--steps", type=int, default=3, help="timed optimiser steps")
    parser.add_argument("--warm", type=int, default=2, help="steps before them")
    parser.add_argument(
        "--processes", type=int, nargs="*", help="how many; default: 1, 2, 4, 8 as far as there are GPUs"
    )
    parser.add_argument("--scaling", choices=("strong", "weak"), nargs="+", default=["strong", "weak"])
    parser.add_argument("--sharding", type=sharding, nargs="+", default=[Sharding()], help="ways to try")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many")
    parser.add_argument("--also", choices=("cache", "evaluate"), nargs="*", default=[], help="what is dealt out, too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    begun = time.monotonic()
    shape = bench_step.SHAPES[arguments.shape]
    shape = replace(shape, batch=arguments.batch or shape.batch)
    if arguments.worker:
        work(shape, arguments)
        return 0
    cuda = torch.cuda.is_available()
    there = torch.cuda.device_count() if cuda else 4
    counts = arguments.processes or [n for n in (1, 2, 4, 8) if n <= there]
    points: list[dict[str, Any]] = []
    references: dict[int, dict[str, Any]] = {}
    dealt: list[dict[str, Any]] = []
    about = {"shape": arguments.shape, **describe(torch.device("cuda" if cuda else "cpu"))}
    for count in counts:
        for scaling in arguments.scaling if count > 1 else ["strong"]:
            left = arguments.seconds - (time.monotonic() - begun)
            if left < 0:
                continue
            batch = shape.batch * (count if scaling == "weak" else 1)
            for found in run(count, batch, left, arguments):
                new = point(found, count, scaling, batch)
                if scaling == "strong":
                    one = references.setdefault(batch, new)
                    new["speed_up"] = new["tokens_per_second"] / one["tokens_per_second"]
                    pairs = zip(one["losses"], new["losses"], strict=True)
                    new["losses_apart"] = max(abs(a / b - 1) for a, b in pairs)
                points.append(new)
                print(json.dumps(new), flush=True)
            write_json(arguments.out, {"points": points, "dealt": dealt, "about": about})
        for part in arguments.also:
            if time.monotonic() - begun < arguments.seconds:
                dealt.append(side_by_side(part, count, arguments.shape.startswith("tiny")))
                print(json.dumps(dealt[-1]), flush=True)
                write_json(arguments.out, {"points": points, "dealt": dealt, "about": about})
    for new in points:
        mfu = f"{new['mfu']:.3f}" if new["mfu"] else "-"
        print(
            f"{new['gpus']} GPUs {new['scaling']} {','.join(flags(Sharding(**new['sharding'])))}: "
            f"{new['tokens_per_second']:,.0f} tokens/s, x{new.get('speed_up', float('nan')):.3f}, MFU {mfu}, "
            f"{new['peak_gib']:.1f} GiB, communicating {new['communication']:.2f}, "
            f"losses apart {new.get('losses_apart', float('nan')):.1e}"
        )
    for new in dealt:
        one = next(first for first in dealt if first["part"] == new["part"])
        share = new["rate"] / new["gpus"] / (one["rate"] / one["gpus"])
        print(f"{new['gpus']} GPUs {new['part']}: {new['rate']:,.1f} {new['unit']}, {share:.3f} of one GPU's each")
    draw(points, arguments.out.with_suffix(".png"))
    return int(any(new.get("losses_apart", 0.0) > NOISE for new in points))


if __name__ == "__main__":
    sys.exit(main())
