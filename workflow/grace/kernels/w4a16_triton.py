"""The Triton kernels of the INT4 GEMM (W4A16); `w4a16.py` chooses among them and launches them.

Weights stand on the side of the GEMM with many rows even for one activation row: y^T = W x^T, so the accumulator is
[BLOCK_N outputs, BLOCK_M rows] and a tensor-core instruction is filled by outputs. Packed words come from memory in the
layout of `w4a16_layout` through asynchronous copies, go from shared memory straight into the registers that hold the
tensor core's left operand, and are unpacked there; no layout conversion is left in any inner loop (`tests/
w4a16_compile.py` counts them).

`ways_kernel`   up to 16 rows: each warp of a program works on a chunk of 128 inputs of its own, all for the same few
                outputs; the warps' sums are added at the end. Many loads in flight with few outputs: small layers.
`tile_kernel`   any number of rows: all warps on one chunk. With ROUND the dequantised weight is rounded to the
                activations' type and summed at once, as a 16-bit model does; without, sums of codes are multiplied by
                their group's scale in fp32, so that only the result is rounded.
`dequantise_kernel`  the weight as a dense matrix, for cuBLAS.

Programmatic dependent launch (PDL, Hopper on): a program first asks the L2 cache for its first weights, then waits for
the kernel before it, and lets the kernel after it start early. Weights are constants, so they may be asked for while
their predecessor still runs; everything else is touched after the wait.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

CHUNK = tl.constexpr(128)

# Two int16 words fill a register; nibble i of both becomes a pair of 16-bit floats with one LOP3 that masks it and
# sets the exponent: 0x4300 | n is 128 + n in bf16, 0x6400 | n is 1024 + n in fp16. Then 136 (1032) is subtracted,
# which leaves n - 8 exactly. bf16 subtracts by an FMA because sub.bf16x2 needs compute capability 9.0.
_PAIR = {
    "bf16": "lop3.b32 {to}, {word}, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 {to}, {to}, one, zero;",
    "fp16": "lop3.b32 {to}, {word}, 0x000f000f, 0x64006400, 0xea; sub.rn.f16x2 {to}, {to}, zero;",
}
_CONSTANTS = {  # 1 and -136; 1032
    "bf16": "mov.b32 one, 0x3f803f80; mov.b32 zero, 0xc308c308; mov.b32 nothing, 0x80008000;",
    "fp16": "mov.b32 zero, 0x64086408;",
}
_TIMES = {  # a product rounded once; as an FMA with -0 on bf16, for the same reason
    "bf16": "fma.rn.bf16x2 {to}, {to}, {step}, nothing;",
    "fp16": "mul.rn.f16x2 {to}, {to}, {step};",
}


def _assembly(kind: str, nibbles: tuple[int, ...], scaled: bool) -> tl.constexpr:
    """PTX that turns a pair of words into a pair of 16-bit codes per nibble, times a pair of scales if `scaled`."""
    word, step = f"${len(nibbles)}", f"${len(nibbles) + 1}"
    lines = ["{ .reg .b32 one, zero, nothing, shifted;", _CONSTANTS[kind]]
    for index, nibble in enumerate(nibbles):
        lines += [f"shr.b32 shifted, {word}, {4 * nibble};", _PAIR[kind].format(to=f"${index}", word="shifted")]
        lines += [_TIMES[kind].format(to=f"${index}", step=step)] if scaled else []
    return tl.constexpr("\n".join(lines) + "\n}")


_CODES_BF16 = _assembly("bf16", (0, 1, 2, 3), scaled=False)
_CODES_FP16 = _assembly("fp16", (0, 1, 2, 3), scaled=False)
_FIRST_BF16, _SECOND_BF16 = _assembly("bf16", (0, 1), scaled=True), _assembly("bf16", (2, 3), scaled=True)
_FIRST_FP16, _SECOND_FP16 = _assembly("fp16", (0, 1), scaled=True), _assembly("fp16", (2, 3), scaled=True)
WEIGHTS_BF16, WEIGHTS_FP16 = (_assembly(kind, (0, 1, 2, 3), scaled=True) for kind in ("bf16", "fp16"))


@triton.jit
def _slices(words, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """int16 words [..., 32] -> the codes of the chunk's four slices of 32 inputs, each [..., 32] in DTYPE."""
    if not PTX:
        c0 = ((words & 15) - 8).to(tl.float32).to(DTYPE)
        c1 = (((words >> 4) & 15) - 8).to(tl.float32).to(DTYPE)
        c2 = (((words >> 8) & 15) - 8).to(tl.float32).to(DTYPE)
        c3 = (((words >> 12) & 15) - 8).to(tl.float32).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            _CODES_BF16, "=&r,=&r,=&r,=&r,r", [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            _CODES_FP16, "=&r,=&r,=&r,=&r,r", [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    return c0, c1, c2, c3


@triton.jit
def _half(words, steps, DTYPE: tl.constexpr, SECOND: tl.constexpr, PTX: tl.constexpr):
    """int16 words [N, 32], steps [N] fp32 -> the weights of half a chunk, [N, 64], rounded once to DTYPE."""
    if not PTX:
        shift: tl.constexpr = 8 if SECOND else 0
        w0 = ((((words >> shift) & 15) - 8).to(tl.float32) * steps[:, None]).to(DTYPE)
        w1 = ((((words >> (shift + 4)) & 15) - 8).to(tl.float32) * steps[:, None]).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        wide = tl.broadcast_to(steps.to(tl.bfloat16)[:, None], words.shape)
        w0, w1 = tl.inline_asm_elementwise(
            _SECOND_BF16 if SECOND else _FIRST_BF16,
            "=&r,=&r,r,r", [words, wide], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        wide = tl.broadcast_to(steps.to(tl.float16)[:, None], words.shape)
        w0, w1 = tl.inline_asm_elementwise(
            _SECOND_FP16 if SECOND else _FIRST_FP16,
            "=&r,=&r,r,r", [words, wide], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    return tl.reshape(tl.permute(tl.join(w0, w1), (0, 2, 1)), (words.shape[0], 64))


@triton.jit
def _steps(pairs, DTYPE: tl.constexpr):
    """int32 [B, N/2], outputs 16i + j (low half) and 16i + j + 8 (high) in word 8i + j -> scales [B, N] in fp32."""
    if tl.bfloat16 == DTYPE:
        low = (pairs << 16).to(tl.float32, bitcast=True)
        high = (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        low = (pairs & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = ((pairs >> 16) & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    both = tl.reshape(tl.join(low, high), (pairs.shape[0], pairs.shape[1] // 8, 8, 2))
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), (pairs.shape[0], 2 * pairs.shape[1]))


@triton.jit
def _ask(at):
    """Ask for the cache lines at `at` to be brought into L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _ask_ahead(words, pairs, first, last, group, groups, at_n, N, PADDED, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr):
    """Ask for the first CHUNKS chunks of words of BLOCK_N outputs, and for their scales of up to 64 groups."""
    lines: tl.constexpr = BLOCK_N // 2  # of 128 bytes, per chunk
    line = tl.arange(0, CHUNKS * lines)
    chunk = tl.minimum(first + line // lines, tl.maximum(last, 1) - 1).to(tl.int64)
    _ask(words + chunk * N * 32 + tl.minimum(at_n * 32 + line % lines * 64, N * 32 - 1))
    _ask(pairs + tl.minimum(group + tl.arange(0, 64), groups - 1) * (PADDED // 2) + at_n // 2)


@triton.jit
def _settled(acc):
    """acc, behind a fence for the compiler: registers that a running tensor-core product reads are not reused.

    Without it Triton 3.6 keeps products of the last iteration running while their left operand is unpacked anew.
    """
    return tl.inline_asm_elementwise("// $0 $1", "=r,0", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _store(total, bias, y, rows, outs, M, N, HAS_BIAS: tl.constexpr):
    """Add the bias to a finished tile [BLOCK_N, BLOCK_M] and store it as y[rows, outs]."""
    if HAS_BIAS:
        total += tl.load(bias + outs, mask=outs < N, other=0.0).to(tl.float32)[:, None]
    where = y + rows.to(tl.int64)[:, None] * N + outs[None, :]
    tl.store(where, tl.trans(total.to(y.dtype.element_ty)), mask=(rows < M)[:, None] & (outs < N)[None, :])


@triton.jit
def _store_part(
    total, bias, y, partial, locks, tile, part, rows, outs, M, N, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Leave the fp32 sums of one of SPLIT parts of a tile's inputs; whoever comes last adds all and stores y.

    It adds them in their order, so the result does not depend on who that was, and resets the lock.
    """
    size: tl.constexpr = total.shape[0] * total.shape[1]
    inside = tl.arange(0, total.shape[0])[:, None] * total.shape[1] + tl.arange(0, total.shape[1])[None, :]
    mine = partial + tile.to(tl.int64) * SPLIT * size + inside
    tl.store(mine + part * size, total, cache_modifier=".cg")
    tl.debug_barrier()  # every thread's sums are written before one thread says so
    done = tl.atomic_add(locks + tile, 1, sem="acq_rel")
    if done == SPLIT - 1:
        tl.debug_barrier()
        whole = tl.load(mine, cache_modifier=".cg")
        for other in tl.static_range(1, SPLIT):
            whole += tl.load(mine + other * size, cache_modifier=".cg")
        _store(whole, bias, y, rows, outs, M, N, HAS_BIAS)
        tl.store(locks + tile, 0)


@triton.jit(do_not_specialize=["M", "CHUNKS"])
def ways_kernel(
    x,  # [M, K] bf16 or fp16, K = 128 CHUNKS
    words,  # [CHUNKS, N, 32] int16, the layout of w4a16_layout.shuffle
    pairs,  # [groups, PADDED / 2] int32, the layout of w4a16_layout.pair_steps
    bias,  # [N], or anything without HAS_BIAS
    y,  # [M, N]
    partial,  # fp32 [tiles, SPLIT, BLOCK_N, BLOCK_M]: sums of parts of the inputs
    locks,  # int32 [tiles], zero before and after: how many parts of a tile are done
    M,
    N,
    PADDED,  # N rounded up to a multiple of 128
    CHUNKS,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,  # 8 or 16, at least M
    BLOCK_N: tl.constexpr,
    WAYS: tl.constexpr,  # chunks at a time, one per warp
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # no tile reaches past the last output, no step past the last chunk
    HAS_BIAS: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
    LATE: tl.constexpr,  # whether the next kernel may start only once the loop is done
    STEP_TYPE: tl.constexpr,
    OPERANDS: tl.constexpr,  # type of the products' factors: x's own, or fp32 where Triton's interpreter runs
):
    """y = x W^T + bias for one tile of outputs and all rows, or for one of SPLIT parts of its inputs."""
    SPAN: tl.constexpr = min(GROUP, CHUNK)  # inputs per product: a chunk, or a group within it
    BATCH: tl.constexpr = WAYS * (CHUNK // SPAN)
    tile, part = tl.program_id(0), tl.program_id(1)
    outs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    way, batch = tl.arange(0, WAYS), tl.arange(0, BATCH)
    steps = tl.cdiv(CHUNKS, WAYS)
    first = steps * part // SPLIT * WAYS
    last = steps * (part + 1) // SPLIT * WAYS
    groups = tl.cdiv(CHUNKS * CHUNK, GROUP)
    if PDL:
        ahead = first * CHUNK // GROUP
        _ask_ahead(
            words, pairs, first, tl.minimum(last, CHUNKS), ahead, groups, tile * BLOCK_N, N, PADDED, BLOCK_N, 2 * WAYS
        )
        gdc_wait()
        if not LATE:
            gdc_launch_dependents()
    words_at = words + (first + way).to(tl.int64)[:, None, None] * N * 32 + outs[None, :, None] * 32
    words_at += tl.arange(0, 32)[None, None, :]
    x_at = x + rows[None, :, None] * (CHUNKS * CHUNK) + (first * CHUNK + batch * SPAN)[:, None, None]
    x_at += tl.arange(0, SPAN)[None, None, :]
    half = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    acc = tl.zeros((BATCH, BLOCK_N, BLOCK_M), dtype=tl.float32)
    for chunk in tl.range(first, last, WAYS, num_stages=STAGES):
        group = (chunk * CHUNK + batch * SPAN) // GROUP
        if EVEN:
            packed = tl.load(words_at)
            activations = tl.load(x_at, mask=(rows < M)[None, :, None], other=0.0)
            sizes = tl.load(pairs + group[:, None] * (PADDED // 2) + half[None, :])
        else:
            inside = chunk * CHUNK + batch * SPAN < CHUNKS * CHUNK
            packed = tl.load(words_at, mask=(chunk + way < CHUNKS)[:, None, None] & (outs < N)[None, :, None], other=0)
            activations = tl.load(x_at, mask=(rows < M)[None, :, None] & inside[:, None, None], other=0.0)
            sizes = tl.load(pairs + group[:, None] * (PADDED // 2) + half[None, :], mask=inside[:, None], other=0)
        words_at += WAYS * N * 32
        x_at += WAYS * CHUNK
        c0, c1, c2, c3 = _slices(packed, OPERANDS, PTX)
        codes = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # [WAYS, BLOCK_N, 32, a, b]: slice 2a + b
        if SPAN == 128:
            codes = tl.reshape(tl.permute(codes, (0, 1, 3, 4, 2)), (BATCH, BLOCK_N, SPAN))
        elif SPAN == 64:
            codes = tl.reshape(tl.permute(codes, (0, 3, 1, 4, 2)), (BATCH, BLOCK_N, SPAN))
        else:
            codes = tl.reshape(tl.permute(codes, (0, 3, 4, 1, 2)), (BATCH, BLOCK_N, SPAN))
        sums = tl.dot(codes, tl.permute(activations.to(OPERANDS), (0, 2, 1)))
        acc += sums * _steps(sizes, STEP_TYPE)[:, :, None]
    if PDL and LATE:
        gdc_launch_dependents()
    total = tl.sum(acc, 0)
    if SPLIT == 1:
        _store(total, bias, y, rows, outs, M, N, HAS_BIAS)
    else:
        _store_part(total, bias, y, partial, locks, tile, part, rows, outs, M, N, SPLIT, HAS_BIAS)


@triton.jit(do_not_specialize=["M", "CHUNKS", "WHOLE"])
def tile_kernel(
    x,  # x to locks: as in ways_kernel
    words,
    pairs,
    bias,
    y,
    partial,
    locks,
    M,
    N,
    PADDED,
    CHUNKS,
    WHOLE,  # tiles whose inputs are not split: they go first; the rest, less than one wave of programs, is split
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    ROUND: tl.constexpr,  # needs GROUP >= 128 and scales in x's type
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
    LATE: tl.constexpr,
    STEP_TYPE: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """y = x W^T + bias for one tile, or for one of SPLIT parts of its inputs."""
    SPAN: tl.constexpr = 64 if ROUND else min(GROUP, CHUNK)
    pid = tl.program_id(0)
    tile, part = pid, 0
    first, last = CHUNKS * 0, CHUNKS
    if SPLIT > 1 and pid >= WHOLE:
        tile, part = WHOLE + (pid - WHOLE) // SPLIT, (pid - WHOLE) % SPLIT
        first, last = CHUNKS * part // SPLIT, CHUNKS * (part + 1) // SPLIT
    m_tiles = tl.cdiv(M, BLOCK_M)
    tile_m, tile_n = tile % m_tiles, tile // m_tiles
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    group = first * CHUNK // GROUP
    groups = tl.cdiv(CHUNKS * CHUNK, GROUP)
    if PDL:
        _ask_ahead(words, pairs, first, last, group, groups, tile_n * BLOCK_N, N, PADDED, BLOCK_N, 2)
        gdc_wait()
        if not LATE:
            gdc_launch_dependents()
    words_at = words + first.to(tl.int64) * N * 32 + outs[:, None] * 32 + tl.arange(0, 32)[None, :]
    x_at = x + rows.to(tl.int64)[:, None] * (CHUNKS * CHUNK) + first * CHUNK + tl.arange(0, SPAN)[None, :]
    half = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for chunk in tl.range(first, last, num_stages=STAGES):
        packed = tl.load(words_at) if EVEN_N else tl.load(words_at, mask=(outs < N)[:, None], other=0)
        words_at += N * 32
        if ROUND:
            sizes = tl.load(pairs + (chunk * CHUNK // GROUP) * (PADDED // 2) + half)
            steps = tl.reshape(_steps(sizes[None, :], STEP_TYPE), (BLOCK_N,))
            x0 = tl.load(x_at) if EVEN_M else tl.load(x_at, mask=(rows < M)[:, None], other=0.0)
            x1 = tl.load(x_at + 64) if EVEN_M else tl.load(x_at + 64, mask=(rows < M)[:, None], other=0.0)
            weight = _half(packed, steps, x.dtype.element_ty, False, PTX).to(OPERANDS)
            acc = tl.dot(weight, tl.trans(x0.to(OPERANDS)), acc)
            weight = _half(packed, steps, x.dtype.element_ty, True, PTX).to(OPERANDS)  # while the first product runs
            if PTX:
                acc = _settled(acc)
            acc = tl.dot(weight, tl.trans(x1.to(OPERANDS)), acc)
            if PTX:
                acc = _settled(acc)
        else:
            c0, c1, c2, c3 = _slices(packed, OPERANDS, PTX)
            for span in tl.static_range(CHUNK // SPAN):
                at = x_at + span * SPAN
                activations = tl.load(at) if EVEN_M else tl.load(at, mask=(rows < M)[:, None], other=0.0)
                sizes = tl.load(pairs + ((chunk * CHUNK + span * SPAN) // GROUP) * (PADDED // 2) + half)
                if SPAN == 128:
                    codes = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # [BLOCK_N, 32, a, b]: slice 2a + b
                    codes = tl.reshape(tl.permute(codes, (0, 2, 3, 1)), (BLOCK_N, SPAN))
                elif SPAN == 64:
                    codes = tl.join(c0, c1) if span == 0 else tl.join(c2, c3)
                    codes = tl.reshape(tl.permute(codes, (0, 2, 1)), (BLOCK_N, SPAN))
                else:
                    codes = c0 if span == 0 else c1 if span == 1 else c2 if span == 2 else c3
                sums = tl.dot(codes, tl.trans(activations.to(OPERANDS)))
                acc += sums * tl.reshape(_steps(sizes[None, :], STEP_TYPE), (BLOCK_N,))[:, None]
        x_at += CHUNK
    if PDL and LATE:
        gdc_launch_dependents()
    if SPLIT > 1 and pid >= WHOLE:
        _store_part(acc, bias, y, partial, locks, tile - WHOLE, part, rows, outs, M, N, SPLIT, HAS_BIAS)
    else:
        _store(acc, bias, y, rows, outs, M, N, HAS_BIAS)


@triton.jit
def dequantise_kernel(
    words,  # [CHUNKS, N, 32] int16
    pairs,  # [groups, PADDED / 2] int32
    weight,  # [STOP - START, K]
    STOP,  # one past the last output to dequantise
    N,
    PADDED,
    K,
    START,  # the first output to dequantise, a multiple of 128
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PTX: tl.constexpr,
    STEP_TYPE: tl.constexpr,
):
    """weight = codes * scales, rounded once; one program per chunk and BLOCK_N outputs."""
    chunk = tl.program_id(0)
    block = START + tl.program_id(1) * BLOCK_N
    outs = block + tl.arange(0, BLOCK_N)
    inside = (outs < STOP)[:, None]
    lane = tl.arange(0, 32)
    packed = tl.load(words + chunk.to(tl.int64) * N * 32 + outs[:, None] * 32 + lane[None, :], mask=inside, other=0)
    c0, c1, c2, c3 = _slices(packed, weight.dtype.element_ty if PTX else tl.float32, PTX)
    codes = tl.permute(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (0, 2, 3, 1))  # [BLOCK_N, a, b, 32]: slice 2a + b
    half = block // 2 + tl.arange(0, BLOCK_N // 2)
    first = pairs + half
    s0 = _steps(tl.load(first + chunk * CHUNK // GROUP * (PADDED // 2))[None, :], STEP_TYPE)
    s1 = _steps(tl.load(first + (chunk * CHUNK + 32) // GROUP * (PADDED // 2))[None, :], STEP_TYPE)
    s2 = _steps(tl.load(first + (chunk * CHUNK + 64) // GROUP * (PADDED // 2))[None, :], STEP_TYPE)
    s3 = _steps(tl.load(first + (chunk * CHUNK + 96) // GROUP * (PADDED // 2))[None, :], STEP_TYPE)
    steps = tl.reshape(tl.join(tl.join(s0, s2), tl.join(s1, s3)), (BLOCK_N, 2, 2, 1))
    values = tl.reshape((codes.to(tl.float32) * steps).to(weight.dtype.element_ty), (BLOCK_N, CHUNK))
    to = weight + (outs - START).to(tl.int64)[:, None] * K + chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
    tl.store(to, values, mask=inside)
