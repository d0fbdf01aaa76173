"""Data, teacher, baseline, cache, a quantised and a packed student, made by the pipeline's subcommands in seconds."""

from pathlib import Path

from grace.config.job_parameters import CacheRun, EvaluateRun, TrainRun
from grace.config.schema import Architecture, Cache, DemoData, Evaluation, Method, Optimisation, Quantization
from grace.demo.prepare import prepare
from grace.files import write_json
from grace.quant.pack import pack
from grace.teacher.commands import finish, write
from grace.train.commands import train


def run_file(path: Path, **change) -> Path:
    """Write the frozen parameters of a training."""
    values = dict(
        family="llava", compute_dtype="float32", seed=1, method=Method(tau=0.1),
        quantization=Quantization(group_size=32),
        optimisation=Optimisation(steps=2, batch=4, micro_batch=4, learning_rate=1e-3, checkpoint_every=1),
    )  # fmt: skip
    write_json(path, TrainRun(**{**values, **change}).model_dump())
    return path


def build(home: Path) -> Path:
    """Make all of it below `home`, with the frozen parameters of each job beside it."""
    prepare(DemoData(images=16, questions_per_image=2, benchmark_questions=4), ["colour"], home / "data")
    for name, seed in (("teacher", 0), ("baseline", 1)):
        shape = Architecture(hidden_size=32, intermediate_size=64, layers=2, heads=2)
        run = run_file(home / f"{name}.json", architecture=shape, seed=seed)
        train(run, home / "data", home / name, home / f"{name}.jsonl", home / f".{name}")
    asked = CacheRun(family="llava", compute_dtype="float32", cache=Cache(shards=1), temperature=2.0)
    write_json(home / "cache.json", asked.model_dump())
    write(home / "cache.json", home / "teacher", home / "data", home / "cache", 0)
    finish(home / "cache.json", home / "teacher", home / "data", home / "cache")
    run = run_file(home / "student.json", kd="gated", bits=4)
    train(run, home / "data", home / "student", home / "s.jsonl", home / ".s", home / "baseline", home / "cache")
    pack(home / "student", home / "packed")
    evaluation = EvaluateRun(family="llava", evaluation=Evaluation(benchmarks=["colour"]))
    write_json(home / "evaluation.json", evaluation.model_dump())
    return home
