"""How long `grace pack` takes on this machine, and how much memory, for a student of LLaVA-1.5-7B's shape.

    python tests/benchmarks/pack.py --at SCRATCH [--layers 32] [--keep]

Makes a student with random codes (about 20 GiB with all 32 layers) in SCRATCH, packs and verifies it, and prints
seconds, processor seconds and the largest memory of the packing process, without the pages of the files it maps. Speed
does not depend on the values, so blocks of random codes are used again. Not a test: nothing here can fail for being
slow.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import infer_models
import torch

from grace.files import whole_folder
from grace.quant.checkpoint import TensorSpec, write_checkpoint
from grace.quant.grid import dequantize
from grace.quant.names import quantised_module
from grace.quant.student import write_quantization

GROUP = 128
POOL = 1 << 26  # random codes that all layers are cut from


def llava_7b(layers: int):
    """(config, {key on disk: shape}) of LLaVA-1.5-7B."""
    from transformers import LlavaForConditionalGeneration

    config = infer_models.llava_7b(layers)
    config.architectures = ["LlavaForConditionalGeneration"]
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    return config, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def make_student(folder: Path, layers: int) -> None:
    """A quantised student's folder: model.safetensors and quantization.safetensors that agree."""
    config, shapes = llava_7b(layers)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(-8, 8, (POOL,), dtype=torch.int8, generator=generator)
    steps = (torch.rand(POOL // GROUP, generator=generator) * 0.01 + 0.001).bfloat16()
    linears = {quantised_module(key): shape for key, shape in shapes.items() if quantised_module(key)}

    def tensor(name: str, kind: str) -> torch.Tensor:
        rows, columns = linears[name]
        if kind == "scales":
            return _tile(steps, rows, columns // GROUP)
        return _tile(pool, rows, columns)

    def weight(key: str) -> torch.Tensor:
        name = quantised_module(key)
        if name is None:
            return torch.full(shapes[key], 0.01, dtype=torch.bfloat16)
        return dequantize(tensor(name, "codes"), tensor(name, "scales"))

    with whole_folder(folder) as part:
        write_quantization(part, linears, tensor, 4, GROUP, "rtn")
        write_checkpoint(part, [TensorSpec(key, torch.bfloat16, shape) for key, shape in shapes.items()], weight)
        config.save_pretrained(part)


def _tile(source: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return source.repeat(-(-rows * columns // len(source)))[: rows * columns].view(rows, columns)


def pack_and_report(student: Path, packed: Path) -> None:
    """In a process of its own, whose resident memory is the packing's."""
    from grace.quant.pack import pack

    largest = [0]
    threading.Thread(target=_watch, args=(largest,), daemon=True).start()
    start = time.perf_counter()
    pack(student, packed)
    used = resource.getrusage(resource.RUSAGE_SELF)
    report = {
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "memory_mib": largest[0] // 1024,
        "threads": torch.get_num_threads(),
        "student_gib": round(sum(f.stat().st_size for f in student.iterdir()) / 2**30, 2),
        "packed_gib": round(sum(f.stat().st_size for f in packed.iterdir()) / 2**30, 2),
    }
    print(json.dumps(report))


def _watch(largest: list[int]) -> None:
    """Keep the largest anonymous memory in KiB: pages of mapped files come and go as the system likes."""
    while True:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                largest[0] = max(largest[0], int(line.split()[1]))
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at", type=Path, required=True, help="folder for the student and the packed model")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--keep", action="store_true", help="leave both folders there")
    parser.add_argument("--pack-only", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    student, packed = chosen.at / "student", chosen.at / "packed"
    if chosen.pack_only:
        return pack_and_report(student, packed)
    if not student.exists():
        make_student(student, chosen.layers)
    subprocess.run([sys.executable, __file__, "--at", chosen.at, "--pack-only"], check=True)
    if not chosen.keep:
        shutil.rmtree(student)
        shutil.rmtree(packed)


if __name__ == "__main__":
    main()
