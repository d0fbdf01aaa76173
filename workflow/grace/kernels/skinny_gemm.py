"""y = x W^T + b for a few rows and dense 16-bit weights on Hopper: what a bf16 model decodes with.

The time is that of reading W once, so the kernels keep many asynchronous copies of it in flight and let nothing wait
for anything else. No sum is split over programs: a result does not depend on timing.

`row_kernel`   one row: fp32 products on ordinary cores, which keep up. The copies of a program's first weights go ahead
               of the wait for the kernel before (programmatic dependent launch): they are under way while that one
               ends.
`rows_kernel`  up to 16 rows: y^T = W x^T on tensor cores, whose instructions the outputs fill.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from grace.kernels.dependent_launch import launch_options, start_next, waited

ROWS = 16
_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def row_kernel(
    x,  # [K]
    weight,  # [N, K]
    bias,  # [N], or anything without HAS_BIAS
    y,  # [N]
    N,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # K is a multiple of BLOCK_K
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per BLOCK_N outputs; every number of its tile has a sum of its own until the end."""
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    weight_at = weight + tl.minimum(outs, N - 1).to(tl.int64)[:, None] * K + inner[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    values = tl.zeros((BLOCK_K,), x.dtype.element_ty)
    ready = tl.program_id(0) * 0
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = (k + inner < K) | EVEN
        w = tl.load(weight_at + k) if EVEN else tl.load(weight_at + k, mask=inside[None, :], other=0.0)
        if k == 0:
            ready = waited(PDL) * 16
            start_next(PDL)
        if k < K:  # always: a load in a branch stays out of the pipeline, whose first copies so may precede the wait
            values = tl.load(x + tl.multiple_of(ready, 16) + k + inner, mask=inside, other=0.0)
        acc += w.to(tl.float32) * values.to(tl.float32)[None, :]
    total = tl.sum(acc, 1)
    if HAS_BIAS:
        total += tl.load(bias + outs, mask=outs < N, other=0.0).to(tl.float32)
    tl.store(y + outs, total.to(y.dtype.element_ty), mask=outs < N)


@triton.jit(do_not_specialize=["M"])
def rows_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    bias,  # [N], or anything without HAS_BIAS
    y,  # [M, N]
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,  # at least M
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
    OPERANDS: tl.constexpr,  # type of the products' factors: x's own, or fp32 where Triton's interpreter runs
):
    """One program per BLOCK_N outputs and all rows."""
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    weight_at = weight + tl.minimum(outs, N - 1).to(tl.int64)[:, None] * K + inner[None, :]
    x_at = x + rows[:, None] * K + inner[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    x_at += tl.multiple_of(waited(PDL) * 16, 16)
    start_next(PDL)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = (k + inner < K) | EVEN
        w = tl.load(weight_at + k) if EVEN else tl.load(weight_at + k, mask=inside[None, :], other=0.0)
        values = tl.load(x_at + k, mask=(rows < M)[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(w.to(OPERANDS), tl.trans(values.to(OPERANDS)), acc)
    if HAS_BIAS:
        acc += tl.load(bias + outs, mask=outs < N, other=0.0).to(tl.float32)[:, None]
    where = y + rows[None, :].to(tl.int64) * N + outs[:, None]
    tl.store(where, acc.to(y.dtype.element_ty), mask=(rows < M)[None, :] & (outs < N)[:, None])


@dataclass(frozen=True)
class Tile:
    """Outputs and inputs of a tile, warps of a program, stages of its pipeline."""

    block_n: int
    block_k: int
    warps: int
    stages: int


def choose(rows: int, outs: int, inputs: int) -> Tile | None:
    """The tile for x [rows, inputs] and a weight [outs, inputs]; None where an H100's cuBLAS is as fast.

    That is where more than one row meets many inputs and few outputs: too few programs have all the work.
    """
    if rows == 1:
        return Tile(4, 1024, warps=2, stages=3)
    return Tile(64, 128, warps=4, stages=6) if inputs <= 2 * outs else None


def linear(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """module(x) for x [rows, in]: by the kernels here where `module` is a dense linear layer that they
    are faster at.
    """
    if type(module) is not torch.nn.Linear or not serves(x, module.weight):
        return module(x)
    tile = choose(len(x), *module.weight.shape)
    return module(x) if tile is None else gemm(x, module.weight, module.bias, tile)


def serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernels take x [rows, in] and a weight [out, in] where they are."""
    plain = x.is_contiguous() and weight.is_contiguous() and x.dtype == weight.dtype and x.dtype in _OPERANDS
    return _here(x.device) and plain and 0 < len(x) <= ROWS and x.shape[1] % 16 == 0


@cache
def _here(device: torch.device) -> bool:
    """Hopper, where they were measured, and a CPU, where Triton interprets them."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device)[0] == 9


def gemm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tile: Tile) -> torch.Tensor:
    """x [rows, in] times weight [out, in] transposed, plus bias [out]: [rows, out]; fp32 sums, rounded once."""
    (rows, inputs), outs = x.shape, len(weight)
    y = torch.empty(rows, outs, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(outs, tile.block_n),)
    operands = (x, weight, weight if bias is None else bias, y)
    options = {
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STAGES": tile.stages,
        "EVEN": inputs % tile.block_k == 0, "HAS_BIAS": bias is not None, "num_warps": tile.warps,
    } | launch_options(x.device)  # fmt: skip
    if rows == 1:
        row_kernel[grid](*operands, outs, inputs, **options)
    else:
        operand = _OPERANDS[x.dtype] if x.is_cuda else tl.float32
        rows_kernel[grid](*operands, rows, outs, inputs, BLOCK_M=ROWS, OPERANDS=operand, **options)
    return y
