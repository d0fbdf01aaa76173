"""Attention of `decode_layers`: each program takes one part of a key-value head's slots, and everyone joins the parts."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from grace.kernels.decode_ring import SLOTS
from grace.kernels.gluon_names import next_stage, view


@gluon.jit
def fresh(values, at, N: gl.constexpr):
    """What other programs have just written, fp32."""
    return gl.load(values + at, mask=at < N, other=0.0, cache_modifier=".cg").to(gl.float32)


@gluon.jit
def _turned(heads, d, gain, cos, sin, EPS, D: gl.constexpr, NORMED: gl.constexpr, DTYPE: gl.constexpr):
    """Fresh heads [N, D] at pointers [N, 1], normed (NORMED) and rotated, fp32 exact in DTYPE; d: 0 to D - 1, [1, D]."""
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
def attend(
    qkv, keys, values, gains, cos, sin, ring, stage, phase, h, part, now, begin, stop, part_sum, part_top, SCALE, EPS,
    KV: gl.constexpr, G: gl.constexpr, D: gl.constexpr, NORMED: gl.constexpr, SPLIT: gl.constexpr,
    STAGES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Attention of a head's G new queries to one part of its slots; the last part keeps the new key and value as well.

    The queries fill the tensor core's 16 rows: those past G repeat the last. Warps share out a stage's slots for the
    logits, and D for the sums of values. Leaves the part's mean of values [G, D], and log2 of the sum of its weights
    [G], from which `joined` makes the whole.
    """
    words_s, _pairs_s, full, empty = ring
    COUNT: gl.constexpr = words_s.shape[1] * 512 // D
    T: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    M: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 4], [16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, M, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, M, 2)
    d = gl.arange(0, D, gl.SliceLayout(0, T))[None, :]
    row = gl.arange(0, 16, gl.SliceLayout(1, T))[:, None]
    new_key, new_value = qkv + (KV * G + h) * D, qkv + (KV * G + KV + h) * D
    out_d = gl.arange(0, D, gl.SliceLayout(0, M))
    value = fresh(new_value, out_d, D)
    q = _turned(qkv + (h * G + gl.minimum(row, G - 1)) * D, d, gains[0], cos, sin, EPS, D, NORMED, DTYPE)
    key = _turned(new_key + row * 0, d, gains[1], cos, sin, EPS, D, NORMED, DTYPE)  # [16, D], all rows alike
    new = gl.convert_layout(gl.sum(q * key, 1), gl.SliceLayout(1, M)) * SCALE
    if part == SPLIT - 1:
        gl.store(keys + now * D + d + row * 0, key.to(DTYPE), mask=row + d * 0 == 0)
        gl.store(values + now * D + out_d, value.to(DTYPE))
    else:
        new = new * 0.0 - 1e30
    q = gl.convert_layout(q.to(DTYPE), LEFT)
    slots = gl.arange(0, COUNT, gl.SliceLayout(0, M))[None, :]
    top = gl.full((16,), -1e30, gl.float32, gl.SliceLayout(1, M))  # finite, so that differences stay numbers
    weight = gl.zeros((16, COUNT), gl.float32, M)
    acc = gl.zeros((16, D), gl.float32, M)
    for at in range(begin, stop, COUNT):
        mbarrier.wait(full.index(stage), phase)
        k = view(words_s.index(stage), DTYPE, [COUNT, D], SLOTS).permute((1, 0)).load(RIGHT)
        mbarrier.arrive(empty.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
        logits = mma_v2(q, k, gl.zeros((16, COUNT), gl.float32, M)) * SCALE
        logits = gl.where(at + slots < stop, logits, -1e30)
        peak = gl.maximum(top, gl.max(logits, 1))
        p, fade = gl.exp2(logits - peak[:, None]), gl.exp2(top - peak)[:, None]
        weight = weight * fade + p
        mbarrier.wait(full.index(stage), phase)
        v = view(words_s.index(stage), DTYPE, [COUNT, D], SLOTS).load(RIGHT)
        mbarrier.arrive(empty.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
        acc = mma_v2(gl.convert_layout(p.to(DTYPE), LEFT), v, acc * fade)
        top = peak
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
