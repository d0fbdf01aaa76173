"""`grace bench kernel` and `grace bench decode`: a frozen run and folders in, a CSV and a JSON beside it out."""

from pathlib import Path
from typing import Any

from grace.bench.shapes import FIELD_SHAPES, decoder_shapes
from grace.config.job_parameters import BenchRun, read_run
from grace.families import check_family
from grace.files import whole_file, write_json


def kernel(run: Path, model: Path, out: Path) -> None:
    """Measure the INT4 GEMM on the shapes of `model`'s decoder and of LLaVA-1.5-7B's largest linear.

    Args:
        run: the frozen BenchRun.
        model: a checkpoint folder, plain or packed; only the headers of its weights are read.
        out: the CSV; the machine, the versions and the ceilings go to the JSON of the same name.
    """
    import torch

    from grace.bench.kernel import bench_kernel

    settings = read_run(run, BenchRun)
    check_family(model, settings.family)
    device = _device()
    shapes = decoder_shapes(model) | FIELD_SHAPES
    rows, limits = bench_kernel(
        shapes, settings.bench.rows, settings.group_size, settings.bench.repeats, torch.device(device)
    )
    _write(out, rows, device, {"ceilings": limits, "repeats": settings.bench.repeats})


def decode(run: Path, models: list[Path], out: Path) -> None:
    """Measure prefill, decoding speed and memory of checkpoint folders, plain and packed, in one run.

    Args:
        run: the frozen BenchRun.
        models: checkpoint folders, each with its processor.
        out: the CSV; the machine, the versions and what was measured how go to the JSON of the same name.
    """
    import torch

    from grace.bench.decode import bench_decode

    settings = read_run(run, BenchRun)
    for model in models:
        check_family(model, settings.family)
    device = _device()
    bench = settings.bench
    rows = bench_decode(models, bench.batches, bench.new_tokens, bench.repeats, torch.device(device))
    memory = "CUDA allocator's peak" if device == "cuda" else "sum of live tensors' storages, at its largest"
    _write(out, rows, device, {"repeats": bench.repeats, "peak_mib": f"weights + {memory}"})


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _write(out: Path, rows: list[dict[str, Any]], device: str, more: dict[str, Any]) -> None:
    import pandas
    import torch

    from grace.bench.machine import describe

    with whole_file(out) as part:
        pandas.DataFrame(rows).to_csv(part, index=False, float_format="%.6g")
    write_json(Path(out).with_suffix(".json"), {"machine": describe(torch.device(device)), **more})
