"""y = x W^T + b with 4-bit weights and 16-bit activations (W4A16), on CUDA through Triton.

Symmetric codes in [-8, 7], one scale in bf16 or fp16 per group of 32, 64, 128 or 256 consecutive inputs, any number
of rows and outputs, inputs a multiple of the group (the last chunk of 128 is padded when weights are packed).

Up to about a hundred rows the GEMM is bound by reading the weights, so the kernels unpack them in registers, keep
many loads in flight and split the inputs over programs where outputs are few. With more rows it is bound by the tensor
cores; weights are then rounded to 16 bits as they are unpacked, or dequantised once for cuBLAS, which costs the less
the more rows there are. `w4a16_table` draws the lines.

Launches on one device share the locks of the split sums, so they must follow each other on one stream. From Hopper on
they use programmatic dependent launch: weights may be fetched while the kernel before still runs, so a weight must not
be written by a kernel that starts its successor early.
"""

from dataclasses import replace
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
import triton
import triton.language as tl

from grace.errors import GraceError
from grace.kernels.w4a16_layout import CHUNK, GROUPS, TILE, pair_steps, shuffle
from grace.kernels.w4a16_table import GPU, Tile, choose, rule, takes_hopper
from grace.kernels.w4a16_triton import dequantise_kernel, tile_kernel, ways_kernel

