"""The Triton kernels of the W4A16 product; `w4a16.py` chooses among them and launches them.

One program computes a tile of outputs, weights on the side with many rows even for a single activation row: the
accumulator is [BLOCK_N outputs, BLOCK_M rows]. It walks over chunks of 128 inputs in the layout of `w4a16_layout`:
one load of packed words gives four slices of 32 consecutive inputs, whose products are summed in fp32 and multiplied
once by their group's step size. Codes are exact in bf16 and fp16, so the only rounding is that of the fp32 sums and
of the result.
"""

import triton
import triton.language as tl

# Two int16 words fill a register; nibble i of both becomes a pair of 16-bit floats with one LOP3 that masks it and
# sets the exponent: 0x4300 | n is 128 + n in bf16, 0x6400 | n is 1024 + n in fp16. Then 136 (1032) is subtracted,
# which leaves n - 8 exactly. bf16 subtracts by an FMA because sub.bf16x2 needs compute capability 9.0.
_PAIRS_BF16 = tl.constexpr(
    """
    {
    .reg .b32 t1, t2, t3;
    shr.b32 t1, $4, 4;
    shr.b32 t2, $4, 8;
    shr.b32 t3, $4, 12;
    lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $1, t1, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $2, t2, 0x000f000f, 0x43004300, 0xea;
    lop3.b32 $3, t3, 0x000f000f, 0x43004300, 0xea;
    mov.b32 t1, 0x3f803f80;
    mov.b32 t2, 0xc308c308;
    fma.rn.bf16x2 $0, $0, t1, t2;
    fma.rn.bf16x2 $1, $1, t1, t2;
    fma.rn.bf16x2 $2, $2, t1, t2;
    fma.rn.bf16x2 $3, $3, t1, t2;
    }
    """
)
_PAIRS_FP16 = tl.constexpr(
    """
    {
    .reg .b32 t1, t2, t3;
    shr.b32 t1, $4, 4;
    shr.b32 t2, $4, 8;
    shr.b32 t3, $4, 12;
    lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 $1, t1, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 $2, t2, 0x000f000f, 0x64006400, 0xea;
    lop3.b32 $3, t3, 0x000f000f, 0x64006400, 0xea;
    mov.b32 t1, 0x64086408;
    sub.f16x2 $0, $0, t1;
    sub.f16x2 $1, $1, t1;
    sub.f16x2 $2, $2, t1;
    sub.f16x2 $3, $3, t1;
    }
    """
)


