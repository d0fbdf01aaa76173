"""The INT4 GEMM (W4A16) for many rows on Hopper, in Gluon: a warp that loads, and two warpgroups that unpack and
multiply.

y^T = W x^T as in `w4a16_triton`, weights rounded to 16 bits as they are unpacked. A program stays on its multiprocessor
and works on item after item: a tile of 128 outputs and BLOCK_M rows, or a part of the inputs of one where the last wave
of tiles would not fill the GPU.

`_fetch_tiles`  one warp, which lets the copy engine (TMA) bring chunks of activations and packed words into a ring of
                STAGES in shared memory.
`_multiply`     two warpgroups, each with half of the outputs. A chunk's words go from shared memory to the registers
                that are the tensor core's left operand, are unpacked there and multiplied. Each warpgroup waits for its
                own products before it unpacks again; meanwhile the other's run. (Named barriers that made them take
                turns, and unpacking the next chunk while the last is multiplied, were not faster.)
"""

from dataclasses import replace

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from grace.kernels.gluon_names import barrier, fetch, next_stage, write
from grace.kernels.w4a16_layout import CHUNK, TILE
from grace.kernels.w4a16_table import Tile
from grace.kernels.w4a16_triton import WEIGHTS_BF16, WEIGHTS_FP16

DENSE_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)  # activations and results: rows of 128 bytes, swizzled
WORDS_LAYOUT = gl.NVMMASharedLayout(64, 16, 2)  # packed words: 64 bytes per output
ROWS_SHARED = gl.constexpr(1024)  # rows that the programs of a wave work on: activations weigh four times what words do


@gluon.jit
def _items(plan):
    """Whole tiles, and parts of those that are cut."""
    return plan[0] + plan[1] * plan[2]


@gluon.jit
def _place(item, plan, BLOCK_M: gl.constexpr):
    """Item -> its tile, the tile's place in rows and outputs, its part of the inputs, first and last chunk; next item.

    Tiles go band by band of row tiles, so that programs of a wave share activations and weights in L2. After the whole
    tiles come the first parts of those that are cut, a program each, then their other parts, which the programs that
    are left share.
    """
    WHOLE, CUT, SPLIT, FIRST, CHUNKS, m_tiles, n_tiles = plan
    BAND: gl.constexpr = ROWS_SHARED // BLOCK_M
    tile, part, after = item, item * 0, item + gl.num_programs(0)
    first, last = CHUNKS * 0, CHUNKS
    if (item >= WHOLE) & (item < _items(plan)):
        tile, part = WHOLE + (item - WHOLE) % CUT, (item - WHOLE) // CUT
        if part == 0:
            last = FIRST
            after = _items(plan)
        else:
            first = FIRST + (CHUNKS - FIRST) * (part - 1) // (SPLIT - 1)
            last = FIRST + (CHUNKS - FIRST) * part // (SPLIT - 1)
            after -= CUT
    band, inside = tile // (BAND * n_tiles), tile % (BAND * n_tiles)
    width = gl.minimum(m_tiles - band * BAND, BAND)
    return tile, band * BAND + inside % width, inside // width, part, first, last, after


