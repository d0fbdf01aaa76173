"""What was measured on: the machine, the versions, and the ceilings that floors are computed from."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from grace.bench.timing import interleaved_times

_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")


def describe(device: torch.device) -> dict[str, Any]:
    """Processor or GPU, threads, clocks where the driver tells them, and the versions that matter (JSON-able)."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in (
        "torch",
        "transformers",
        "triton",
        "compressed-tensors",
        "gemlite",
        "humming-kernels",
        "bitsandbytes",
    ):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    about = {
        "device": device_name(device),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_mib": round(properties.total_memory / 2**20),
            "cuda": torch.version.cuda,
            "clocks": _clocks(device),
        }
    return about


def _clocks(device: torch.device) -> dict[str, float | str]:
    """Clock rate (MHz), temperature (C) and power (W) now; a message where the driver's library is not installed."""
    try:
        return {
            "sm_mhz": torch.cuda.clock_rate(device),
            "celsius": torch.cuda.temperature(device),
            "watts": torch.cuda.power_draw(device) / 1e3,
        }
    except (ModuleNotFoundError, RuntimeError) as error:
        return {"unknown": str(error).strip().splitlines()[0]}


def processor_name() -> str:
    """The CPU's model name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def last_cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in _CACHE.glob("index*/size")]
    return max((int(s[:-1]) * {"K": 2**10, "M": 2**20}[s[-1]] for s in sizes), default=32 * 2**20)


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured here and now: copy bandwidth (bytes/s, read plus written) and bf16 matrix rate (FLOP/s).

    The best of many rounds: a ceiling is what the machine can do, whatever else it does in the meantime.
    """
    cuda = device.type == "cuda"
    size, side = (2**30, 8192) if cuda else (2**27, 1024)
    source = torch.full((size,), 1, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, device=device, generator=generator).bfloat16() for _ in range(2))
    times = interleaved_times(
        {"copy": [lambda: target.copy_(source)], "matmul": [lambda: left @ right]}, repeats=15, device=device
    )
    return {
        "copy_bytes_per_second": 2 * size / min(times["copy"]),
        "flops_per_second": 2 * side**3 / min(times["matmul"]),
    }
