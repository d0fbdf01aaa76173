"""What an INT4 GEMM has to offer to be timed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from grace.kernels.w4a16_layout import dequantise

Gemm = Callable[[torch.Tensor, Any], torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """One way to multiply activations by 4-bit weights.

    Attributes:
        name: in tables.
        serves: (out, in, group, dtype) -> whether it takes that case.
        prepare: (codes int8 [out, in], scales bf16 [out, in/group], dtype) -> a tuple of tensors and other state.
        gemm: (x [rows, in], prepared) -> [rows, out].
        weight: what the prepared weights stand for, [out, in] float64, where that isn't codes times scales.
        foreign: another package's: where it fails, the benchmark goes on without it and says so.
    """

    name: str
    serves: Callable[[int, int, int, torch.dtype], bool]
    prepare: Callable[[torch.Tensor, torch.Tensor, torch.dtype], tuple]
    gemm: Gemm
    weight: Callable[[tuple], torch.Tensor] | None = None
    foreign: bool = False

    def copy(self, prepared: tuple) -> tuple:
        """The same weights elsewhere in memory."""
        return tuple(part.clone() if isinstance(part, torch.Tensor) else part for part in prepared)


def dense(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [out, in] that INT4 GEMMs are compared with."""
    return dequantise(codes, scales, dtype)


def group_of(codes: torch.Tensor, scales: torch.Tensor) -> int:
    """Inputs per scale."""
    return codes.shape[1] // scales.shape[1]
