"""y = x W^T + b with 4-bit weights and 16-bit activations (W4A16), on CUDA through Triton.

Symmetric codes in [-8, 7], one step size per group of 32, 64, 128 or 256 consecutive inputs, any number of rows and
outputs, inputs a multiple of the group (the last chunk of 128 is padded when weights are packed).

Few rows: one kernel that unpacks in registers and multiplies on the tensor cores, its inputs split over programs when
there are fewer tiles than multiprocessors. Many rows: the weight is dequantised once and the dense product does the
rest, which costs the less the more rows there are. `w4a16_table` draws the line.

Launches on one device share the locks of the split sums, so they must follow each other on one stream.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from grace.errors import GraceError
from grace.kernels.w4a16_layout import CHUNK, shuffle
from grace.kernels.w4a16_table import Tile, choose
from grace.kernels.w4a16_triton import dequantise_kernel, w4a16_kernel

GROUPS = (32, 64, 128, 256)
_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LOCKS = 1 << 16  # tiles of one launch that may be split


def serves(in_features: int, group_size: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes such a layer."""
    return dtype in (torch.bfloat16, torch.float16) and group_size in GROUPS and in_features % group_size == 0


def pack(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [out, in] and step sizes [out, in/group] -> (int16 [chunks, out, 32], step sizes [in/group, out])."""
    group = codes.shape[1] // scales.shape[1]
    if group not in GROUPS or group * scales.shape[1] != codes.shape[1]:
        raise GraceError(
            f"the W4A16 kernel takes groups of {', '.join(map(str, GROUPS))} that divide the inputs; "
            f"{codes.shape[1]} inputs with {scales.shape[1]} step sizes per output are not: quantise with one of these"
        )
    return shuffle(codes), scales.t().contiguous()


def w4a16(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    in_features: int,
    group_size: int,
) -> torch.Tensor:
    """x [..., in] bf16 or fp16, times the weight that `pack` made: [..., out] in x's dtype.

    Sums are fp32, multiplied once per group by its step size; the result is rounded once (twice for many rows, where
    the dequantised weight is rounded to x's dtype first).
    """
    if x.shape[-1] != in_features or x.dtype not in (torch.bfloat16, torch.float16):
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
    card, multiprocessors = _card(x.device)
    tile = choose(rows, words.shape[1], inputs, group_size, str(x.dtype)[6:], card, multiprocessors)
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
    """The product of `w4a16` for x [rows, in] with a given tile; `ptx` overrides how codes are unpacked.

    The inline PTX and the plain arithmetic give the same bits; Triton's interpreter runs the latter alone.
    """
    x = x.contiguous()
    ptx = x.is_cuda if ptx is None else ptx
    if tile.dense:
        return torch.nn.functional.linear(x, dequantised(words, scales, x.shape[1], group_size, x.dtype, ptx), bias)
    rows, inputs = x.shape
    chunks, outs, _ = words.shape
    y = torch.empty(rows, outs, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(rows, tile.block_m), triton.cdiv(outs, tile.block_n), tile.split)
    tiles = grid[0] * grid[1]
    if tile.split > 1 and tiles > LOCKS:
        raise GraceError(f"W4A16: {tiles} tiles cannot be split; use split = 1 for {rows} rows and {outs} outputs")
    parts = tiles * tile.split * tile.block_m * tile.block_n if tile.split > 1 else 1
    partial = torch.empty(parts, dtype=torch.float32, device=x.device)
    w4a16_kernel[grid](
        x, words, scales, scales if bias is None else bias, y, partial, _locks(x.device),
        rows, outs, inputs, chunks,
        GROUP=group_size, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, SPLIT=tile.split,
        EVEN_K=inputs % CHUNK == 0, HAS_BIAS=bias is not None, PTX=ptx,
        OPERANDS=_OPERANDS[x.dtype] if x.is_cuda else tl.float32,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def dequantised(
    words: torch.Tensor, scales: torch.Tensor, inputs: int, group_size: int, dtype: torch.dtype, ptx: bool
) -> torch.Tensor:
    """The weight [out, in] that `pack` made, dequantised in `dtype`."""
    chunks, outs, _ = words.shape
    weight = torch.empty(outs, inputs, dtype=dtype, device=words.device)
    block = 64
    dequantise_kernel[(chunks, triton.cdiv(outs, block))](
        words, scales, weight, outs, inputs, GROUP=group_size, BLOCK_N=block, PTX=ptx, num_warps=4
    )
    return weight


@cache
def _card(device: torch.device) -> tuple[str, int]:
    """Name and number of multiprocessors; stands in for a card where Triton interprets on a CPU."""
    if device.type != "cuda":
        return "interpreter", 4
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


@cache
def _locks(device: torch.device) -> torch.Tensor:
    return torch.zeros(LOCKS, dtype=torch.int32, device=device)
