"""y = x W^T with 4-bit weights and at most eight rows of bf16, made for the dependent launches of a decoding step.

A program computes 16 outputs over all inputs. It issues the loads of all its words and step sizes at once, *before* it
waits for the kernel that makes x: while the small kernels between two products run, the memory keeps reading.

The products run on the tensor cores without any exchange between threads. A thread that loads 16 consecutive bytes of
a chunk's row (`w4a16_layout`) holds, after unpacking, pairs of weights whose inputs are 32 i + 8 t + 2 q and the next
one (i the nibble, t the thread's place among the four that share a row, q = 0..3). `mma.m16n8k16` sums over its 16
inputs in any order, as long as both factors agree; and its thread for output g and pair t is exactly the thread that
loaded row g's part t. So the words go in as they were loaded, x is read at the same 32 i + 8 t, and what comes out is
y[row 2 t and 2 t + 1] of output g: the tile [8 outputs, 8 rows], laid out as the tile of words [8 outputs, 8 x int64].
"""

import torch
import triton
import triton.language as tl

from grace.kernels.decode_step import launch_options

ROWS = 8  # rows of x at most: the columns of one mma
OUTS = 16  # outputs per program: the rows of one mma
WARPS = 8


def _mma_of_a_chunk() -> str:
    """PTX: the sums of 16 outputs and 8 rows over one chunk of 128 inputs.

    $0..$3: fp32 sums, of the first and the second eight outputs; $4..$5, $6..$7: their words, 64 bits each;
    $8..$15: x in four slices of 32 inputs, two of 64 bits each.
    """
    lines = [".reg .b32 w<8>, x<16>, a<4>, t, one, zero;", ".reg .f32 s<4>;"]
    lines += [f"mov.b64 {{w{2 * i}, w{2 * i + 1}}}, ${4 + i};" for i in range(4)]
    lines += [f"mov.b64 {{x{2 * i}, x{2 * i + 1}}}, ${8 + i};" for i in range(8)]
    lines += ["mov.b32 one, 0x3f803f80;", "mov.b32 zero, 0xc308c308;"]  # 1 and -136 in both halves
    lines += [f"mov.f32 {sum}, 0f00000000;" for sum in ("$0", "$1", "$2", "$3", "s0", "s1", "s2", "s3")]
    for nibble in range(4):
        for half in range(2):
            sums = ("{$0, $1, $2, $3}", "{s0, s1, s2, s3}")[half]  # two chains, so that one need not wait for the other
            for place, word in enumerate((2 * half, 4 + 2 * half, 2 * half + 1, 4 + 2 * half + 1)):
                source = f"w{word}"
                if nibble:
                    lines.append(f"shr.b32 t, w{word}, {4 * nibble};")
                    source = "t"
                lines.append(f"lop3.b32 a{place}, {source}, 0x000f000f, 0x43004300, 0xea;")  # 128 + nibble
                lines.append(f"fma.rn.bf16x2 a{place}, a{place}, one, zero;")  # the code
            x = f"{{x{4 * nibble + 2 * half}, x{4 * nibble + 2 * half + 1}}}"
            lines.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {sums}, {{a0, a1, a2, a3}}, {x}, {sums};"
            )
    lines += [f"add.f32 ${i}, ${i}, s{i};" for i in range(4)]
    return "{\n" + "\n".join(lines) + "\n}"


_MMA = tl.constexpr(_mma_of_a_chunk())
_REGISTERS = tl.constexpr("=f,=f,=f,=f,l,l,l,l,l,l,l,l,l,l,l,l")


@triton.jit
def _write(total, bias, y, outs, end, M, HAS_BIAS: tl.constexpr):
    """Sums [8 outputs, 8 rows] plus the bias to y[rows, end]."""
    row = tl.arange(0, 8)
    if HAS_BIAS:
        total += tl.load(bias + outs, mask=outs < end, other=0.0).to(tl.float32)[:, None]
    to = y + row.to(tl.int64)[None, :] * end + outs[:, None]
    tl.store(to, total.to(y.dtype.element_ty), mask=(row < M)[None, :] & (outs < end)[:, None])


