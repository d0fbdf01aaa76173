"""What checkpoints cost a run: seconds that training waits for one, and how much slower steps are while it is written.

    python tests/gpu/bench_checkpoint.py --out checkpoint.json --folder /tmp/checkpoints --shape qwen2vl-2b
    torchrun --standalone --nproc-per-node=2 tests/gpu/bench_checkpoint.py --out 7b.json --folder /tmp/checkpoints
    python tests/gpu/bench_checkpoint.py --out tiny.json --folder /tmp/checkpoints --shape tiny

The trainer of `bench_step.py` takes plain steps; one checkpoint is written behind the third and training goes on until
it is whole, at most 40 steps more. A checkpoint has 12 bytes per trained weight (26 GB and 81 GB), and a copy of it
stays in the host's memory. The share is of a run that writes one every `--every` steps of its own batch.
"""

import argparse
import contextlib
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import median

import bench_step
import torch

from grace.bench.machine import describe
from grace.config.job_parameters import TrainRun
from grace.config.schema import Method, Optimisation, Quantization
from grace.distributed import join_world
from grace.models import vocabulary
from grace.train.checkpoint import Checkpoints
from grace.train.loop import Trainer
from grace.train.objective import Objective

AT = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoint, on the disk to be measured")
    parser.add_argument("--shape", choices=bench_step.SHAPES, default="llava15-7b")
    parser.add_argument(
        "--every", type=int, default=100, help="steps between checkpoints of the run that is asked about"
    )
    parser.add_argument("--batch", type=int, default=256, help="conversations of its steps")
    arguments = parser.parse_args()
    shape = bench_step.SHAPES[arguments.shape]
    world = join_world()
    model = bench_step.build_model(shape, world.device)
    examples = bench_step.build_examples(shape, 2 * shape.batch)
    processor = bench_step.build_processor(shape)
    steps = Optimisation(steps=AT + 40, batch=shape.batch, micro_batch=2, learning_rate=1e-6, checkpoint_every=AT,
                         pass_tokens=shape.pass_tokens)  # fmt: skip
    run = TrainRun(family="llava", compute_dtype="bfloat16", seed=0, optimisation=steps, method=Method(),
                   quantization=Quantization(group_size=shape.group))  # fmt: skip
    objective = Objective(model, run, vocabulary(processor))
    log = arguments.folder / "log.jsonl"
    arguments.folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model, processor, examples, run, objective, log, arguments.folder, "bench", world)
    written: list[float] = []
    write, save, step = Checkpoints._write, Checkpoints.save, trainer._step
    seconds: list[float] = []

    def timed_write(self, *rest):
        start = time.perf_counter()
        write(self, *rest)
        written.append(time.perf_counter() - start)

    def save_once(self, number, *rest):
        if number == AT:
            save(self, number, *rest)

    class Done(Exception):
        pass

    def timed_step(number, *rest):
        if any(world.gather([bool(written)])):
            raise Done
        start = time.perf_counter()
        entry = step(number, *rest)
        seconds.append(time.perf_counter() - start)
        return entry

    Checkpoints._write, Checkpoints.save, trainer._step = timed_write, save_once, timed_step
    with contextlib.suppress(Done):
        trainer.train()
    trainer.saver.wait()
    if world.first:
        quiet, during = median(seconds[1:AT]), seconds[AT:]
        size = sum(path.stat().st_size for path in arguments.folder.rglob("*") if path.is_file())
        slower = sum(during) - quiet * len(during)
        whole = arguments.every * quiet * arguments.batch / shape.batch
        found = {
            "bytes": size, "waited_s": trainer.saver.seconds, "written_s": written[0], "step_s": quiet,
            "steps_during": during, "slower_s": slower, "share": (trainer.saver.seconds + max(0.0, slower)) / whole,
        }  # fmt: skip
        about = {"shape": arguments.shape, "processes": world.size, **describe(world.device)}
        arguments.out.write_text(json.dumps({**found, "about": about}, indent=2) + "\n")
        print(json.dumps(found, indent=2))
        shutil.rmtree(arguments.folder)
    if world.size > 1:
        world.barrier()
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
