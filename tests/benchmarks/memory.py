"""Host memory of the rules that read conversations, by their number: what they need, and what could be taken back.

    python tests/benchmarks/memory.py --sizes 5000 50000 500000

Data folders are made in the form of `grace prepare` (which `prepare.py` measures), models are tiny, and a teacher's
cache of 64 shards is filled with random states: only the number of conversations grows. Each subcommand runs in a
process of its own, whose resident sets are sampled ten times a second: `own` is memory without a file behind it, `peak`
includes mapped files. `cache write` writes one shard of the 64, `train` takes 4 steps of a GRACE recipe with a
checkpoint between.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

HELPERS = Path(__file__).parents[1] / "helpers"
sys.path.insert(0, str(HELPERS))

from many_examples import write_many  # noqa: E402  (the helpers' folder first)
from tiny_models import make_llava  # noqa: E402

from grace.config.job_parameters import CacheRun, QuantizeRun, TrainRun  # noqa: E402
from grace.config.schema import Cache, Method, Optimisation, Quantization  # noqa: E402
from grace.data import load_prepared  # noqa: E402
from grace.data.prepared import Chosen  # noqa: E402
from grace.demo.processor import build_processor  # noqa: E402
from grace.files import whole_folder, write_json  # noqa: E402
from grace.teacher.identity import run_pins  # noqa: E402
from grace.teacher.shard import ShardBuilder, shard_name, shard_range, write_shard  # noqa: E402
from grace.teacher.writer import audited_records, libraries  # noqa: E402

SHARDS, WIDTH = 64, 64


def write_models(folder: Path) -> None:
    processor = build_processor()
    for name, width, seed in (("teacher", WIDTH, 0), ("student", 32, 1)):
        with whole_folder(folder / name) as part:
            model = make_llava(seed, width=width, vocabulary=len(processor.tokenizer)).to(torch.bfloat16)
            model.save_pretrained(part)


def write_runs(folder: Path) -> CacheRun:
    cache = CacheRun(family="llava", compute_dtype="float32", cache=Cache(shards=SHARDS), temperature=2.0)
    write_json(folder / "cache.json", cache.model_dump())
    steps = Optimisation(steps=4, batch=32, micro_batch=8, learning_rate=1e-3, checkpoint_every=2)
    weights = Quantization(group_size=32, calibration=64)
    run = TrainRun(family="llava", compute_dtype="float32", seed=0, optimisation=steps, method=Method(), kd="gated",
                   rcka=True, controller=True, bits=4, quantization=weights)  # fmt: skip
    write_json(folder / "train.json", run.model_dump())
    rounding = QuantizeRun(family="llava", post_training="awq", bits=4, quantization=weights, seed=0)
    write_json(folder / "quantize.json", rounding.model_dump())
    return cache


def write_shards(folder: Path, run: CacheRun) -> None:
    """Every shard but the last with states at random: writing them all would say nothing more of memory."""
    examples, generator = load_prepared(folder / "data"), torch.Generator().manual_seed(0)
    pins, about = run_pins(run, folder / "teacher", folder / "data"), libraries()
    matrix = torch.nn.functional.normalize(torch.randn(9, 8, generator=generator))
    for number in range(SHARDS - 1):
        part = shard_range(len(examples), number, SHARDS)
        some = Chosen(examples, torch.arange(part.start, part.stop).numpy())
        keys, counts = examples.keys(part.start, part.stop), [example.supervised_tokens() for example in some]
        audited = audited_records(keys, run.cache.audit, 16)
        builder = ShardBuilder(keys, counts, folder / "cache")
        for record, count in enumerate(counts):
            hidden = torch.randn(count, WIDTH, generator=generator)
            builder.put(record, hidden=hidden.bfloat16(), gates=torch.rand(count, generator=generator))
            builder.put_grams(record, [hashlib.sha256(keys[record].encode()).hexdigest()], [matrix @ matrix.T])
            if record in audited:
                labels = some[record].labels
                builder.put_audit(record, labels[labels != -100], hidden.bfloat16().float(), [matrix @ matrix.T])
        write_shard(
            folder / "cache", shard_name(number, SHARDS), builder.finished(), pins=pins, conversations=len(examples),
            first=part.start, last=part.stop, vocabulary=len(build_processor().tokenizer), width=WIDTH, libraries=about,
        )  # fmt: skip


def measured(arguments: list[str | Path]) -> tuple[float, float, float]:
    """Seconds, the largest own memory and the largest resident set in MiB of `grace` with these arguments."""
    command = [sys.executable, "-m", "grace.cli", *map(str, arguments)]
    own = peak = 0.0
    start = time.perf_counter()
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    status = Path(f"/proc/{running.pid}/status")
    while running.poll() is None:
        try:
            found = dict(line.split(":", 1) for line in status.read_text().splitlines())
            own = max(own, int(found["RssAnon"].split()[0]) / 1024)
            peak = max(peak, psutil.Process(running.pid).memory_info().rss / 2**20)
        except (OSError, KeyError, ValueError, psutil.NoSuchProcess):
            pass
        time.sleep(0.1)
    if running.returncode:
        assert running.stderr is not None
        raise SystemExit(f"{' '.join(command)}: {running.stderr.read().decode()[-2000:]}")
    return time.perf_counter() - start, own, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5_000, 50_000])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_many(folder / "data", size)
            write_models(folder)
            run = write_runs(folder)
            write_shards(folder, run)
            cache = ["--run", folder / "cache.json", "--teacher", folder / "teacher", "--data", folder / "data"]
            cache += ["--out", folder / "cache"]
            train = ["--run", folder / "train.json", "--data", folder / "data", "--out", folder / "grace"]
            train += ["--log", folder / "grace.jsonl", "--checkpoints", folder / ".grace"]
            train += ["--init", folder / "student", "--cache", folder / "cache"]
            quantize = ["--run", folder / "quantize.json", "--init", folder / "student", "--data", folder / "data"]
            for rule, words in {
                "cache write": ["cache", "write", *cache, "--shard", str(SHARDS - 1)],
                "cache finish": ["cache", "finish", *cache],
                "train": ["train", *train],
                "quantize (AWQ)": ["quantize", *quantize, "--out", folder / "awq"],
            }.items():
                seconds, own, peak = measured(words)
                print(f"| {size:,} | {rule} | {own:,.0f} MiB | {peak:,.0f} MiB | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
