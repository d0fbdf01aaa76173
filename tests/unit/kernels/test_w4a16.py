"""The Triton INT4 GEMM (W4A16) in Triton's CPU interpreter against float64, and compiled for the GPUs that it is for.

The interpreter has no inline PTX and cuts fp32 off to bf16 where a GPU rounds: hence the arithmetic path and a
tolerance of one bf16 step. `tests/gpu/bench_w4a16.py` compares the two paths bit by bit on a GPU.
"""

import pytest
import torch
import triton
from apart import run_apart

from grace.errors import GraceError
from grace.kernels.w4a16 import _locks, dequantised, gluon, launch, pack, serves, w4a16
from grace.kernels.w4a16_layout import dequantise
from grace.kernels.w4a16_table import DENSE, Tile

TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 5e-4}
CPU = torch.device("cpu")
assert triton.knobs.runtime.interpret, "conftest.py sets TRITON_INTERPRET before triton is first imported"


def problem(out: int, inputs: int, group: int, rows: int, dtype: torch.dtype, bias: bool = True, seed: int = 0):
    """Packed weights, x, bias and the float64 product of random data."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (out, inputs), dtype=torch.int8, generator=generator)
    scales = (torch.rand(out, inputs // group, generator=generator) * 0.1 + 0.02).bfloat16()
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    added = torch.randn(out, generator=generator).to(dtype) if bias else None
    expected = x.double() @ dequantise(codes, scales, torch.float64).T + (added.double() if bias else 0)
    return codes, scales, x, added, expected


def check(y: torch.Tensor, expected: torch.Tensor, roundings: int = 1) -> None:
    assert torch.isfinite(y).all()
    assert (y.double() - expected).norm() < roundings * TOLERANCE[y.dtype] * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("out", "inputs", "group", "rows", "tile"),
    [
        (64, 256, 128, 1, Tile("tile", 16, 64)),  # whole tiles
        (40, 352, 32, 3, Tile("tile", 16, 32)),  # outputs, inputs and rows that fill no tile
        (33, 192, 64, 5, Tile("tile", 16, 32)),  # half a chunk at the end, an odd number of outputs
        (32, 512, 256, 17, Tile("tile", 16, 32)),  # a group over two chunks, a second row tile
        (33, 640, 128, 2, Tile("tile", 16, 32, split=3)),  # inputs split unevenly
        (32, 320, 64, 4, Tile("tile", 16, 32, split=4)),  # more parts than chunks
        (160, 256, 128, 20, Tile("tile", 16, 32, split=2, resident=1)),  # two waves of 4 whole, the rest of 2 split
        (64, 512, 128, 1, Tile("ways", 8, 32)),  # a chunk for each warp
        (40, 640, 128, 3, Tile("ways", 8, 16)),  # three warps of the second step without a chunk
        (33, 1024, 128, 8, Tile("ways", 8, 16, split=2)),
        (32, 352, 32, 2, Tile("ways", 8, 32)),
        (33, 192, 64, 9, Tile("ways", 16, 16, split=3)),  # parts without a chunk
        (32, 768, 256, 1, Tile("ways", 8, 16)),
        (64, 256, 128, 32, Tile("round", 16, 32)),
        (40, 384, 128, 5, Tile("round", 16, 32, split=2)),
        (160, 256, 256, 20, Tile("round", 16, 32, split=2, resident=1)),
        (48, 320, 64, 5, Tile("round", 16, 32)),  # groups that it cannot take: dequantised instead
        (48, 256, 128, 5, Tile("hopper", 128, 128)),  # not this GPU's: what the rule says without it
    ],
)
def test_against_float64(dtype, out, inputs, group, rows, tile, monkeypatch):
    codes, scales, x, bias, expected = problem(out, inputs, group, rows, dtype)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(float("nan")))  # poisoned outputs and sums
    y = launch(x, *pack(codes, scales), bias, group, tile)
    check(y, expected, 1 + (tile.kind == "round"))
    assert not _locks(CPU).any()


@pytest.mark.parametrize("tile", [Tile("tile", 16, 32, split=3), Tile("ways", 8, 32, split=2)], ids=str)
def test_split_sums_do_not_depend_on_the_launch_and_reset_their_locks(tile):
    codes, scales, x, _, expected = problem(32, 640, 128, 3, torch.float16, bias=False)
    packed = pack(codes, scales)
    runs = [launch(x, *packed, None, 128, tile) for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    check(runs[0], expected)


@pytest.mark.parametrize(("inputs", "group"), [(352, 32), (192, 64), (384, 128), (512, 256)])
def test_dequantisation_is_exact(inputs, group):
    codes, scales, x, _, expected = problem(33, inputs, group, 2, torch.float16, bias=False)
    words, by_group = pack(codes, scales)
    weight = dequantised(words, by_group, group, torch.float32, ptx=False)
    assert torch.equal(weight[:, :inputs], dequantise(codes, scales, torch.float32))
    assert not weight[:, inputs:].any()
    check(launch(x, words, by_group, None, group, DENSE), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_large_weights_are_dequantised_by_slices(bias, monkeypatch):
    monkeypatch.setattr("grace.kernels.w4a16.SLICE_BYTES", 128 * 256 * 2)
    codes, scales, x, added, expected = problem(300, 256, 64, 3, torch.float16, bias)
    check(launch(x, *pack(codes, scales), added, 64, DENSE), expected)


def test_fp16_steps_serve_bf16_activations():
    codes, scales, x, bias, expected = problem(32, 256, 64, 3, torch.bfloat16)
    packed = pack(codes, scales.half())  # these bf16 values are exact in fp16
    for tile in (Tile("tile", 16, 32), Tile("ways", 8, 32), Tile("round", 16, 32), DENSE):
        check(launch(x, *packed, bias, 64, tile), expected, 2)


def test_operator_takes_leading_dimensions_and_chooses_a_tile():
    codes, scales, x, bias, expected = problem(48, 256, 128, 6, torch.bfloat16)
    y = w4a16(x.view(2, 3, 256), *pack(codes, scales), bias, 256, 128)
    assert y.shape == (2, 3, 48)
    check(y.view(6, 48), expected)
    none = w4a16(x[:0], *pack(codes, scales), bias, 256, 128)
    assert none.shape == (0, 48)


def test_operator_is_known_to_the_compiler():
    codes, scales, x, bias, _ = problem(16, 128, 128, 2, torch.float16)
    torch.library.opcheck(torch.ops.grace.w4a16.default, (x, *pack(codes, scales), bias, 128))


def test_refusals_name_what_is_wrong(monkeypatch):
    codes, scales, x, _, _ = problem(16, 96, 16, 1, torch.bfloat16)
    with pytest.raises(GraceError, match="groups of 32, 64, 128, 256"):
        pack(codes, scales)
    codes, scales, x, _, _ = problem(16, 128, 128, 1, torch.bfloat16)
    with pytest.raises(GraceError, match=r"scales in bf16 or fp16, got torch\.float32"):
        pack(codes, scales.float())
    with pytest.raises(GraceError, match="17 rows do not fit one tile of 8"):
        launch(x.expand(17, 128), *pack(codes, scales), None, 128, Tile("ways", 8, 16))
    monkeypatch.setattr("grace.kernels.w4a16.LOCKS", 1)
    with pytest.raises(GraceError, match="2 tiles cannot be split, at most 1; use split = 1 for 1 rows and 16"):
        launch(x, *pack(codes, scales), None, 128, Tile("ways", 8, 8, split=2))
    with pytest.raises(GraceError, match="3 tiles cannot be split, at most 2"):  # a tile of this kind takes two locks
        locks, (words, steps) = torch.zeros(5, dtype=torch.int32), pack(*problem(384, 256, 128, 1, torch.bfloat16)[:2])
        gluon("w4a16_hopper").gemm(x.new_zeros(1, 256), words, steps, None, 128, Tile("hopper", 128, 128, 2), 4, locks)
    with pytest.raises(GraceError, match="do not fit 128 inputs"):
        w4a16(x.float(), *pack(codes, scales), None, 128, 128)
    with pytest.raises(GraceError, match="do not fit 128 inputs"):
        w4a16(x[:, :64], *pack(codes, scales), None, 128, 128)
    assert serves(128, 64, torch.float16) and not serves(128, 64, torch.float32) and not serves(100, 64, torch.float16)


def test_compiles_for_ampere_and_hopper():
    """Both ways to unpack, for few and more rows, to machine code by the assembler that comes with triton."""
    run_apart("w4a16_compile.py")