@gluon.jit
def _fetch_tiles(x, words, ring, plan, N, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr):
    """Fill stages with the chunks of every tile of this program, as soon as both warpgroups have emptied them."""
    x_s, words_s, full, empty = ring
    HALVES: gl.constexpr = full.shape[0] // STAGES
    stage, phase = 0, 1
    if PDL:
        gdc_wait()
    item = gl.program_id(0)
    while item < _items(plan):
        _tile, tile_m, tile_n, _part, first, last, item = _place(item, plan, BLOCK_M)
        for chunk in range(first, last):
            for half in gl.static_range(2):
                here = HALVES * stage + half * (HALVES - 1)
                if half < HALVES:
                    mbarrier.wait(empty.index(here), phase)
                    mbarrier.expect(full.index(here), BLOCK_M * 256 // HALVES + (128 * 64 if half == 0 else 0))
                fetch(x, [tile_m * BLOCK_M, chunk * 128 + half * 64], full.index(here), x_s.index(2 * stage + half))
                if half == 0:
                    for side in gl.static_range(2):  # past the last output, words of the next chunk: never stored
                        out = chunk * N + tile_n * 128 + side * 64
                        fetch(words, [out, 0], full.index(here), words_s.index(2 * stage + side))
            stage, phase = next_stage(stage, phase, STAGES)
    if PDL:
        gdc_launch_dependents()


@gluon.jit
def _pairs_at(pairs, out, PADDED):
    """Where the pairs of scales of outputs out to out + 64 lie, by the threads that unpack these outputs."""
    OWNERS: gl.constexpr = gl.DistributedLinearLayout([], [[0], [0], [1], [2], [4]], [[8], [16]], [], [32])
    return pairs + gl.minimum(out // 2 + gl.arange(0, 32, OWNERS), PADDED // 2 - 1)


@gluon.jit
def _steps(pairs, like, DTYPE: gl.constexpr):
    """int32 pairs of scales [H / 2] -> scales [H, 32] where `like` has the words of their outputs."""
    low = (pairs & 65535).to(gl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    steps = gl.join(low, high).reshape((pairs.shape[0] // 8, 8, 2)).permute((0, 2, 1)).reshape((like.shape[0],))
    steps = gl.convert_layout(steps, gl.SliceLayout(1, like.type.layout), assert_trivial=True)
    wide, _ = gl.broadcast(gl.expand_dims(steps, 1), like)
    return wide


@gluon.jit
def _unpack(words, steps, DTYPE: gl.constexpr):
    """int16 words [H, 32], scales [H, 32] -> the weights of the chunk's four slices of 32 inputs, each [H, 32]."""
    if gl.bfloat16 == DTYPE:
        w0, w1, w2, w3 = gl.inline_asm_elementwise(
            WEIGHTS_BF16, "=&r,=&r,=&r,=&r,r,r", [words, steps],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        w0, w1, w2, w3 = gl.inline_asm_elementwise(
            WEIGHTS_FP16, "=&r,=&r,=&r,=&r,r,r", [words, steps],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    return w0, w1, w2, w3


@gluon.jit
def _product(weights, x_s, AT: gl.constexpr, acc):
    """acc + weights [H, 32] times 32 inputs of the activations [rows, 64], from AT on; it runs on until waited for."""
    return warpgroup_mma(weights, x_s.slice(AT, 32, 1).permute((1, 0)), acc, is_async=True)


@gluon.jit
def _add_products(
    acc, ring, stage, phase, sizes, pairs_at, stride, first, last, SIDE: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr, FACTOR: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """The products of chunks first to last, added to acc; and the next stage and parity.

    They are waited for before the next chunk is unpacked: ptxas would do so after each one if any ran on into the next
    round of this loop, and registers that a running product reads must not be written. And a stage is emptied after
    products alone: said to be empty once unpacked, its words can be overwritten before a slow warp has loaded them.
    """
    x_s, words_s, full, empty = ring
    HALVES: gl.constexpr = full.shape[0] // STAGES
    for chunk in range(first, last):
        here = HALVES * stage
        mbarrier.wait(full.index(here), phase)
        packed = words_s.index(2 * stage + SIDE).load(FACTOR)
        w0, w1, w2, w3 = _unpack(packed, _steps(sizes, packed, DTYPE), DTYPE)
        sizes = gl.load(pairs_at + gl.minimum(chunk + 1, last - 1) * 128 // GROUP * stride)
        mbarrier.wait(full.index(here), phase)  # passes at once; ptxas moves no unpacking past such a branch
        x0, x1 = x_s.index(2 * stage), x_s.index(2 * stage + 1)
        acc = _product(w1, x0, 32, _product(w0, x0, 0, acc))
        if HALVES == 2:
            mbarrier.wait(full.index(here + 1), phase)
        acc = _product(w3, x1, 32, _product(w2, x1, 0, acc))
        if HALVES == 2:
            acc = warpgroup_mma_wait(2, deps=[acc])  # the first two are done
            mbarrier.arrive(empty.index(here))
        acc = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[acc]))
        mbarrier.arrive(empty.index(here + HALVES - 1))
        stage, phase = next_stage(stage, phase, STAGES)
    return acc, stage, phase


@gluon.jit
def _multiply(
    pairs, bias, y, partial, locks, ring, y_s, plan, N, PADDED, SIDE: gl.constexpr, GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, HAS_BIAS: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """One half (SIDE) of the outputs of every tile of this program."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    WHOLE, _CUT, SPLIT, _FIRST, _CHUNKS, _m_tiles, _n_tiles = plan
    to = y_s.index(SIDE)
    stage, phase = 0, 0
    item = gl.program_id(0)
    tile, tile_m, tile_n, part, first, last, after = _place(item, plan, BLOCK_M)
    pairs_at = _pairs_at(pairs, tile_n * 128 + SIDE * 64, PADDED)
    sizes = gl.load(pairs_at + first * 128 // GROUP * (PADDED // 2))
    while item < _items(plan):
        acc = warpgroup_mma_init(gl.zeros((64, BLOCK_M), gl.float32, SUMS))
        acc, stage, phase = _add_products(
            acc, ring, stage, phase, sizes, pairs_at, PADDED // 2, first, last, SIDE, GROUP, STAGES, FACTOR, DTYPE
        )
        total = warpgroup_mma_wait(0, deps=[acc])
        out, row, lock, this_part = tile_n * 128 + SIDE * 64, tile_m * BLOCK_M, (tile - WHOLE) * 2 + SIDE, part
        item = after  # its first scales come while this one is stored
        tile, tile_m, tile_n, part, first, last, after = _place(item, plan, BLOCK_M)
        pairs_at = _pairs_at(pairs, tile_n * 128 + SIDE * 64, PADDED)
        sizes = gl.load(pairs_at + first * 128 // GROUP * (PADDED // 2), mask=item < _items(plan), other=0)
        if PARTS:
            if lock >= 0:
                _store_part(total, bias, y, partial, locks, to, lock, this_part, SPLIT, row, out, N, HAS_BIAS)
            else:
                _store(total, bias, y, to, row, out, N, HAS_BIAS)
        else:
            _store(total, bias, y, to, row, out, N, HAS_BIAS)
    tma.store_wait(0)


@gluon.jit
def _store(total, bias, y, y_s, row, out, N, HAS_BIAS: gl.constexpr):
    """Add the bias to finished sums [outputs, rows], turn them over in shared memory and let them be written to y."""
    if HAS_BIAS:
        outs = out + gl.arange(0, total.shape[0], gl.SliceLayout(1, total.type.layout))
        total += gl.expand_dims(gl.load(bias + outs, mask=outs < N, other=0.0).to(gl.float32), 1)
    tma.store_wait(0)  # the tile before has left y_s
    y_s.permute((1, 0)).store(total.to(y.dtype))
    fence_async_shared()
    write(y, [row, out], y_s)


@gluon.jit
def _store_part(total, bias, y, partial, locks, y_s, lock, part, SPLIT, row, out, N, HAS_BIAS: gl.constexpr):
    """Leave the sums of one of SPLIT parts of the inputs; whoever comes last adds all in their order and stores y.

    (Of two, whoever comes last adds the other's to its own: either order gives the same sum.)
    Parts lie in `partial` register by register, so that a warp moves whole cache lines: output bits 4 and 5 are warps,
    bits 0 to 2 and row bits 1 and 2 lanes, output bit 3 and row bit 0 the four registers of 16 bytes.
    """
    H: gl.constexpr = total.shape[0]
    R: gl.constexpr = total.shape[1]
    flat = total.reshape((H // 64, 4, 2, 8, R // 8, 4, 2)).permute((0, 4, 1, 3, 5, 2, 6)).reshape((H * R,))
    parts = partial + lock.to(gl.int64) * SPLIT * (H * R) + gl.arange(0, H * R, flat.type.layout)
    gl.store(parts + part * (H * R), flat, cache_modifier=".cg")
    barrier()  # every thread's sums are written before one thread says so
    done = gl.atomic_add(locks + lock, 1, sem="acq_rel")
    if done == SPLIT - 1:
        barrier()
        if SPLIT == 2:
            flat += gl.load(parts + (1 - part) * (H * R), cache_modifier=".cg")
        else:
            flat = gl.load(parts, cache_modifier=".cg")
            for other in range(1, SPLIT):
                flat += gl.load(parts + other * (H * R), cache_modifier=".cg")
        whole = flat.reshape((H // 64, R // 8, 4, 8, 4, 2, 2)).permute((0, 2, 5, 3, 1, 4, 6)).reshape((H, R))
        _store(gl.convert_layout(whole, total.type.layout, assert_trivial=True), bias, y, y_s, row, out, N, HAS_BIAS)
        gl.store(locks + lock, 0)


@gluon.jit(do_not_specialize=["M", "N", "CHUNKS", "WHOLE", "CUT", "SPLIT", "FIRST"])
def hopper_kernel(
    x,  # descriptor of [M, K] bf16 or fp16, K = 128 CHUNKS, blocks of BLOCK_M x 64
    words,  # descriptor of [CHUNKS * N, 32] int16, the layout of w4a16_layout.shuffle, blocks of 64 x 32
    pairs,  # [groups, PADDED / 2] int32, the layout of w4a16_layout.pair_steps, in x's type
    bias,  # [N], or anything without HAS_BIAS
    y,  # descriptor of [M, N], blocks of BLOCK_M x 64
    partial,  # fp32 [CUT, 2, SPLIT, 64 * BLOCK_M]: sums of parts of the inputs
    locks,  # int32 [CUT, 2], zero before and after: how many parts of half a tile are done
    M,
    N,
    PADDED,  # N rounded up to a multiple of 128
    CHUNKS,
    WHOLE,  # tiles whose inputs are not split: they go first
    CUT,  # tiles whose inputs are, fewer than programs
    SPLIT,  # parts of each
    FIRST,  # chunks of the first part
    GROUP: gl.constexpr,  # a multiple of 128
    BLOCK_M: gl.constexpr,  # 64, 128 or 256
    STAGES: gl.constexpr,
    PARTS: gl.constexpr,  # whether CUT is not 0
    HAS_BIAS: gl.constexpr,
    PDL: gl.constexpr,
):
    """y = x W^T + bias."""
    DTYPE: gl.constexpr = x.dtype
    HALVES: gl.constexpr = 2 if BLOCK_M == 256 else 1  # of a stage, filled and emptied one by one where few stages fit
    x_s = gl.allocate_shared_memory(DTYPE, [2 * STAGES, BLOCK_M, 64], x.layout)
    words_s = gl.allocate_shared_memory(gl.int16, [2 * STAGES, 64, 32], words.layout)
    y_s = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M, 64], y.layout)
    full = gl.allocate_shared_memory(gl.int64, [HALVES * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [HALVES * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(HALVES * STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    ring = (x_s, words_s, full, empty)
    plan = (WHOLE, CUT, SPLIT, FIRST, CHUNKS, (M + BLOCK_M - 1) // BLOCK_M, (N + 127) // 128)
    gl.warp_specialize(
        [
            (_multiply, (
                pairs, bias, y, partial, locks, ring, y_s, plan, N, PADDED, 0, GROUP, BLOCK_M, STAGES, PARTS, HAS_BIAS,
                DTYPE,
            )),
            (_multiply, (
                pairs, bias, y, partial, locks, ring, y_s, plan, N, PADDED, 1, GROUP, BLOCK_M, STAGES, PARTS, HAS_BIAS,
                DTYPE,
            )),
            (_fetch_tiles, (x, words, ring, plan, N, BLOCK_M, STAGES, PDL)),
        ],
        [4, 1],  # warps of the second warpgroup and of the one that loads, beside the first's four
        [240, 24],  # registers of their threads; the first warpgroup gets what is left, 240
    )  # fmt: skip


def gemm(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    tile: Tile,
    multiprocessors: int,
    locks: torch.Tensor,
) -> torch.Tensor:
    """y [M, N] for x [M, 128 chunks] and what `w4a16.pack` made, if `takes_hopper`;
    two of `locks` for each split tile.
    """
    (chunks, outs, _), rows = words.shape, len(x)
    y = torch.empty(rows, outs, dtype=x.dtype, device=x.device)
    tile = replace(tile, block_n=128, split=min(tile.split, chunks))
    tiles, whole = tile.divide(rows, outs, multiprocessors, len(locks) // 2)
    cut, split = tiles - whole, tile.split
    first, _ = tile.first_part(cut, chunks, multiprocessors)
    parts = cut * split * tile.block_m * 128
    hopper_kernel[(min(multiprocessors, whole + cut * split),)](
        TensorDescriptor(x, [rows, chunks * CHUNK], [chunks * CHUNK, 1], [tile.block_m, 64], DENSE_LAYOUT),
        TensorDescriptor(words, [chunks * outs, 32], [32, 1], [64, 32], WORDS_LAYOUT),
        scales.view(torch.int32), scales if bias is None else bias,
        TensorDescriptor(y, [rows, outs], [outs, 1], [tile.block_m, 64], DENSE_LAYOUT),
        torch.empty(max(parts, 1), dtype=torch.float32, device=x.device), locks,
        rows, outs, outs + -outs % TILE, chunks, whole, cut, split, first,
        GROUP=group_size, BLOCK_M=tile.block_m, STAGES=tile.stages, PARTS=parts > 0, HAS_BIAS=bias is not None,
        PDL=True, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return y
