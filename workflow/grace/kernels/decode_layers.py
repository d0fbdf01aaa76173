"""All decoder layers of one decoding step of one sequence, with INT4 weights, in a single launch (Hopper, in Gluon).

At one sequence a step is the reading of every weight. As a kernel per product, each loses microseconds until its loads
are under way; here nothing stops the reading. One program stays on each multiprocessor through all layers:

`stream`    one warp brings weights, scales and old keys and values, in the order of their use, into a ring of STAGES
            in shared memory. None of them depends on the token, so the ring fills while the others wait.
`_compute`  four warps take them out: norm, q k v, attention, output product, norm, gate and up, down, and so on. What a
            program computes goes through memory to all others; every program holds the residual stream.
`meet`      one warp waits, between two of these phases, until all programs have got there.

A product is dealt out in units of 16 outputs (8 of gate and the same 8 of up), each with all its inputs, so nothing is
summed across programs and the result is the same each time. In a unit the warps take chunks of 128 inputs and add their
sums at the end. Unpacking keeps up with memory only if it costs next to nothing: one LOP3 makes of a pair of nibbles n
the fp16 numbers 1024 + n, or 1024 + 16 n where they lie four bits higher. So activations become fp16 (a power of two
brings the largest to 2^12; only what is less than 2^-22 of it is rounded), those that meet 16 n are divided by 16, and
the product starts from minus what the 1024s and the code's zero (8) will add. Everything is summed in fp32 and rounded
where transformers' modules round.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from grace.kernels.decode_layers_attention import attend, fresh, joined, powers
from grace.kernels.decode_ring import (
    INPUT_NORM,
    K_NORM,
    LINE,
    PLAIN,
    POST_NORM,
    Q_NORM,
    QKV_BIAS,
    address,
    cached,
    make_ring,
    meet,
    own_slots,
    pass_on,
    stream,
)
from grace.kernels.gluon_names import barrier, next_stage, view

WAYS = 16  # chunks of 128 inputs per stage
STAGE_BYTES = WAYS * 16 * 64 + 2 * WAYS * 32  # of words, and of pairs of scales
SHARED_REST = 4096  # bytes of shared memory at most, for barriers and sums across warps
MEETINGS = gl.constexpr(5)  # of all programs, per layer

_NIBBLES = gl.constexpr(
    "{ .reg .b32 high; shr.b32 high, $4, 8;"
    "lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea; lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;"
    "lop3.b32 $2, high, 0x000f000f, 0x64006400, 0xea; lop3.b32 $3, high, 0x00f000f0, 0x64006400, 0xea; }"
)
_ROWS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 1, [1, 0]))
_OPERAND = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [5, 4, 3, 2, 1, 0]))


@gluon.jit
def unpacked(ring, stage, unit, PAIRED: gl.constexpr, LEFT: gl.constexpr):
    """A stage's nibbles as the left operand [WAYS, 16, 128], and its step sizes for `step_sizes`.

    With PAIRED they are gate's and up's words, of which an even unit has the low halves.
    """
    words_s, pairs_s, _full, _empty = ring
    WAYS: gl.constexpr = words_s.shape[1]
    PAIRS: gl.constexpr = gl.DistributedLinearLayout(
        [[4, 0], [8, 0]], [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], [[1, 0], [2, 0]], [], [WAYS, 8]
    )
    packed = words_s.index(stage).load(LEFT)
    low = pairs_s.index(stage).slice(0, WAYS, 0).load(PAIRS)
    if PAIRED:
        side = unit % 2 * 16
        high = pairs_s.index(stage).slice(WAYS, WAYS, 0).load(PAIRS) >> side
        low = low >> side
    else:
        high = low >> 16
    n0, n1, n2, n3 = gl.inline_asm_elementwise(
        _NIBBLES, "=&r,=&r,=&r,=&r,r", [packed],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=2,
    )  # fmt: skip
    left = gl.join(gl.join(n0, n2), gl.join(n1, n3)).permute((0, 1, 3, 4, 2)).reshape((WAYS, 16, 128))
    return gl.convert_layout(left, LEFT, assert_trivial=True), low, high


@gluon.jit
def step_sizes(low, high, SUMS: gl.constexpr, DTYPE: gl.constexpr):
    """Step sizes of outputs 0 to 7 and 8 to 15 in the low 16 bits of int32 [WAYS, 8] each -> fp32 [WAYS, 16, 1]."""
    low = (low & 65535).to(gl.int16).to(DTYPE, bitcast=True).to(gl.float32)
    high = (high & 65535).to(gl.int16).to(DTYPE, bitcast=True).to(gl.float32)
    both = gl.join(low, high).permute((0, 2, 1)).reshape((low.shape[0], 16))
    return gl.expand_dims(gl.convert_layout(both, gl.SliceLayout(2, SUMS), assert_trivial=True), 2)


@gluon.jit
def _product(
    x_s, shift_s, unscale, ring, stage, phase, bias, y, dealt,
    SHAPES: gl.constexpr, WHICH: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """y [OUT] = W x for this program's units; with PAIRED y [OUT / 2] = silu(gate x) * (up x), gate over up in W.

    With BIASED y has `bias` [OUT] added, which is not read otherwise. x stands in x_s and shift_s as `_put` leaves it.
    The tensor core's right operand has eight columns: all are x.
    Returns the next stage, its parity, and the program's first unit of the next product.
    """
    words_s, _pairs_s, full, empty = ring
    OUT: gl.constexpr = SHAPES[WHICH][0]
    CHUNKS: gl.constexpr = SHAPES[WHICH][1]
    PAIRED: gl.constexpr = SHAPES[WHICH][2]
    BIASED: gl.constexpr = SHAPES[WHICH][3]
    WAYS: gl.constexpr = words_s.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 8)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 8)
    X: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 2, 0, 0], [0, 1, 0, 0, 0, 0],
         [4, 0, 0, 0, 0, 0], [8, 0, 0, 0, 0, 0]],
        [[0, 0, 1, 0, 0, 0], [0, 0, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
        [[1, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0]], [], [WAYS, 2, 4, 4, 2, 2],
    )  # fmt: skip
    row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, SUMS)))
    barrier()  # all of x stands; said here, the compiler does not say it in the loop
    for unit in range(dealt, OUT // 16, P):
        if BIASED:  # asked for before the unit's words are waited for
            more = gl.load(bias + unit * 16 + row).to(gl.float32)
        acc = gl.zeros((WAYS, 16, 8), gl.float32, SUMS)
        for step in range((CHUNKS + WAYS - 1) // WAYS):
            mbarrier.wait(full.index(stage), phase)
            left, low, high = unpacked(ring, stage, unit, PAIRED, LEFT)
            right = view(x_s.index(step), gl.float16, [WAYS, 2, 4, 4, 2, 2], _OPERAND).load(X)
            right = right.permute((0, 1, 4, 2, 3, 5)).reshape((WAYS, 128))
            right = gl.expand_dims(gl.convert_layout(right, gl.SliceLayout(2, RIGHT)), 2)
            right, _ = gl.broadcast(right, gl.zeros((WAYS, 128, 8), gl.float16, RIGHT))
            shift = shift_s.index(step).load(gl.SliceLayout(1, gl.SliceLayout(2, SUMS)))
            shift, _ = gl.broadcast(gl.expand_dims(gl.expand_dims(shift, 1), 2), acc)
            sums = mma_v2(left, right, shift)
            sizes, _ = gl.broadcast(step_sizes(low, high, SUMS, DTYPE), sums)
            acc += sums * sizes
            mbarrier.arrive(empty.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
        acc, _ = acc.reshape((WAYS, 16, 4, 2)).split()  # half of the columns, which are all alike
        total = gl.sum(acc, 0) * unscale
        if BIASED:
            total += gl.convert_layout(more, gl.SliceLayout(1, total.type.layout))[:, None]
        if PAIRED:
            total = gated(total, DTYPE)
        out = gl.arange(0, total.shape[0], gl.SliceLayout(1, total.type.layout))[:, None]
        column = gl.arange(0, 4, gl.SliceLayout(0, total.type.layout))[None, :]
        gl.store(y + unit * total.shape[0] + out + column * 0, total.to(DTYPE), mask=out * 0 + column == 0)
    return stage, phase, pass_on(dealt, OUT, P)


@gluon.jit
def gated(total, DTYPE: gl.constexpr):
    """silu(gate) * up of gate over up [16, N], fp32 [8, N]."""
    gate, up = total.reshape((2, 8, total.shape[1])).permute((1, 2, 0)).split()
    gate = gate.to(DTYPE).to(gl.float32)
    return (gate / (1.0 + gl.exp(-gate))).to(DTYPE).to(gl.float32) * up.to(DTYPE).to(gl.float32)


@gluon.jit
def _put(x_s, shift_s, x, top):
    """x [128 C], fp32, its largest `top`: leave it as `_product` takes it, and return what its results are to be scaled
    by.

    Within a chunk, input 64 a + 32 b + 8 t + 2 j + e lies at 64 a + 16 t + 4 j + 2 b + e, so that a thread t of the
    tensor core's right operand reads 16 bytes at a time that two registers in a row take.
    """
    C: gl.constexpr = x.shape[0] // 128
    scale, unscale = powers(top)
    tile = (x * scale).reshape((C, 128))
    odd = (gl.arange(0, 128, gl.SliceLayout(0, tile.type.layout)) // 32 % 2 == 1)[None, :]  # they meet 1024 + 16 n
    tile = (tile * gl.where(odd, 0.0625, 1.0)).to(gl.float16)
    shift = gl.sum(tile.to(gl.float32) * gl.where(odd, -1152.0, -1032.0), 1)  # 1024 + 16 * 8, 1024 + 8
    view(shift_s, gl.float32, [C], PLAIN).store(shift)
    to = view(x_s, gl.float16, [C, 2, 4, 4, 2, 2], _OPERAND).permute((0, 1, 4, 2, 3, 5))
    to.store(tile.reshape((C, 2, 2, 4, 4, 2)))
    return unscale


@gluon.jit
def _sum_and_max(a, b, c, d):
    return a + c, gl.maximum(b, d)


@gluon.jit
def _norm(x, gain, HIDDEN: gl.constexpr, EPS, DTYPE: gl.constexpr):
    """x / rms(x) * gain, fp32 [PAD] exact in DTYPE, and its largest but for rounding."""
    gain = gain.to(gl.float32)
    squares, top = gl.reduce((x * x, gl.abs(x * gain)), 0, _sum_and_max)
    scale = gl.rsqrt(squares / HIDDEN + EPS)
    return ((x * scale).to(DTYPE).to(gl.float32) * gain).to(DTYPE).to(gl.float32), top * scale


@gluon.jit
def met(go, phase):
    """Wait until all programs have finished the last phase; the parity of the next meeting."""
    mbarrier.wait(go, phase)
    return phase ^ 1


@gluon.jit
def _compute(
    table, token, embedding, norm, qkv, o, inner, down, hidden, cos, sin, position, slot, first, part_sum, part_top,
    x_s, shift_s, ring, done, go, LAYERS, LENGTH, SCALE, EPS, SHAPES: gl.constexpr, HIDDEN: gl.constexpr,
    INNER: gl.constexpr, KV: gl.constexpr, G: gl.constexpr, D: gl.constexpr, NORMED: gl.constexpr,
    PADS: gl.constexpr, SPLIT: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr,
    CODES: gl.constexpr,
):  # fmt: skip
    """This program's share of every phase of every layer."""
    L: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    h, part, now, begin, stop = own_slots(slot, first, KV, SPLIT)
    at, at_inner = gl.arange(0, PADS[0], L), gl.arange(0, PADS[2], L)
    place = gl.load(position).to(gl.int32) * D
    dealt = gl.program_id(0)
    stage, phase, meeting = 0, 0, 0
    x = gl.load(embedding + gl.load(token) * HIDDEN + at, mask=at < HIDDEN, other=0.0).to(gl.float32)
    for layer in range(LAYERS):
        here = table + layer * LINE
        gain = gl.load(address(here, INPUT_NORM, DTYPE) + at, mask=at < HIDDEN, other=0.0)
        if layer > 0:
            meeting = met(go, meeting)
            x = (x + fresh(down, at, HIDDEN)).to(DTYPE).to(gl.float32)
        y, top = _norm(x, gain, HIDDEN, EPS, DTYPE)
        unscale = _put(x_s, shift_s, y, top)
        bias = address(here, QKV_BIAS, DTYPE)
        stage, phase, dealt = _product(
            x_s, shift_s, unscale, ring, stage, phase, bias, qkv, dealt, SHAPES, 0, P, STAGES, DTYPE
        )
        mbarrier.arrive(done)
        keys, values, key_steps, value_steps = cached(here, h, LENGTH, D, DTYPE, CODES)
        meeting = met(go, meeting)
        if gl.program_id(0) < KV * SPLIT:
            gains = (address(here, Q_NORM, DTYPE), address(here, K_NORM, DTYPE))
            stage, phase = attend(
                qkv, keys, values, (key_steps, value_steps), gains, cos + place, sin + place, ring, stage, phase, h,
                part, now, begin, stop, part_sum, part_top, SCALE, EPS, KV, G, D, NORMED, SPLIT, STAGES, DTYPE, CODES,
            )  # fmt: skip
        mbarrier.arrive(done)
        gain = gl.load(address(here, POST_NORM, DTYPE) + at, mask=at < HIDDEN, other=0.0)
        meeting = met(go, meeting)
        mixed = joined(part_sum, part_top, PADS[1], KV * G, D, SPLIT, DTYPE)
        unscale = _put(x_s, shift_s, mixed, gl.max(gl.abs(mixed), 0))
        stage, phase, dealt = _product(
            x_s, shift_s, unscale, ring, stage, phase, o, o, dealt, SHAPES, 1, P, STAGES, DTYPE
        )
        mbarrier.arrive(done)
        meeting = met(go, meeting)
        x = (x + fresh(o, at, HIDDEN)).to(DTYPE).to(gl.float32)
        y, top = _norm(x, gain, HIDDEN, EPS, DTYPE)
        unscale = _put(x_s, shift_s, y, top)
        stage, phase, dealt = _product(
            x_s, shift_s, unscale, ring, stage, phase, inner, inner, dealt, SHAPES, 2, P, STAGES, DTYPE
        )
        mbarrier.arrive(done)
        meeting = met(go, meeting)
        active = fresh(inner, at_inner, INNER)
        unscale = _put(x_s, shift_s, active, gl.max(gl.abs(active), 0))
        stage, phase, dealt = _product(
            x_s, shift_s, unscale, ring, stage, phase, down, down, dealt, SHAPES, 3, P, STAGES, DTYPE
        )
        mbarrier.arrive(done)
    gain = gl.load(norm + at, mask=at < HIDDEN, other=0.0)
    met(go, meeting)
    if gl.program_id(0) == 0:
        y, top = _norm((x + fresh(down, at, HIDDEN)).to(DTYPE).to(gl.float32), gain, HIDDEN, EPS, DTYPE)
        gl.store(hidden + at, y.to(DTYPE), mask=at < HIDDEN)


