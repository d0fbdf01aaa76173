"""The INT4 GEMMs that run side by side with a dense one: this project's, torch's, and others where installed."""

import torch

from grace.bench.backend import Backend, group_of
from grace.kernels import cpu
from grace.kernels.w4a16_layout import dequantise

TORCH_CPU = Backend(
    name="torch int4 (CPU)",
    serves=lambda n, k, group, dtype: cpu.serves(n, k, group, dtype),
    prepare=lambda codes, scales, dtype: (cpu.pack(codes), cpu.scales_and_zeros(scales), group_of(codes, scales)),
    gemm=lambda x, prepared: cpu.gemm(x, *prepared),
)
DEQUANTISE = Backend(
    name="dequantise, then dense",
    serves=lambda n, k, group, dtype: k % group == 0,
    prepare=lambda codes, scales, dtype: (codes, scales),
    gemm=lambda x, prepared: torch.nn.functional.linear(x, dequantise(prepared[0], prepared[1], x.dtype)),
)


def installed(device: torch.device) -> list[Backend]:
    """The backends that run on `device` with what is installed here; where none serves a shape, `DEQUANTISE` does."""
    if device.type == "cpu":
        return [TORCH_CPU]
    from grace.bench.cuda_backends import cuda_backends

    return cuda_backends()
