"""The same bits on every x86-64 processor: with which instructions a CPU computes, and on how many threads.

PyTorch, oneDNN, MKL and OpenBLAS choose their code by the processor that they run on, and sums in another order differ
in their last digits, which a training turns into other weights. Environment variables fix the choice: AVX2, which every
x86-64 processor of the last ten years has, and of MKL its compatible code, the only one that it gives to every maker's
processors. `MKL_CBWR=AVX2,STRICT` would be 1.4 to 1.7 times as fast in training and is not enough: between an AMD and
an Intel processor products of few rows, attention of odd lengths, exp and log differ.
"""

import os
import platform
from pathlib import Path

SETTINGS = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "OPENBLAS_CORETYPE": "Haswell",
}
THREADS = "OMP_NUM_THREADS"  # sums are cut among threads; a Snakemake job has its rule's `threads` here
_GPUS = Path("/proc/driver/nvidia/gpus")


def settle() -> None:
    """Fix this process's instructions, and one thread where nobody chose; call it before numpy and torch are imported.

    Nothing changes where a GPU computes or the processor is no x86-64, nor a variable that is set already.
    """
    if platform.machine() not in ("x86_64", "AMD64") or _GPUS.exists():
        return
    for name, value in {**SETTINGS, THREADS: "1"}.items():
        os.environ.setdefault(name, value)


def settled() -> dict[str, str | None]:
    """The variables as this process has them, for the record."""
    return {name: os.environ.get(name) for name in (*SETTINGS, THREADS)}