@gluon.jit(do_not_specialize=["LAYERS", "LENGTH"])
def layers_kernel(
    table,  # int64 [LAYERS, LINE]: addresses of each layer's tensors, in the order of `decode_ring.FIELDS`
    token,  # int64 [1]
    embedding,  # [vocab, HIDDEN]
    norm,  # [HIDDEN], of the last norm
    qkv,  # [(G + 2) KV D]; this and the next three: what programs leave for each other
    o,  # [HIDDEN]
    inner,  # [INNER]
    down,  # [HIDDEN]
    hidden,  # [HIDDEN], the result
    cos,  # [positions, D]
    sin,  # [positions, D]
    position,  # int64 [1]
    slot,  # int64 []: where the new key and value go
    first,  # int64 [1]: the first slot that is not padding
    part_sum,  # fp32 [SPLIT, KV G, D]
    part_top,  # fp32 [SPLIT, KV G]
    counter,  # int32 [2], zeros before and after
    LAYERS,
    LENGTH,  # slots of the cache
    SCALE,  # of the logits, times log2 e
    EPS,
    SHAPES: gl.constexpr,  # of qkv, o, gate over up, down: outputs, chunks of inputs, whether paired, and biased
    HIDDEN: gl.constexpr,
    INNER: gl.constexpr,
    KV: gl.constexpr,  # heads of keys and values
    G: gl.constexpr,  # heads of queries for each of them, at most 16
    D: gl.constexpr,  # 64 or 128
    NORMED: gl.constexpr,  # queries and keys, by q_norm and k_norm with EPS
    PADS: gl.constexpr,  # HIDDEN, KV G D and INNER rounded up to powers of two of at least WAYS chunks
    SPLIT: gl.constexpr,  # parts of the slots, KV SPLIT of at most P
    WAYS: gl.constexpr,
    STAGES: gl.constexpr,
    P: gl.constexpr,  # programs, all resident: launch it cooperatively
    CODES: gl.constexpr,  # keys and values are int8 codes with scales, and D is 128
):
    """hidden = the last norm of all layers' output for `token`; its keys and values are put into the cache."""
    DTYPE: gl.constexpr = qkv.dtype.element_ty
    STEPS: gl.constexpr = max(PADS[0], PADS[1], PADS[2]) // (128 * WAYS)
    x_s = gl.allocate_shared_memory(gl.float16, [STEPS, WAYS, 128], _ROWS)
    shift_s = gl.allocate_shared_memory(gl.float32, [STEPS, WAYS], PLAIN)
    ring, done, go = make_ring(WAYS, STAGES)
    gl.warp_specialize(
        [
            (_compute, (
                table, token, embedding, norm, qkv, o, inner, down, hidden, cos, sin, position, slot, first, part_sum,
                part_top, x_s, shift_s, ring, done, go, LAYERS, LENGTH, SCALE, EPS, SHAPES, HIDDEN, INNER, KV, G, D,
                NORMED, PADS, SPLIT, P, STAGES, DTYPE, CODES,
            )),
            (stream, (
                table, slot, first, ring, LAYERS, LENGTH, SHAPES, KV, D, SPLIT, P, STAGES, DTYPE, CODES, 1, STEPS,
            )),
            (meet, (counter, done, go, LAYERS * MEETINGS, P)),
        ],
        [1, 1],  # warps beside the four that compute
        [96 if CODES else 64, 24],  # registers of their threads
    )  # fmt: skip
