"""A shipped experiment through Snakemake, with random weights of the real size: seconds and peak memory per rule.

    python tests/gpu/run_family.py llava15_7b --folder /mnt/run --out llava.json [--spare]  (or qwen2vl_2b, qwen3vl_2b)
    python tests/gpu/run_family.py llava15_7b --folder /tmp/run --out tiny.json --tiny      (a check of this script)

Models have the published sizes, names, dtypes and image geometry, and tokenizers of the real kinds with as many tokens;
images and conversations are made up, of the length that real ones have. What is run: the teacher's cache (hidden), QAT,
GRACE and RTN at INT4, packing, both benchmarks, a few rows of every benchmark in its official columns for every model,
tables, figures and the page. Optimiser, batch sizes per forward pass and the method's constants are the experiment's
own.

Killed, it goes on where it was: start the same command again. `--spare` deletes what nothing reads any more, for a
small disk: the downloaded copies once they are fetched, a quantised student's bf16 weights once they are packed. The
largest folder at any time is then that of the fetched teacher and student, one trained student and the packed ones: 66
GB for LLaVA-1.5.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image

from grace.bench.machine import describe
from grace.config.load import load_experiment
from grace.files import MANIFEST, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from chat_models import CORPUS
from hub_snapshots import snapshot
from user_data import write_benchmarks, write_conversations

ROOT = Path(__file__).resolve().parents[2]
PROFILE = ROOT / "workflow/profiles/default"
WORDS = " ".join(CORPUS).split()
PIECES = 1.1  # tokens of such a word in the small tokenizers, on average
SIZE = (640, 480)  # of an image, as in COCO
LENGTHS = (80, 1400)  # tokens of a conversation's text
ROWS = 8  # of each benchmark
FETCHED = {"teacher": "teacher/model", "student": "students/baseline/bf16/seed0/model"}
GPU_JOBS = ("cache", "finetune", "distil", "quantize", "evaluate", "bench")


def conversations(folder: Path, count: int, tiny: bool) -> None:
    """`mix.json` and its images: every tenth conversation of text alone."""
    if tiny:
        return write_conversations(folder / "images", folder / "mix.json", count)
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        words = random.choice(WORDS, int(random.integers(*LENGTHS) / PIECES))
        asked, answered = (" ".join(half) for half in np.array_split(words, 2))
        record: dict[str, Any] = {"id": str(number)}
        if number % 10:
            blocks = random.integers(0, 256, (12, 16, 3), np.uint8)
            record["image"] = f"{number}.jpg"
            Image.fromarray(blocks).resize(SIZE, Image.Resampling.BICUBIC).save(folder / "images" / record["image"])
            asked = f"<image>\n{asked}"
        said = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
        records.append({**record, "conversations": said})
    (folder / "mix.json").write_text(json.dumps(records))


def settings(made: Path, chosen: argparse.Namespace, gpu: bool) -> dict[str, Any]:
    """What differs from the shipped experiment: where models and data lie, how much is run, and on which machine."""
    job = {"cpus": chosen.cores if chosen.tiny else 8, "gpus": int(gpu)}
    return {
        "data": {"sources": [{"path": str(made / "mix.json"), "images": str(made / "images")}],
            "benchmarks": str(made / "benchmarks")},
        "teacher": {"pretrained": str(made / "teacher")},
        "student": {"pretrained": str(made / "student")},
        "cache": {"shards": 1, "audit": 0.02},
        "finetune": {"epochs": 1, "batch": 32},
        "runs": [{"recipes": ["finetune", "grace", "rtn"], "precisions": ["int4"], "seeds": [0]}],
        "evaluation": {"limit": ROWS, "max_new_tokens": 8},
        "bench": {"rows": [1, 16, 256] if gpu else [1], "batches": [1, 8] if gpu else [1],
            "new_tokens": 32 if gpu else 4, "repeats": 3 if gpu else 1},
        "resources": {**{name: job for name in GPU_JOBS}, "prepare": {"cpus": min(8, chosen.cores)},
            "pack": {"cpus": min(4, chosen.cores)}},
    }  # fmt: skip


def snakemake(folder: Path, chosen: argparse.Namespace, *targets: str) -> bool:
    """Build targets with the repository's workflow; whether all went well. Its words go to this program's output."""
    shim = folder / "bin"
    shim.mkdir(exist_ok=True)
    (shim / "grace").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m grace.cli "$@"\n')
    (shim / "grace").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(shim), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "workflow"), os.environ.get("PYTHONPATH", "")]),
    }
    command = [
        sys.executable, "-m", "snakemake", *targets, "--snakefile", str(ROOT / "Snakefile"), "--workflow-profile",
        str(PROFILE),
        "--cores", str(chosen.cores), "--configfile", str(ROOT / f"workflow/experiments/{chosen.experiment}.yaml"),
        str(folder / "changes.yaml"),
    ]  # fmt: skip
    return subprocess.run(command, cwd=folder, env=environment).returncode == 0


@contextmanager
def watched(folder: Path, results: Path, spare: bool) -> Iterator[None]:
    """Within the block, twice a second: note the GPU's memory in use, and make room where `spare` says so."""
    end = threading.Event()

    def watch() -> None:
        with (folder / "gpu.csv").open("a") as samples:
            while not end.wait(0.5):
                if torch.cuda.is_available():
                    free, total = torch.cuda.mem_get_info()
                    samples.write(f"{time.time():.1f},{total - free}\n")
                    samples.flush()
                if spare:
                    make_room(results)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def make_room(results: Path) -> None:
    """Delete the bf16 weights of students that are packed; nothing reads them again."""
    for packed in results.glob(f"students/*/int4/seed0/packed/{MANIFEST}"):
        student = packed.parents[1].relative_to(results)
        for folder in (results / student / "model", results / ".checkpoints" / student / "finished/model"):
            for weights in folder.glob("*.safetensors"):
                weights.unlink(missing_ok=True)


