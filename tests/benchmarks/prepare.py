"""`grace prepare` on synthetic conversations: memory by size, and its rate beside that of decoding alone.

    python tests/benchmarks/prepare.py memory --sizes 5000 50000 500000
    python tests/benchmarks/prepare.py rate --images 200

`memory` shows the largest resident set of the main process and of a worker, sampled ten times a second; images are
tiny and shared, so that only the number of conversations grows. `rate` uses JPEGs of about 1 MB, each of its own, and
compares one worker's CPU time with that of reading and decoding the same files; workers share nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from grace.config.sections import FilesData
from grace.data.decode import decode
from grace.data.prepare import prepare_files
from grace.demo.processor import build_processor

WORDS = ["what", "colour", "is", "the", "shirt", "and", "the", "bag", "on", "the", "left", "of", "it"]


def write_images(folder: Path, number: int, height: int, width: int, quality: int) -> None:
    """JPEGs of smoothed noise, which compress about as photographs do."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for index in range(number):
        coarse = draw.integers(0, 255, (height // 4, width // 4, 3), np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"{index}.jpg", quality=quality)


def write_conversations(path: Path, number: int, images: int) -> None:
    """LLaVA's JSON, every tenth conversation without an image, five turns each."""
    draw = np.random.default_rng(1)
    with path.open("w") as file:
        for index in range(number):
            said = []
            for turn in range(5):
                words = " ".join(draw.choice(WORDS, 20))
                said.append({"from": "human", "value": "<image>\n" * (turn == 0 and index % 10 > 0) + words})
                said.append({"from": "gpt", "value": " ".join(draw.choice(WORDS, 30))})
            record = {"id": f"c{index}", "conversations": said}
            if index % 10:
                record["image"] = f"{index % images}.jpg"
            file.write(("[" if index == 0 else ",\n") + json.dumps(record))
        file.write("]")


def run_prepare(folder: Path, workers: int, weight: float = 1.0) -> tuple[float, dict[str, float]]:
    """Seconds, and the largest resident sets in MiB."""
    source = {"path": str(folder / "c.json"), "images": str(folder / "images"), "weight": weight}
    data = {"source": "files", "sources": [source]}
    (folder / "run.json").write_text(json.dumps({"data": data, "benchmarks": []}))
    main = "from grace.cli import main; main()"
    command = [sys.executable, "-c", main, "prepare", "--run", folder / "run.json", "--out", folder / "data"]
    command += ["--processor", folder / "processor", "--workers", str(workers)]
    peaks = {"main": 0.0, "worker": 0.0}
    start = time.perf_counter()
    running = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    process = psutil.Process(running.pid)
    while running.poll() is None:
        try:
            peaks["main"] = max(peaks["main"], process.memory_info().rss / 2**20)
            for child in process.children(recursive=True):
                peaks["worker"] = max(peaks["worker"], child.memory_info().rss / 2**20)
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.1)
    if running.returncode:
        raise SystemExit(f"prepare failed with status {running.returncode}")
    return time.perf_counter() - start, peaks


def measure_memory(sizes: list[int], workers: int, weight: float) -> None:
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_images(folder / "images", 100, 48, 48, 80)
            write_conversations(folder / "c.json", size, 100)
            build_processor().save_pretrained(folder / "processor")
            megabytes = (folder / "c.json").stat().st_size / 2**20
            seconds, peaks = run_prepare(folder, workers, weight)
            print(
                f"{size:,} conversations ({megabytes:,.0f} MiB of JSON), weight {weight:g}, {workers} workers: "
                f"{seconds:.0f} s, {size / seconds:,.0f} a second; "
                f"peak {peaks['main']:.0f} MiB main, {peaks['worker']:.0f} MiB worker",
                flush=True,
            )


def measure_rate(images: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", images, 1500, 2000, 88)
        paths = sorted((folder / "images").glob("*.jpg"))
        size = sum(path.stat().st_size for path in paths) / images / 2**20
        write_conversations(folder / "c.json", images, images)
        build_processor().save_pretrained(folder / "processor")
        source = {"path": str(folder / "c.json"), "images": str(folder / "images")}
        data = FilesData.model_validate({"source": "files", "sources": [source]})
        shown = [path for path in paths if int(path.stem) > 10 and int(path.stem) % 10]  # what 10 records don't show

        def prepared(number: int) -> None:
            some = data.model_copy(update={"sources": [data.sources[0].model_copy(update={"limit": number})]})
            prepare_files(some, folder / "processor", None, folder / f"data{number}", folder / "parts")

        def alone() -> None:
            for path in shown:
                decode(path.read_bytes())

        prepared(10)  # loads what is loaded once
        alone()
        start = cpu_seconds(lambda: prepared(10))
        whole = cpu_seconds(lambda: prepared(images)) - start
        bare = cpu_seconds(alone)
        print(
            f"{len(shown)} JPEGs of {size:.2f} MiB, CPU time of one process: decoding alone "
            f"{1000 * bare / len(shown):.1f} ms each, prepare {1000 * whole / len(shown):.1f} ms ({bare / whole:.0%})"
        )


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "rate"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[5000, 50000])
    parser.add_argument("--weight", type=float, default=1.0, help="of the source in the mix")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.what == "memory":
        measure_memory(arguments.sizes, arguments.workers, arguments.weight)
    else:
        measure_rate(arguments.images)


if __name__ == "__main__":
    main()