@triton.jit
def _read(at, ok, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(at, mask=ok, other=0, eviction_policy="evict_first")
    else:
        return tl.load(at, eviction_policy="evict_first")


@triton.jit
def _read_piece(
    words, scales, first, second, deep, part, piece: tl.constexpr,
    N: tl.constexpr, CHUNKS: tl.constexpr, GROUP: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Words [WARPS * 8, 8] and step sizes [WARPS * 8] of both eight outputs, for WARPS chunks from piece * WARPS on."""
    masked: tl.constexpr = N % 16 != 0 or (piece + 1) * WARPS > CHUNKS
    ok = piece * WARPS + deep < CHUNKS
    from_words = words + piece * WARPS * N * 8 + (deep * (N * 8))[:, None] + part[None, :]
    a = _read(from_words + (first * 8)[:, None], (ok & (first < N))[:, None], masked)
    b = _read(from_words + (second * 8)[:, None], (ok & (second < N))[:, None], masked)
    from_scales = scales + (piece * WARPS + deep) // (GROUP // 128) * N
    return (
        a,
        b,
        _read(from_scales + first, ok & (first < N), masked),
        _read(from_scales + second, ok & (second < N), masked),
    )


@triton.jit
def few_rows_kernel(
    x,  # int64 [M, K / 4]: four bf16 each
    words,  # int64 [CHUNKS, N, 8]: the layout of w4a16_layout.shuffle, four words each
    scales,  # bf16 [groups, N]
    bias,  # [N], or anything without HAS_BIAS
    y,  # bf16 [M, N], or [M, N / 2] with GATE
    M,
    N: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,  # a multiple of 128
    WARPS: tl.constexpr,  # chunks side by side, one for each warp
    AHEAD: tl.constexpr,  # pieces of WARPS chunks that are on their way at a time
    GATE: tl.constexpr,  # the first half of the outputs gates the second: y = silu(first) * second
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """16 outputs of every row: the tile of words is [WARPS * 8, 8], eight outputs of one chunk after those of another.

    The shape is a constant, so that every address is one register and a constant: a program must get its loads out
    within few instructions.
    """
    pieces: tl.constexpr = (CHUNKS + WARPS - 1) // WARPS
    line = tl.arange(0, WARPS * 8)
    deep, out = line // 8, line % 8
    part = tl.arange(0, 8)
    per_program: tl.constexpr = 8 if GATE else 16
    first = tl.program_id(0) * per_program + out
    second = first + (N // 2 if GATE else 8)
    held = ()
    for piece in tl.static_range(min(AHEAD, pieces)):
        held += (_read_piece(words, scales, first, second, deep, part, piece, N, CHUNKS, GROUP, WARPS),)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc_a = tl.zeros((WARPS * 8, 8), tl.float32)
    acc_b = tl.zeros((WARPS * 8, 8), tl.float32)
    from_x = x + (tl.minimum(out, M - 1) * (CHUNKS * 32))[:, None] + part[None, :]
    for piece in tl.static_range(pieces):
        a, b, step_a, step_b = held[piece]
        if (piece + 1) * WARPS > CHUNKS:  # read again what is multiplied by no step
            at = from_x + (tl.minimum(piece * WARPS + deep, CHUNKS - 1) * 32)[:, None]
        else:
            at = from_x + piece * WARPS * 32 + (deep * 32)[:, None]
        x0 = tl.load(at)
        x1 = tl.load(at + 8)
        x2 = tl.load(at + 16)
        x3 = tl.load(at + 24)
        sums_a, sums_b = tl.inline_asm_elementwise(
            _MMA,
            _REGISTERS,
            [a, b, x0, x1, x2, x3],
            dtype=(tl.float32, tl.float32),
            is_pure=False,  # all threads of a warp multiply together: it must stay where it is
            pack=2,
        )
        acc_a += sums_a * step_a.to(tl.float32)[:, None]
        acc_b += sums_b * step_b.to(tl.float32)[:, None]
        if piece + AHEAD < pieces:
            held += (_read_piece(words, scales, first, second, deep, part, piece + AHEAD, N, CHUNKS, GROUP, WARPS),)
    total_a = tl.sum(tl.reshape(acc_a, (WARPS, 8, 8)), 0)
    total_b = tl.sum(tl.reshape(acc_b, (WARPS, 8, 8)), 0)
    outs = tl.program_id(0) * per_program + tl.arange(0, 8)
    if GATE:
        half: tl.constexpr = N // 2
        dtype: tl.constexpr = y.dtype.element_ty
        if HAS_BIAS:
            total_a += tl.load(bias + outs, mask=outs < half, other=0.0).to(tl.float32)[:, None]
            total_b += tl.load(bias + half + outs, mask=outs < half, other=0.0).to(tl.float32)[:, None]
        gate = total_a.to(dtype).to(tl.float32)
        gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        _write(gate * total_b.to(dtype).to(tl.float32), bias, y, outs, half, M, False)
    else:
        _write(total_a, bias, y, outs, N, M, HAS_BIAS)
        _write(total_b, bias, y, outs + 8, N, M, HAS_BIAS)


def serves(rows: int, inputs: int, group_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `few_rows` takes such a product; it has no counterpart in Triton's interpreter."""
    return (
        device.type == "cuda"
        and 0 < rows <= ROWS
        and inputs % 128 == 0
        and group_size % 128 == 0
        and dtype == torch.bfloat16
    )


def few_rows(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    gate: bool = False,
    ahead: int | None = None,
    registers: int | None = None,
) -> torch.Tensor:
    """x [at most 8, in] bf16 times the weight that `w4a16.pack` made: [rows, out].

    gate: the outputs are gate and up, [2 n]; returns silu(gate) * up, [rows, n], rounded as separate modules round.
    """
    chunks, outs, _ = words.shape
    y = x.new_empty(len(x), outs // 2 if gate else outs)
    pieces = triton.cdiv(chunks, WARPS)
    ahead = ahead or (4 if pieces <= 4 else 6)
    registers = registers or (64 if ahead <= 4 else 96)
    few_rows_kernel[(triton.cdiv(outs, OUTS),)](
        x.view(torch.int64), words.view(torch.int64), scales, scales if bias is None else bias, y,
        len(x), outs, chunks, GROUP=group_size, WARPS=WARPS, AHEAD=ahead, GATE=gate, HAS_BIAS=bias is not None,
        num_warps=WARPS, maxnreg=registers, **launch_options(x.device),
    )  # fmt: skip
    return y
