"""The INT4 GEMM (W4A16) for many rows on Hopper, its programs and warps as threads of a CPU, against float64."""

from pathlib import Path

import gluon_on_cpu
import pytest
import torch

from grace.kernels import w4a16
from grace.kernels.w4a16_layout import dequantise
from grace.kernels.w4a16_table import Tile

FOLDER = Path(w4a16.__file__).parent
MODULE, _ = gluon_on_cpu.load(FOLDER / "gluon_names.py", FOLDER / "w4a16_hopper.py")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows, out, inputs, group, tile, programs",
    [
        (100, 136, 384, 128, Tile("hopper", 64, 128, stages=2), 3),  # no tile is whole
        (265, 264, 256, 256, Tile("hopper", 256, 128, stages=3), 2),  # more stages than chunks, each filled in halves
        (200, 520, 128, 128, Tile("hopper", 64, 128, stages=2), 4),  # one chunk, several waves
        (70, 128, 640, 128, Tile("hopper", 128, 128, split=2, stages=2), 5),  # every tile in two parts
        (140, 384, 512, 128, Tile("hopper", 64, 128, split=3, stages=2), 4),  # the last tile in three
        (140, 384, 768, 128, Tile("hopper", 64, 128, split=2, stages=2), 5),  # the last four, unevenly: 5 and 1 chunks
        (260, 256, 640, 128, Tile("hopper", 256, 128, split=3, stages=2), 5),  # all four: 3, 1 and 1
    ],
)
def test_against_float64(dtype, rows, out, inputs, group, tile, programs):
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(-8, 8, (out, inputs), dtype=torch.int8, generator=generator)
    scales = (torch.rand(out, inputs // group, generator=generator) + 0.1).to(dtype)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    bias = torch.randn(out, generator=generator).to(dtype)
    words, steps = w4a16.pack(codes, scales)
    locks = torch.zeros(64, dtype=torch.int32)
    for offset in (bias, None):
        y = MODULE.gemm(x, words, steps, offset, group, tile, programs, locks)
        expected = x.double() @ dequantise(codes, scales, dtype).double().T + (0 if offset is None else bias.double())
        assert (y.double() - expected).norm() < 4e-3 * expected.norm()
        assert not locks.any()
