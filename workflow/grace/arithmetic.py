"""The same bits on every x86-64 processor: which instructions a CPU computes with, and whose matrix products.

PyTorch, oneDNN and MKL choose code by the processor they run on, and sums in another order differ in their last bits;
a training turns these into other weights. Three environment variables fix the choice: ATen's and oneDNN's to AVX2,
which every x86-64 processor of the last ten years has, and MKL's to its compatible code, the only one that it gives
to every maker's processors. That code is slow at matrix products, so these go to oneDNN, which compiles its own.
"""

import os
import platform
from pathlib import Path
from typing import Any

SETTINGS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}

_libraries: list[Any] = []  # registrations end with the object that made them


def settle() -> None:
    """Choose this process's instructions and one thread, unless the environment does; before torch is imported.

    Nothing changes where a GPU computes, or where the processor has other instructions.
    """
    if platform.machine() not in ("x86_64", "AMD64") or Path("/proc/driver/nvidia/gpus").exists():
        return
    for name, value in {**SETTINGS, "OMP_NUM_THREADS": "1"}.items():
        os.environ.setdefault(name, value)


def settled() -> bool:
    """Whether the instructions of this process are the fixed ones."""
    return all(os.environ.get(name) == value for name, value in SETTINGS.items())


def products_by_onednn() -> None:
    """Have every fp32 matrix product of this process computed by oneDNN, where the instructions are fixed."""
    import torch

    if _libraries or os.environ.get("NOOV") or not settled() or not torch.backends.mkldnn.is_available():
        return
    linear = torch.ops.mkldnn._linear_pointwise.default

    def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        # [m, k] x [k, n]: what oneDNN does not take goes through the batched product, which is MKL's
        if a.dtype == torch.float32 == b.dtype and min(*a.shape, *b.shape) > 0:
            return linear(a, b.t(), bias, "none", [], "")
        whole = torch.bmm(a[None], b[None])[0]
        return whole if bias is None else whole + bias

    def addmm(
        added: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
    ) -> torch.Tensor:
        if beta == alpha == 1 and added.dim() == 1 and len(added) == b.shape[1]:
            return product(a, b, added)
        whole = product(a, b)
        whole = whole if alpha == 1 else whole * alpha
        return whole if beta == 0 else whole + (added if beta == 1 else beta * added)

    def mm_out(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return out.resize_(a.shape[0], b.shape[1]).copy_(product(a, b))

    def addmm_out(added, a, b, *, beta: float = 1, alpha: float = 1, out: torch.Tensor) -> torch.Tensor:
        return out.resize_(a.shape[0], b.shape[1]).copy_(addmm(added, a, b, beta=beta, alpha=alpha))

    library = torch.library.Library("aten", "IMPL")
    for name, function in (
        ("mm", product), ("mm.out", mm_out), ("addmm", addmm), ("addmm.out", addmm_out), ("addmm_", lambda s, a, b, **k: s.copy_(addmm(s, a, b, **k))),
    ):  # fmt: skip
        library.impl(name, function, "CPU", allow_override=True)
    _libraries.append(library)
