"""How fast the teacher's cache is written: the pipeline's own writer on a LLaVA-1.5-13B shape, files included.

    python tests/gpu/bench_cache.py --out cache.json --folder /tmp/cache    # one GPU with 80 GB or more
    python tests/gpu/bench_cache.py --out tiny.json --folder /tmp/cache --shape tiny

Weights and images are random, conversations have real lengths (`bench_step.py`); half of their text is supervised, so
that every token of it has its states written. Timed are the forward passes, gates, Gram matrices, encoding, the shard's
file, its hash and the wait for the disk, after a first shard that compiles. The share is 2 FLOPs per weight of a
decoder's matrix and token over the bf16 GEMM rate measured in the same process: tower, head, attention's products and
encoding count as time alone. Image files are not decoded.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import bench_step
import torch

from grace.bench.machine import describe
from grace.config.job_parameters import CacheRun
from grace.config.schema import Cache
from grace.data.packed import prepare_packed
from grace.distributed import join_world
from grace.models import decoder_linears
from grace.teacher.shard import shard_name, write_shard
from grace.teacher.writer import record

SHAPES = {
    "llava15-13b": bench_step.Shape(
        5120, 13824, 40, 40, 32_064, bench_step.CLIP_L, 5120, (650, 2048), 576, 128, 32, 8192
    ),
    "tiny": bench_step.SHAPES["tiny"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--folder", type=Path, required=True, help="folder for the shards, on the disk to be measured")
    parser.add_argument("--shape", choices=SHAPES, default="llava15-13b")
    parser.add_argument("--conversations", type=int, default=384, help="of the timed shard")
    parser.add_argument("--ways", nargs="+", default=["packed", "padded"], choices=("packed", "padded"))
    parser.add_argument("--formats", nargs="+", default=["hidden"], choices=("hidden", "hidden-int8", "sampled"))
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    device = join_world().device
    rate = bench_step.gemm_rate(device)
    processor = bench_step.build_processor(replace(shape, batch=arguments.conversations))
    examples = bench_step.build_examples(shape, arguments.conversations)
    tokens = sum(len(example.input_ids) for example in examples)
    rows = []
    for way in sorted(arguments.ways):  # packed first
        model = bench_step.build_model(shape, device).eval()
        weights = sum(linear.weight.numel() for linear in decoder_linears(model).values())
        pass_tokens = shape.pass_tokens if way == "packed" else None
        if pass_tokens:
            prepare_packed(model, 0.0, device)
        for format in arguments.formats:
            cache = Cache(format=format, audit=0.001, pass_tokens=pass_tokens)
            run = CacheRun(family="llava", compute_dtype="bfloat16", cache=cache, temperature=2.0)
            first = examples[: max(8, len(examples) // 12)]
            for name, part in (("warm", first), ("timed", examples)):
                start = time.perf_counter()
                tensors = record(model, processor, part, run, f"{way} {format}, {name}")
                seen = time.perf_counter() - start
                write_shard(arguments.folder, shard_name(0, 1), tensors, pins={})
                seconds = time.perf_counter() - start
            size = (arguments.folder / f"{shard_name(0, 1)}.safetensors").stat().st_size
            rows.append({
                "way": way, "format": format, "conversations": len(examples), "tokens": tokens, "seconds": seconds,
                "forward_s": seen, "disk_s": seconds - seen, "tokens_per_second": tokens / seconds,
                "share": 2 * weights * tokens / seconds / rate if rate else None,
                "forward_share": 2 * weights * tokens / seen / rate if rate else None, "bytes": size,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
            shutil.rmtree(arguments.folder)
        del model
    about = {"shape": arguments.shape, "gemm_tflop_s": rate / 1e12, **describe(device)}
    arguments.out.write_text(json.dumps({"rows": rows, "about": about}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