LOCKS = 1 << 16  # tiles of one launch that may be split
SLICE_BYTES = 96 << 20  # of a dequantised weight that exist at a time
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def serves(in_features: int, group_size: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes such a layer."""
    return dtype in _TYPES and group_size in GROUPS and in_features % group_size == 0


def pack(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [out, in], scales [out, in/group] bf16 or fp16 -> (int16 [chunks, out, 32], [groups, padded out]).

    Raises:
        GraceError: a group size, a code or a type that the kernel does not take.
    """
    group = codes.shape[1] // scales.shape[1]
    if group not in GROUPS or group * scales.shape[1] != codes.shape[1]:
        raise GraceError(
            f"the W4A16 kernel takes groups of {', '.join(map(str, GROUPS))} that divide the inputs; "
            f"{codes.shape[1]} inputs with {scales.shape[1]} scales per output are not: quantise with one of these"
        )
    if scales.dtype not in _TYPES:
        raise GraceError(f"the W4A16 kernel takes scales in bf16 or fp16, got {scales.dtype}: export them in one")
    missing = -codes.shape[1] % CHUNK // group  # groups that the padding of the last chunk would have
    return shuffle(codes), pair_steps(torch.nn.functional.pad(scales, (0, missing)))


def w4a16(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    in_features: int,
    group_size: int,
) -> torch.Tensor:
    """x [..., in] bf16 or fp16, times the weight that `pack` made: [..., out] in x's dtype.

    Sums are fp32, multiplied once per group by its scale; the result is rounded once (twice for many rows, where
    the dequantised weight is rounded to x's dtype first).
    """
    if x.shape[-1] != in_features or x.dtype not in _TYPES:
        raise GraceError(
            f"W4A16: activations {list(x.shape)} {x.dtype} do not fit {in_features} inputs in bf16 or fp16"
        )
    y = torch.ops.grace.w4a16(x.reshape(-1, in_features), words, scales, bias, group_size)
    return y.view(*x.shape[:-1], words.shape[1])


@torch.library.custom_op("grace::w4a16", mutates_args=())
def _w4a16(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, group_size: int
) -> torch.Tensor:
    rows, inputs = x.shape
    if rows == 0:
        return x.new_empty(0, words.shape[1])
    tile = choose(rows, words.shape[1], inputs, group_size, str(x.dtype)[6:], gpu(x.device)[0])
    return launch(x, words, scales, bias, group_size, tile)


@_w4a16.register_fake
def _(x, words, scales, bias, group_size):
    return x.new_empty(x.shape[0], words.shape[1])


def launch(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    tile: Tile,
    ptx: bool | None = None,
) -> torch.Tensor:
    """The GEMM of `w4a16` for x [rows, in] with a given tile; `ptx` overrides how codes are unpacked.

    The inline PTX and the plain arithmetic give the same bits; Triton's interpreter runs the latter alone.
    """
    ptx = x.is_cuda if ptx is None else ptx
    chunks, outs, _ = words.shape
    x = torch.nn.functional.pad(x, (0, chunks * CHUNK - x.shape[1])) if x.shape[1] % CHUNK else x.contiguous()
    here, early = gpu(x.device)
    if tile.kind == "hopper":
        x = x if x.data_ptr() % 16 == 0 else x.clone()  # the copy engine's blocks
        if takes_hopper(outs, group_size, here) and scales.dtype == x.dtype and words.data_ptr() % 16 == 0:
            return gluon("w4a16_hopper").gemm(
                x, words, scales, bias, group_size, tile, here.multiprocessors, _locks(x.device)
            )
        tile = rule(len(x), outs, x.shape[1], group_size, replace(here, hopper=False))
    rounds = tile.kind == "round" and group_size % CHUNK == 0 and scales.dtype == x.dtype
    if tile.kind == "dense" or (tile.kind == "round" and not rounds):
        return _dense(x, words, scales, bias, group_size, ptx)
    rows = len(x)
    y = torch.empty(rows, outs, dtype=x.dtype, device=x.device)
    tiles, whole = tile.divide(rows, outs, here.multiprocessors, LOCKS)
    parts = (tiles - whole) * tile.split * tile.block_m * tile.block_n
    partial = torch.empty(max(parts, 1), dtype=torch.float32, device=x.device)
    operands = (x, words, scales.view(torch.int32), scales if bias is None else bias, y, partial, _locks(x.device))
    sizes = (rows, outs, outs + -outs % TILE, chunks)
    options = {
        "GROUP": group_size, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SPLIT": tile.split,
        "STAGES": tile.stages, "HAS_BIAS": bias is not None, "PTX": ptx, "PDL": early, "LATE": tile.late,
        "STEP_TYPE": _TYPES[scales.dtype], "OPERANDS": _TYPES[x.dtype] if x.is_cuda else tl.float32,
        "num_warps": tile.warps, "num_stages": tile.stages,
    } | ({"launch_pdl": True} if early else {})  # fmt: skip
    even = outs % tile.block_n == 0
    if tile.kind == "ways":
        if rows > tile.block_m:
            raise GraceError(f"W4A16: {rows} rows do not fit one tile of {tile.block_m}; use a tile of another kind")
        grid = (tiles, tile.split)
        ways_kernel[grid](*operands, *sizes, WAYS=tile.warps, EVEN=even and chunks % tile.warps == 0, **options)
    else:
        grid = (whole + (tiles - whole) * tile.split,)
        tile_kernel[grid](
            *operands, *sizes, whole, ROUND=rounds, EVEN_M=rows % tile.block_m == 0, EVEN_N=even, **options
        )
    return y


def _dense(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, group_size: int, ptx: bool
) -> torch.Tensor:
    """x times the dequantised weight, slice of outputs by slice where the whole weight would be large."""
    outs = words.shape[1]
    size = max(TILE, SLICE_BYTES // (x.shape[1] * x.element_size()) // TILE * TILE)
    if size >= outs:
        return torch.nn.functional.linear(x, dequantised(words, scales, group_size, x.dtype, ptx), bias)
    y = torch.empty(len(x), outs, dtype=x.dtype, device=x.device)
    for start in range(0, outs, size):
        stop = min(start + size, outs)
        weight = dequantised(words, scales, group_size, x.dtype, ptx, start, stop)
        if bias is None:
            torch.mm(x, weight.t(), out=y[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, weight.t(), out=y[:, start:stop])
    return y


def dequantised(
    words: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    dtype: torch.dtype,
    ptx: bool,
    start: int = 0,
    stop: int | None = None,
) -> torch.Tensor:
    """The weight that `pack` made, dequantised in `dtype`: outputs start (a multiple of 128) to stop, all chunks."""
    chunks, outs, _ = words.shape
    stop = outs if stop is None else stop
    weight = torch.empty(stop - start, chunks * CHUNK, dtype=dtype, device=words.device)
    block = 64
    dequantise_kernel[(chunks, triton.cdiv(stop - start, block))](
        words, scales.view(torch.int32), weight, stop, outs, outs + -outs % TILE, chunks * CHUNK, start,
        GROUP=group_size, BLOCK_N=block, PTX=ptx, STEP_TYPE=_TYPES[scales.dtype], num_warps=4,
    )  # fmt: skip
    return weight


@cache
def gpu(device: torch.device) -> tuple[GPU, bool]:
    """The GPU, and whether it can launch a kernel before its predecessor ends (compute capability 9.0 on).

    Stands in for a GPU where Triton interprets on a CPU.
    """
    if device.type != "cuda":
        return GPU("interpreter", 4, 1 << 20), False
    about = torch.cuda.get_device_properties(device)
    runs_hopper = about.major == 9 and gluon("w4a16_hopper") is not None
    shared = about.shared_memory_per_block_optin
    return GPU(about.name, about.multi_processor_count, shared, runs_hopper), about.major >= 9


@cache
def gluon(name: str) -> ModuleType | None:
    """A module of `grace.kernels` in Gluon, or None where this Triton's Gluon does not have what it takes."""
    try:
        return import_module(f"grace.kernels.{name}")
    except (ImportError, AttributeError):
        return None


@cache
def _locks(device: torch.device) -> torch.Tensor:
    return torch.zeros(LOCKS, dtype=torch.int32, device=device)