@triton.jit
def _slices(words, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """int16 words [BLOCK_N, 32] -> the codes of the chunk's four slices, each [BLOCK_N, 32] in DTYPE."""
    if PTX:
        if tl.bfloat16 == DTYPE:
            c0, c1, c2, c3 = tl.inline_asm_elementwise(
                _PAIRS_BF16,
                "=r,=r,=r,=r,r",
                [words],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
        else:
            c0, c1, c2, c3 = tl.inline_asm_elementwise(
                _PAIRS_FP16,
                "=r,=r,=r,=r,r",
                [words],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
    else:
        c0 = ((words & 15) - 8).to(tl.float32).to(DTYPE)
        c1 = (((words >> 4) & 15) - 8).to(tl.float32).to(DTYPE)
        c2 = (((words >> 8) & 15) - 8).to(tl.float32).to(DTYPE)
        c3 = (((words >> 12) & 15) - 8).to(tl.float32).to(DTYPE)
    return c0, c1, c2, c3


@triton.jit
def _write(total, bias, y, rows, outs, M, N, HAS_BIAS: tl.constexpr):
    """Add the bias to a finished tile [BLOCK_N, BLOCK_M] and store it as y[rows, outs]."""
    if HAS_BIAS:
        total += tl.load(bias + outs, mask=outs < N, other=0.0).to(tl.float32)[:, None]
    where = y + rows.to(tl.int64)[None, :] * N + outs[:, None]
    tl.store(where, total.to(y.dtype.element_ty), mask=(rows < M)[None, :] & (outs < N)[:, None])


@triton.jit
def w4a16_kernel(
    x,  # [M, K] bf16 or fp16
    words,  # [CHUNKS, N, 32] int16, the layout of w4a16_layout.shuffle
    scales,  # [groups, N]
    bias,  # [N], or anything without HAS_BIAS
    y,  # [M, N]
    partial,  # fp32 [tiles, SPLIT, BLOCK_N * BLOCK_M]: sums of a part of the inputs
    locks,  # int32 [tiles], zero before and after: how many parts of a tile are done
    M,
    N,
    K,
    CHUNKS,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PTX: tl.constexpr,
    OPERANDS: tl.constexpr,  # dtype of the products' factors: x's own, or fp32 where the interpreter has no bf16 product
):
    """y = x W^T + bias for one tile, or for one of SPLIT parts of its inputs.

    With SPLIT > 1 each part leaves its fp32 sums; whoever finishes last adds all of them up in their order, so that
    the result does not depend on who that was, and sets the lock back to zero for the next launch.
    """
    pid_m, pid_n, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, 32)
    row_ok = (rows < M)[None, :]
    out_ok = outs < N
    x_at = x + rows.to(tl.int64)[None, :] * K + lane[:, None]
    each = tl.cdiv(CHUNKS, SPLIT)
    first = part * each
    words_at = words + first.to(tl.int64) * N * 32 + outs[:, None] * 32 + lane[None, :]
    last = tl.cdiv(K, GROUP) - 1  # padding inputs past K belong to no group; their codes are 0
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for chunk in range(first, tl.minimum(first + each, CHUNKS)):
        packed = tl.load(words_at, mask=out_ok[:, None], other=0)
        words_at += N * 32
        c0, c1, c2, c3 = _slices(packed, OPERANDS, PTX)
        k = chunk * 128
        if EVEN_K:
            x0 = tl.load(x_at + k, mask=row_ok, other=0.0).to(OPERANDS)
            x1 = tl.load(x_at + k + 32, mask=row_ok, other=0.0).to(OPERANDS)
            x2 = tl.load(x_at + k + 64, mask=row_ok, other=0.0).to(OPERANDS)
            x3 = tl.load(x_at + k + 96, mask=row_ok, other=0.0).to(OPERANDS)
        else:
            x0 = tl.load(x_at + k, mask=row_ok & (k + lane < K)[:, None], other=0.0).to(OPERANDS)
            x1 = tl.load(x_at + k + 32, mask=row_ok & (k + 32 + lane < K)[:, None], other=0.0).to(OPERANDS)
            x2 = tl.load(x_at + k + 64, mask=row_ok & (k + 64 + lane < K)[:, None], other=0.0).to(OPERANDS)
            x3 = tl.load(x_at + k + 96, mask=row_ok & (k + 96 + lane < K)[:, None], other=0.0).to(OPERANDS)
        if GROUP >= 128:
            group = chunk // (GROUP // 128)
            s0 = tl.load(scales + group * N + outs, mask=out_ok, other=0.0).to(tl.float32)
            sums = tl.dot(c0, x0)
            sums = tl.dot(c1, x1, sums)
            sums = tl.dot(c2, x2, sums)
            sums = tl.dot(c3, x3, sums)
            acc += sums * s0[:, None]
        elif GROUP == 64:
            group = chunk * 2
            s0 = tl.load(scales + group * N + outs, mask=out_ok, other=0.0).to(tl.float32)
            s1 = tl.load(scales + tl.minimum(group + 1, last) * N + outs, mask=out_ok, other=0.0).to(tl.float32)
            sums = tl.dot(c0, x0)
            acc += tl.dot(c1, x1, sums) * s0[:, None]
            sums = tl.dot(c2, x2)
            acc += tl.dot(c3, x3, sums) * s1[:, None]
        else:
            group = chunk * 4
            s0 = tl.load(scales + group * N + outs, mask=out_ok, other=0.0).to(tl.float32)
            s1 = tl.load(scales + tl.minimum(group + 1, last) * N + outs, mask=out_ok, other=0.0).to(tl.float32)
            s2 = tl.load(scales + tl.minimum(group + 2, last) * N + outs, mask=out_ok, other=0.0).to(tl.float32)
            s3 = tl.load(scales + tl.minimum(group + 3, last) * N + outs, mask=out_ok, other=0.0).to(tl.float32)
            acc += tl.dot(c0, x0) * s0[:, None]
            acc += tl.dot(c1, x1) * s1[:, None]
            acc += tl.dot(c2, x2) * s2[:, None]
            acc += tl.dot(c3, x3) * s3[:, None]

    if SPLIT == 1:
        _write(acc, bias, y, rows, outs, M, N, HAS_BIAS)
    else:
        tile = pid_n * tl.num_programs(0) + pid_m
        inside = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        mine = partial + tile.to(tl.int64) * SPLIT * BLOCK_N * BLOCK_M + inside
        tl.store(mine + part * BLOCK_N * BLOCK_M, acc, cache_modifier=".cg")
        tl.debug_barrier()  # every thread's sums are written before one thread says so
        done = tl.atomic_add(locks + tile, 1, sem="acq_rel")
        if done == SPLIT - 1:
            tl.debug_barrier()
            total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for other in range(SPLIT):
                total += tl.load(mine + other * BLOCK_N * BLOCK_M, cache_modifier=".cg")
            _write(total, bias, y, rows, outs, M, N, HAS_BIAS)
            tl.store(locks + tile, 0)


@triton.jit
def dequantise_kernel(
    words,  # [CHUNKS, N, 32] int16
    scales,  # [groups, N]
    weight,  # [N, K]
    N,
    K,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PTX: tl.constexpr,
):
    """weight = codes * step sizes, rounded once; one program per chunk and BLOCK_N outputs."""
    chunk = tl.program_id(0)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, 32)
    out_ok = outs < N
    at = words + chunk.to(tl.int64) * N * 32 + outs[:, None] * 32 + lane[None, :]
    packed = tl.load(at, mask=out_ok[:, None], other=0)
    dtype: tl.constexpr = weight.dtype.element_ty
    c0, c1, c2, c3 = _slices(packed, dtype, PTX)
    k = chunk * 128 + lane
    first = chunk * 128
    last = tl.cdiv(K, GROUP) - 1
    to = weight + outs.to(tl.int64)[:, None] * K + k[None, :]
    s0 = tl.load(scales + tl.minimum(first // GROUP, last) * N + outs, mask=out_ok, other=0.0).to(tl.float32)
    s1 = tl.load(scales + tl.minimum((first + 32) // GROUP, last) * N + outs, mask=out_ok, other=0.0).to(tl.float32)
    s2 = tl.load(scales + tl.minimum((first + 64) // GROUP, last) * N + outs, mask=out_ok, other=0.0).to(tl.float32)
    s3 = tl.load(scales + tl.minimum((first + 96) // GROUP, last) * N + outs, mask=out_ok, other=0.0).to(tl.float32)
    tl.store(to, (c0.to(tl.float32) * s0[:, None]).to(dtype), mask=out_ok[:, None] & (k < K)[None, :])
    tl.store(to + 32, (c1.to(tl.float32) * s1[:, None]).to(dtype), mask=out_ok[:, None] & (k + 32 < K)[None, :])
    tl.store(to + 64, (c2.to(tl.float32) * s2[:, None]).to(dtype), mask=out_ok[:, None] & (k + 64 < K)[None, :])
    tl.store(to + 96, (c3.to(tl.float32) * s3[:, None]).to(dtype), mask=out_ok[:, None] & (k + 96 < K)[None, :])
