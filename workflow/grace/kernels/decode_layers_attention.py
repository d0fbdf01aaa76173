"""Attention of `decode_layers`: each program takes one part of a key-value head's slots, and everyone joins the parts.

The codes of an 8-bit cache become fp16, which holds them exactly: c + 128 under the exponent of 1024 is 1152 + c. The
tensor core wants neighbours along the inputs in one register. Of keys these are neighbours in memory, four codes to two
registers; of values they are two slots, so two words of four codes become four registers. Scales go to logits and
weights, as in `decode_attention`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from grace.kernels.decode_ring import PLAIN, SLOTS
from grace.kernels.gluon_names import next_stage, view

_KEY_CODES = gl.constexpr(
    "{ .reg .b32 u; .reg .b32 zero; mov.b32 zero, 0x64806480; xor.b32 u, $2, 0x80808080;"
    "prmt.b32 $0, u, 0x64646464, 0x4140; sub.rn.f16x2 $0, $0, zero;"
    "prmt.b32 $1, u, 0x64646464, 0x4342; sub.rn.f16x2 $1, $1, zero; }"
)
_VALUE_CODES = gl.constexpr(
    "{ .reg .b32 low; .reg .b32 high; .reg .b32 zero; mov.b32 zero, 0x64806480;"
    "prmt.b32 low, $4, $5, 0x5140; prmt.b32 high, $4, $5, 0x7362;"
    "xor.b32 low, low, 0x80808080; xor.b32 high, high, 0x80808080;"
    "prmt.b32 $0, low, 0x64646464, 0x4140; sub.rn.f16x2 $0, $0, zero;"
    "prmt.b32 $1, low, 0x64646464, 0x4342; sub.rn.f16x2 $1, $1, zero;"
    "prmt.b32 $2, high, 0x64646464, 0x4140; sub.rn.f16x2 $2, $2, zero;"
    "prmt.b32 $3, high, 0x64646464, 0x4342; sub.rn.f16x2 $3, $3, zero; }"
)


@gluon.jit
def fresh(values, at, N: gl.constexpr):
    """What other programs have just written, fp32."""
    return gl.load(values + at, mask=at < N, other=0.0, cache_modifier=".cg").to(gl.float32)


@gluon.jit
def powers(top):
    """The power of two that brings numbers of which `top` is the largest to 2^12, for fp16, and its reciprocal."""
    exponent = gl.minimum(gl.maximum(top.to(gl.int32, bitcast=True) >> 23, 13), 253)
    return ((266 - exponent) << 23).to(gl.float32, bitcast=True), ((exponent - 12) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _turned(heads, d, gain, cos, sin, EPS, D: gl.constexpr, NORMED: gl.constexpr, DTYPE: gl.constexpr):
    """Fresh heads [N, D] at pointers [N, 1], normed (NORMED) and rotated, fp32 exact in DTYPE;
    d: 0 to D - 1, [1, D].
    """
    far = (d + D // 2) % D
    turn = gl.load(cos + d).to(gl.float32)
    lean = gl.load(sin + d).to(gl.float32) * gl.where(d < D // 2, -1.0, 1.0)
    own = gl.load(heads + d, cache_modifier=".cg").to(gl.float32)
    away = gl.load(heads + far, cache_modifier=".cg").to(gl.float32)
    if NORMED:
        own_gain, away_gain = gl.load(gain + d).to(gl.float32), gl.load(gain + far).to(gl.float32)
        scale = gl.expand_dims(gl.rsqrt(gl.sum(own * own, 1) / D + EPS), 1)
        own = ((own * scale).to(DTYPE).to(gl.float32) * own_gain).to(DTYPE).to(gl.float32)
        away = ((away * scale).to(DTYPE).to(gl.float32) * away_gain).to(DTYPE).to(gl.float32)
    return (own * turn + away * lean).to(DTYPE).to(gl.float32)


@gluon.jit
def _keep(cache, steps, row, d, x):
    """Write the first of the vectors x [N, D], fp32, as `grace.infer.cache.round_to_int8` has it, and its scale."""
    step = gl.expand_dims(gl.max(gl.abs(x), 1) / 127.0, 1)
    codes = gl.floor(x / gl.maximum(step, 1e-30) + 0.5).to(gl.int8)
    gl.store(cache + d + row * 0, codes, mask=row + d * 0 == 0)
    gl.store(steps + row * 0, step, mask=row == 0)


@gluon.jit
def _key_codes(words, COUNT: gl.constexpr, D: gl.constexpr, RIGHT: gl.constexpr):
    """A stage of keys' codes as the right operand [D, COUNT], in fp16."""
    L: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 16], [0, 32], [32, 0], [64, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        [[8, 0], [16, 0]], [], [COUNT, D // 2],
    )  # fmt: skip
    codes = view(words, gl.int16, [COUNT, D // 2], SLOTS).load(L)
    low, high = gl.inline_asm_elementwise(
        _KEY_CODES, "=&r,=&r,r", [codes], dtype=(gl.float16, gl.float16), is_pure=True, pack=2
    )
    k = gl.join(low, high).reshape((COUNT, D // 4, 2, 2)).permute((0, 1, 3, 2)).reshape((COUNT, D))
    return gl.convert_layout(k.permute((1, 0)), RIGHT, assert_trivial=True)


@gluon.jit
def _value_codes(words, COUNT: gl.constexpr, D: gl.constexpr, RIGHT: gl.constexpr):
    """A stage of values' codes as the right operand [COUNT, D], in fp16: code j of word w is its column w + j D / 4."""
    L: gl.constexpr = gl.DistributedLinearLayout(
        [[1, 0], [8, 0], [16, 0], [32, 0], [64, 0]], [[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]],
        [[0, 8], [0, 16]], [], [COUNT, D // 4],
    )  # fmt: skip
    codes = view(words, gl.int32, [COUNT, D // 4], gl.SwizzledSharedLayout(4, 1, 8, [1, 0])).load(L)
    codes = codes.reshape((COUNT // 2, 2, D // 4)).permute((0, 2, 1))
    n0, n1, n2, n3 = gl.inline_asm_elementwise(
        _VALUE_CODES, "=&r,=&r,=&r,=&r,r,r", [codes],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=2,
    )  # fmt: skip
    v = gl.join(gl.join(n0, n2), gl.join(n1, n3)).permute((0, 2, 3, 4, 1)).reshape((COUNT, D))
    return gl.convert_layout(v, RIGHT, assert_trivial=True)


@gluon.jit
def _larger(a, b, c, d):
    return gl.maximum(a, c), gl.maximum(b, d)


@gluon.jit
def attend(
    qkv, keys, values, steps, gains, cos, sin, ring, stage, phase, h, part, now, begin, stop, part_sum, part_top, SCALE,
    EPS, KV: gl.constexpr, G: gl.constexpr, D: gl.constexpr, NORMED: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, DTYPE: gl.constexpr, CODES: gl.constexpr,
):  # fmt: skip
    """Attention of a head's G new queries to one part of its slots; the last part keeps the new key and value as well.

    The queries fill the tensor core's 16 rows: those past G repeat the last. Warps share out a stage's slots for the
    logits, and D for the sums of values. Leaves the part's mean of values [G, D], and log2 of the sum of its weights
    [G], from which `joined` makes the whole.

    With CODES `steps` are the scales of keys and of values. The new token's own are not rounded for itself. Weights
    times scales become fp16 as parts of the largest scale so far, in which the sums of values are counted.
    """
    words_s, pairs_s, full, empty = ring
    COUNT: gl.constexpr = words_s.shape[1] * (1024 if CODES else 512) // D
    T: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    M: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, M, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, M, 2)
    OPERANDS: gl.constexpr = gl.float16 if CODES else DTYPE
    d = gl.arange(0, D, gl.SliceLayout(0, T))[None, :]
    row = gl.arange(0, 16, gl.SliceLayout(1, T))[:, None]
    new_key, new_value = qkv + (KV * G + h) * D, qkv + (KV * G + KV + h) * D
    out_d = gl.arange(0, D, gl.SliceLayout(0, M))
    if CODES:
        out_d = out_d % (D // 4) * 4 + out_d // (D // 4)
    value = fresh(new_value, out_d, D)
    q = _turned(qkv + (h * G + gl.minimum(row, G - 1)) * D, d, gains[0], cos, sin, EPS, D, NORMED, DTYPE)
    key = _turned(new_key + row * 0, d, gains[1], cos, sin, EPS, D, NORMED, DTYPE)  # [16, D], all rows alike
    new = gl.convert_layout(gl.sum(q * key, 1), gl.SliceLayout(1, M)) * SCALE
    if part == SPLIT - 1:
        if CODES:
            _keep(keys + now * D, steps[0] + now, row, d, key)
            _keep(values + now * D, steps[1] + now, row, d, fresh(new_value, d + row * 0, D))
        else:
            gl.store(keys + now * D + d + row * 0, key.to(DTYPE), mask=row + d * 0 == 0)
            gl.store(values + now * D + out_d, value.to(DTYPE))
    else:
        new = new * 0.0 - 1e30
    if CODES:
        bound = gl.full((16,), 1e-30, gl.float32, gl.SliceLayout(1, M))  # the largest scale of values so far
        larger, smaller = powers(gl.max(gl.abs(q), 1))
        scale = gl.expand_dims(gl.convert_layout(smaller, gl.SliceLayout(1, M)), 1) * SCALE
        q = gl.convert_layout((q * gl.expand_dims(larger, 1)).to(gl.float16), gl.DotOperandLayout(0, M, 8))
    else:
        q = gl.convert_layout(q.to(DTYPE), LEFT)
    slots = gl.arange(0, COUNT, gl.SliceLayout(0, M))[None, :]
    top = gl.full((16,), -1e30, gl.float32, gl.SliceLayout(1, M))  # finite, so that differences stay numbers
    weight = gl.zeros((16, COUNT), gl.float32, M)
    acc = gl.zeros((16, D), gl.float32, M)
    for at in range(begin, stop, COUNT):
        mbarrier.wait(full.index(stage), phase)
        if CODES:
            k = _key_codes(words_s.index(stage), COUNT, D, gl.DotOperandLayout(1, M, 8))
            key_step = view(pairs_s.index(stage), gl.float32, [COUNT], PLAIN).load(gl.SliceLayout(0, M))
        else:
            k = view(words_s.index(stage), DTYPE, [COUNT, D], SLOTS).permute((1, 0)).load(RIGHT)
        mbarrier.arrive(empty.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
        if CODES:
            logits = mma_v2(q, k, gl.zeros((16, COUNT), gl.float32, M)) * scale * key_step[None, :]
        else:
            logits = mma_v2(q, k, gl.zeros((16, COUNT), gl.float32, M)) * SCALE
        logits = gl.where(at + slots < stop, logits, -1e30)
        if CODES:  # values' scales are wanted now, for the largest of them
            mbarrier.wait(full.index(stage), phase)
            value_step = view(pairs_s.index(stage), gl.float32, [COUNT], PLAIN).load(gl.SliceLayout(0, M))
            value_step, _ = gl.broadcast(value_step[None, :], logits)
            peak, most = gl.reduce((logits, value_step), 1, _larger)
            peak, most = gl.maximum(top, peak), gl.maximum(bound, most)
        else:
            peak = gl.maximum(top, gl.max(logits, 1))
        p, fade = gl.exp2(logits - peak[:, None]), gl.exp2(top - peak)[:, None]
        weight = weight * fade + p
        if CODES:
            v = _value_codes(words_s.index(stage), COUNT, D, RIGHT)
            p *= value_step * gl.expand_dims(1.0 / most, 1)
            fade *= gl.expand_dims(bound / most, 1)
            bound = most
        else:
            mbarrier.wait(full.index(stage), phase)
            v = view(words_s.index(stage), DTYPE, [COUNT, D], SLOTS).load(RIGHT)
        mbarrier.arrive(empty.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
        acc = mma_v2(gl.convert_layout(p.to(OPERANDS), LEFT), v, acc * fade)
        top = peak
    if CODES:
        acc *= bound[:, None]
    best = gl.maximum(top, new)
    share, own = gl.exp2(top - best), gl.exp2(new - best)
    total = gl.sum(weight, 1) * share + own
    mean = (acc * share[:, None] + own[:, None] * value[None, :]) / total[:, None]
    out_row = gl.arange(0, 16, gl.SliceLayout(1, M))
    to = (part * KV + h) * G + out_row
    places = part_sum + to[:, None] * D + out_d[None, :]
    gl.store(places, mean, mask=out_row[:, None] + out_d[None, :] * 0 < G, cache_modifier=".cg")
    gl.store(part_top + to, best + gl.log2(total), mask=out_row < G, cache_modifier=".cg")
    return stage, phase


@gluon.jit
def joined(
    part_sum, part_top, PAD: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, SPLIT: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """The heads' outputs side by side, fp32 [PAD] exact in DTYPE, zero from HEADS D on.

    A thread takes eight values at a time, all of one head, and so looks up and computes that head's weights once.
    """
    EIGHTS: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    eight = gl.arange(0, PAD // 8, gl.SliceLayout(1, EIGHTS))
    at = (eight * 8)[:, None] + gl.arange(0, 8, gl.SliceLayout(0, EIGHTS))[None, :]
    ok, some = at < HEADS * D, eight * 8 < HEADS * D
    tops = part_top + eight * 8 // D
    best = gl.load(tops, mask=some, other=0.0, cache_modifier=".cg")
    for part in gl.static_range(1, SPLIT):
        best = gl.maximum(best, gl.load(tops + part * HEADS, mask=some, other=0.0, cache_modifier=".cg"))
    total = best * 0.0
    mixed = gl.zeros((PAD // 8, 8), gl.float32, EIGHTS)
    for part in gl.static_range(SPLIT):
        share = gl.exp2(gl.load(tops + part * HEADS, mask=some, other=0.0, cache_modifier=".cg") - best)
        total += share
        sums = gl.load(part_sum + part * HEADS * D + at, mask=ok, other=0.0, cache_modifier=".cg")
        mixed += share[:, None] * sums
    return (mixed / total[:, None]).to(DTYPE).to(gl.float32).reshape((PAD,))
