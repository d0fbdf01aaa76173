"""An experiment with tiny models by the pipeline's own subcommands, and runs of it."""

import json

from safetensors.torch import load_file

from grace.config.job_parameters import CacheRun, TrainRun
from grace.config.schema import Architecture, Cache, DemoData, Method, Optimisation, Quantization
from grace.demo.prepare import prepare
from grace.files import write_json
from grace.teacher.commands import finish, write
from grace.train.commands import train

STEPS = 6


def optimisation(**change):
    values = dict(steps=STEPS, batch=6, micro_batch=6, learning_rate=2e-3, checkpoint_every=2)
    return Optimisation(**{**values, **change})


def run_file(folder, name, **change):
    values = dict(
        family="llava",
        compute_dtype="float32",
        seed=1,
        optimisation=optimisation(),
        method=Method(tau=0.1),
        quantization=Quantization(group_size=32),
    )
    write_json(folder / f"{name}.json", TrainRun(**{**values, **change}).model_dump())
    return folder / f"{name}.json"


def make_home(home):
    """Data, a teacher, its cache and a baseline below `home`, all tiny and made by the pipeline's own subcommands."""
    prepare(DemoData(images=24, questions_per_image=3), [], home / "data")
    for name, width, seed in (("teacher", 64, 0), ("baseline", 32, 1)):
        shape = Architecture(hidden_size=width, intermediate_size=64, layers=2, heads=2)
        run = run_file(home, name, architecture=shape, seed=seed, optimisation=optimisation(steps=3))
        train(run, home / "data", home / name, home / f"{name}.jsonl", home / f".{name}")
    run = home / "cache.json"
    write_json(
        run, CacheRun(family="llava", compute_dtype="float32", cache=Cache(shards=2), temperature=2.0).model_dump()
    )
    for shard in range(2):
        write(run, home / "teacher", home / "data", home / "cache", shard)
    finish(run, home / "teacher", home / "data", home / "cache")
    return home


GRACE = dict(kd="gated", rcka=True, controller=True, bits=4)
RECIPES = {
    "bf16": {},
    "qat": dict(bits=4),
    "kd": dict(kd="plain", bits=2),
    "gdkd": dict(kd="gated"),
    "rcka": dict(rcka=True),
    "ib": dict(kd="plain", controller=True),
    "grace": GRACE,
    "reverse_kl": dict(kd="reverse_kl", bits=4),
    "jensen_shannon": dict(kd="jensen_shannon", constants=dict(mixture=0.3)),
    "dist": dict(kd="dist", rcka=True, controller=True),
}


def student(home, folder, name, **change):
    run = run_file(folder, name, **change)
    train(
        run,
        home / "data",
        folder / name,
        folder / f"{name}.jsonl",
        folder / f".{name}",
        home / "baseline",
        home / "cache",
    )
    return folder / name


def log(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def weights(folder):
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "quantization.safetensors")}