def rules(folder: Path, results: Path) -> list[dict[str, Any]]:
    """Per job in the order of their ends: seconds, largest resident memory in GiB, most of the GPU's memory in use."""
    used = pd.DataFrame({"time": [], "bytes": []}, dtype=float)
    if (folder / "gpu.csv").is_file():
        used = pd.read_csv(folder / "gpu.csv", names=["time", "bytes"], dtype=float)
    found = []
    for path in sorted((results / "logs").rglob("*.tsv"), key=lambda path: path.stat().st_mtime):
        about = pd.read_csv(path, sep="\t", na_values="-").iloc[-1]
        ended = path.stat().st_mtime
        during = used["bytes"][used["time"].between(ended - about["s"], ended)]
        job = path.relative_to(results / "logs").with_suffix("").as_posix()
        gpu = during.max() / 2**30 if len(during) else 0.0
        found.append({"job": job, "seconds": about["s"], "rss_gib": about["max_rss"] / 1024, "gpu_gib": gpu})
    return found


def fetched(made: Path, results: Path, role: str, chosen: argparse.Namespace, family: str, gpu: bool) -> bool:
    """Make a pretrained model and have it fetched, unless it was; whether that went well."""
    target = results / FETCHED[role] / MANIFEST
    if target.is_file():
        return True
    growing = made / f".{role}"
    shutil.rmtree(growing, ignore_errors=True)
    if not (made / role).is_dir():
        start = time.time()
        snapshot(growing, family, role, real=not chosen.tiny, device="cuda" if gpu else "cpu")
        growing.rename(made / role)
        torch.cuda.empty_cache()
        print(f"{role}: made in {time.time() - start:.0f} s", flush=True)
    well = snakemake(made.parent, chosen, str(target.relative_to(made.parent)))
    if well and chosen.spare:
        shutil.rmtree(made / role)
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=["llava15_7b", "qwen2vl_2b", "qwen3vl_2b"])
    parser.add_argument("--folder", type=Path, required=True, help="everything is made here; kept for the next start")
    parser.add_argument("--out", type=Path, required=True, help="JSON of times and memory")
    parser.add_argument("--conversations", type=int, default=256)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tiny", action="store_true", help="small models of the same classes, and 12 conversations")
    parser.add_argument("--spare", action="store_true", help="delete what nothing reads any more")
    parser.add_argument("--report", action="store_true", help="build nothing; the table of what was built so far")
    chosen = parser.parse_args()
    if chosen.tiny:
        chosen.conversations = 12
    gpu = torch.cuda.is_available()
    shipped = load_experiment(ROOT / f"workflow/experiments/{chosen.experiment}.yaml")
    folder = chosen.folder.resolve()
    made, results = folder / "made", folder / "results" / shipped.experiment
    if not (made / "mix.json").is_file():
        write_benchmarks(made / "benchmarks", shipped.evaluation.benchmarks, ROWS)
        conversations(made, chosen.conversations, chosen.tiny)
    (folder / "changes.yaml").write_text(yaml.safe_dump(settings(made, chosen, gpu), sort_keys=False))

    began, well = time.time(), True
    if not chosen.report:
        with watched(folder, results, chosen.spare):
            well = all(fetched(made, results, role, chosen, shipped.family, gpu) for role in FETCHED)
            well = well and snakemake(folder, chosen)
    table = rules(folder, results)
    write_json(chosen.out, {"experiment": chosen.experiment,
        "machine": describe(torch.device("cuda" if gpu else "cpu")), "jobs": table})  # fmt: skip
    print(f"\nthis start: {time.time() - began:.0f} s\n\n| job | s | host GiB | GPU GiB |\n| --- | --- | --- | --- |")
    for row in table:
        print(f"| {row['job']} | {row['seconds']:.0f} | {row['rss_gib']:.1f} | {row['gpu_gib']:.1f} |")
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
