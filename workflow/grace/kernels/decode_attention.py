"""Attention of one new token per sequence over a static cache, in 16 bits or in 8, as one Triton kernel.

It rotates (and norms) the new queries and keys, keeps the new key and value in the cache, and attends to the slots in
use alone. Blocks of slots are multiplied by tensor cores, except where a key-value head has one query and a program all
its slots: there every row of a block keeps a softmax of its own, and no value crosses a warp before the end.

An 8-bit cache holds int8 codes and one fp32 scale per token and head: key = code * step. The steps multiply logits
and weights of the softmax instead of keys and values, so codes go into the products as they are. The new token attends
to itself with its exact key and value, later ones see its codes.
"""

import torch
import triton
import triton.language as tl

from grace.kernels.dependent_launch import launch_options, locks, multiprocessors, start_next, wait, waited

LOG2_E = 1.4426950408889634
_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _rotated(values, gain, at, other, cos, sin, EPS, D: tl.constexpr, NORM: tl.constexpr, dtype: tl.constexpr):
    """One head (or a stack of heads) [..., D] at `values`, normed (NORM) and rotated; `other` is `at` half a head on.

    `sin` carries the sign of the half. Returns fp32 values that are exact in `dtype`.
    """
    own = tl.load(values + at).to(tl.float32)
    far = tl.load(values + other).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(own * own, axis=len(own.shape) - 1, keep_dims=True) / D + EPS)
        own = (own * scale).to(dtype).to(tl.float32) * tl.load(gain + at % D).to(tl.float32)
        far = (far * scale).to(dtype).to(tl.float32) * tl.load(gain + other % D).to(tl.float32)
        own = own.to(dtype).to(tl.float32)
        far = far.to(dtype).to(tl.float32)
    return (own * cos + far * sin).to(dtype).to(tl.float32)


@triton.jit
def _keep(cache, steps, slot, d, value, D: tl.constexpr, CODES: tl.constexpr):
    """Write one head's key or value [D] (fp32) into its slot, rounded to codes with a scale if CODES."""
    if CODES:
        step = tl.max(tl.abs(value), 0) / 127.0
        value = tl.floor(value / tl.maximum(step, 1e-30) + 0.5)
        tl.store(steps + slot, step)
    tl.store(cache + slot * D + d, value.to(cache.dtype.element_ty))


@triton.jit
def _new_token(
    mine, h, q_gain, k_gain, d, half, turn, lean, EPS,
    KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The first query of key-value head h, its new key, both rotated, and its new value, each [D] in fp32."""
    q = _rotated(mine + h * G * D, q_gain, d, half, turn, lean, EPS, D, NORM, dtype)
    k = _rotated(mine + (KV * G + h) * D, k_gain, d, half, turn, lean, EPS, D, NORM, dtype)
    return q, k, tl.load(mine + (KV * G + KV + h) * D + d).to(tl.float32)


@triton.jit
def _by_rows(
    mine, h, q_gain, k_gain, d, half, turn, lean, EPS, keys, values, key_steps, value_steps, begin, stop, SCALE,
    KV: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr,
    CODES: tl.constexpr, PDL: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """One query and the slots begin..stop: maximum [1], sum of weights [1] and weighted values [1, D], all fp32.

    Also returns the new token's logit [1] and value [D]. The wait stands in the first pass of the loop: the copies of
    the first blocks go before the loop, and so are under way while the product that makes the query still runs.
    """
    rows = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -1e30, tl.float32)  # finite, so that differences stay numbers
    weight = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, D), tl.float32)
    q = tl.zeros((D,), tl.float32)
    k_new = tl.zeros((D,), tl.float32)
    v_new = tl.zeros((D,), tl.float32)
    for first in tl.range(begin, stop, BLOCK, num_stages=STAGES):
        at = first + rows
        inside = at < stop
        k = tl.load(keys + at[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        v = tl.load(values + at[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        if first == begin:
            q, k_new, v_new = _new_token(
                mine + waited(PDL), h, q_gain, k_gain, d, half, turn, lean, EPS, KV, 1, D, NORM, dtype
            )
        logits = tl.sum(k.to(tl.float32) * q[None, :], 1) * SCALE
        if CODES:
            logits *= tl.load(key_steps + at, mask=inside, other=0.0)
        logits = tl.where(inside, logits, -1e30)
        peak = tl.maximum(top, logits)
        p = tl.exp2(logits - peak)
        fade = tl.exp2(top - peak)
        weight = weight * fade + p
        if CODES:
            p *= tl.load(value_steps + at, mask=inside, other=0.0)
        acc = acc * fade[:, None] + p[:, None] * v.to(tl.float32)
        top = peak
    if begin >= stop:
        q, k_new, v_new = _new_token(
            mine + waited(PDL), h, q_gain, k_gain, d, half, turn, lean, EPS, KV, 1, D, NORM, dtype
        )
    best = tl.max(top, 0, keep_dims=True)
    share = tl.exp2(top - best)
    weight = tl.sum(weight * share, 0, keep_dims=True)
    acc = tl.sum(acc * share[:, None], 0, keep_dims=True)
    return best, weight, acc, tl.sum(q * k_new, 0, keep_dims=True) * SCALE, k_new, v_new


@triton.jit
def _by_blocks(
    q, keys, values, key_steps, value_steps, begin, stop, d, SCALE,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, CODES: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """Queries [ROWS, D] and the slots begin..stop: as `_by_rows`, for ROWS queries."""
    ROWS: tl.constexpr = q.shape[0]
    top = tl.full((ROWS,), -1e30, tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    q = q.to(OPERANDS)
    for first in tl.range(begin, stop, BLOCK, num_stages=STAGES):
        at = first + tl.arange(0, BLOCK)
        inside = at < stop
        k = tl.load(keys + at[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        v = tl.load(values + at[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k.to(OPERANDS)), input_precision="ieee") * SCALE
        if CODES:
            logits *= tl.load(key_steps + at, mask=inside, other=0.0)[None, :]
        logits = tl.where(inside[None, :], logits, -1e30)
        peak = tl.maximum(top, tl.max(logits, 1))
        p = tl.exp2(logits - peak[:, None])
        fade = tl.exp2(top - peak)
        weight = weight * fade + tl.sum(p, 1)
        if CODES:
            p *= tl.load(value_steps + at, mask=inside, other=0.0)[None, :]
        acc = tl.dot(p.to(OPERANDS), v.to(OPERANDS), acc * fade[:, None], input_precision="ieee")
        top = peak
    return top, weight, acc


@triton.jit
def attend_kernel(
    qkv,  # [B, (KV G + 2 KV) D]: queries, keys, values of the new token
    keys,  # [B, KV, LENGTH, D] cache, in qkv's dtype, or int8 with CODES
    values,  # the same
    key_steps,  # fp32 [B, KV, LENGTH] with CODES
    value_steps,
    first,  # int64 [B]: the first slot that is not padding
    cos,  # [positions, D]
    sin,  # [positions, D]
    q_gain,  # [D], or anything without NORM
    k_gain,
    position,  # int64 [B]
    slot,  # int64 []: where the new key and value go
    out,  # [B, KV G D]
    part_sum,  # fp32 [B, KV, SPLIT, ROWS, D]
    part_max,  # fp32 [B, KV, SPLIT, ROWS]
    part_weight,  # the same
    locks,  # int32 [B KV], zero before and after
    LENGTH,
    SCALE,  # of the logits, times log2 e
    EPS,
    KV: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,  # 1 where G is 1, else G padded to what a matrix product takes
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    NORM: tl.constexpr,
    CODES: tl.constexpr,
    PDL: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """Rotate the new query and key, keep key and value, attend to all slots up to the new one.

    One program per sequence, key-value head and one of SPLIT stretches of the slots; the last to finish joins them, in
    their order, so that the result does not depend on who that was (as flash-decoding does with a second kernel).
    `slot`, `position`, `first` and all slots before the new one were settled when the step began, so they may be read
    before the wait.
    """
    part, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = out.dtype.element_ty
    d = tl.arange(0, D)
    half = (d + D // 2) % D
    g = tl.arange(0, ROWS)
    now = tl.load(slot).to(tl.int32)
    padding = tl.load(first + b).to(tl.int32)
    place = tl.load(position + b)
    cached = (b.to(tl.int64) * KV + h) * LENGTH
    keys += cached * D
    values += cached * D
    key_steps += cached
    value_steps += cached
    each = tl.cdiv(now - padding, SPLIT)
    begin = padding + part * each
    stop = tl.minimum(begin + each, now)
    turn = tl.load(cos + place * D + d).to(tl.float32)
    lean = tl.load(sin + place * D + d).to(tl.float32) * tl.where(d < D // 2, -1.0, 1.0)
    mine = qkv + b.to(tl.int64) * (KV * G + 2 * KV) * D
    if ROWS == 1:
        start_next(PDL)
        top, weight, acc, fresh, k_new, v_new = _by_rows(
            mine, h, q_gain, k_gain, d, half, turn, lean, EPS, keys, values, key_steps, value_steps, begin, stop,
            SCALE, KV, D, BLOCK, STAGES, NORM, CODES, PDL, dtype,
        )  # fmt: skip
    else:
        wait(PDL)
        _, k_new, v_new = _new_token(mine, h, q_gain, k_gain, d, half, turn, lean, EPS, KV, G, D, NORM, dtype)
        head = (tl.minimum(g, G - 1) + h * G)[:, None] * D  # rows past G repeat the last query
        q = _rotated(
            mine, q_gain, head + d[None, :], head + half[None, :], turn[None, :], lean[None, :], EPS, D, NORM, dtype
        )
        fresh = tl.sum(q * k_new[None, :], 1) * SCALE
        top, weight, acc = _by_blocks(
            q, keys, values, key_steps, value_steps, begin, stop, d, SCALE, D, BLOCK, STAGES, CODES, OPERANDS
        )
    if part == SPLIT - 1:
        _keep(keys, key_steps, now, d, k_new, D, CODES)
        _keep(values, value_steps, now, d, v_new, D, CODES)
    fresh = tl.where(part == SPLIT - 1, fresh, -1e30)  # the new token belongs to the last part
    peak = tl.maximum(top, fresh)
    fade = tl.exp2(top - peak)
    p = tl.exp2(fresh - peak)
    weight = weight * fade + p
    acc = acc * fade[:, None] + p[:, None] * v_new[None, :]
    to = out + b.to(tl.int64) * KV * G * D + (h * G + g)[:, None] * D + d[None, :]
    real = (g < G)[:, None]
    if SPLIT == 1:
        tl.store(to, (acc / weight[:, None]).to(dtype), mask=real)
    else:
        group = b * KV + h
        piece = (group * SPLIT).to(tl.int64) * ROWS
        rows = piece + part * ROWS + g
        tl.store(part_sum + rows[:, None] * D + d[None, :], acc, mask=real, cache_modifier=".cg")
        tl.store(part_max + rows, peak, mask=g < G, cache_modifier=".cg")
        tl.store(part_weight + rows, weight, mask=g < G, cache_modifier=".cg")
        tl.debug_barrier()  # every thread's part is written before one thread says so
        done = tl.atomic_add(locks + group, 1, sem="acq_rel")
        if done == SPLIT - 1:
            tl.debug_barrier()
            top = tl.full((ROWS,), -1e30, tl.float32)
            for other in tl.static_range(SPLIT):  # unrolled: the loads wait together
                at = part_max + piece + other * ROWS + g
                top = tl.maximum(top, tl.load(at, mask=g < G, other=-1e30, cache_modifier=".cg"))
            total = tl.zeros((ROWS, D), tl.float32)
            weight = tl.zeros((ROWS,), tl.float32)
            for other in tl.static_range(SPLIT):
                rows = piece + other * ROWS + g
                peak = tl.load(part_max + rows, mask=g < G, other=-1e30, cache_modifier=".cg")
                share = tl.exp2(peak - top)
                weight += share * tl.load(part_weight + rows, mask=g < G, other=1.0, cache_modifier=".cg")
                at = rows[:, None] * D + d[None, :]
                sums = tl.load(part_sum + at, mask=real, other=0.0, cache_modifier=".cg")
                total += share[:, None] * sums
            tl.store(to, (total / weight[:, None]).to(dtype), mask=real)
            tl.store(locks + group, 0)


def attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
    scale: float,
    steps: tuple[torch.Tensor, torch.Tensor] | None = None,
    gains: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Attention of one new token per sequence; its key and value are put into the cache at `slot`.

    Args:
        qkv: [B, (H + 2 KV) D], queries, keys and values before rotation.
        keys, values: cache [B, KV, length, D], in qkv's dtype, or int8 codes.
        first: int64 [B], the first slot of each sequence that is not padding.
        cos, sin: of every position, [positions, D], as transformers' rotary embedding gives them.
        position: int64 [B]; slot: int64 scalar.
        scale: of the logits.
        steps: scales of int8 keys and values, fp32 [B, KV, length] each.
        gains, eps: of the norms of queries and keys, where the family has them.

    Returns:
        [B, H D] in qkv's dtype.
    """
    batch, heads, length, width = keys.shape
    group = qkv.shape[1] // width // heads - 2
    split = parts(batch * heads, multiprocessors(keys.device))
    rows = query_rows(group, split)
    out = qkv.new_empty(batch, heads * group * width)
    places = batch * heads * split * rows
    sums = torch.empty(places * width if split > 1 else 1, dtype=torch.float32, device=qkv.device)
    tops, weights = torch.empty(2, places, dtype=torch.float32, device=qkv.device)
    q_gain, k_gain = gains or (qkv, qkv)
    key_steps, value_steps = steps or (sums, sums)
    attend_kernel[(split, heads, batch)](
        qkv, keys, values, key_steps, value_steps, first, cos, sin, q_gain, k_gain, position, slot, out,
        sums, tops, weights, locks(qkv.device, batch * heads), length, scale * LOG2_E, eps,
        KV=heads, G=group, ROWS=rows, D=width, SPLIT=split, NORM=gains is not None, CODES=steps is not None,
        OPERANDS=_OPERANDS[qkv.dtype] if qkv.is_cuda else tl.float32,
        **shape(rows, split, steps is not None), **launch_options(qkv.device),
    )  # fmt: skip
    return out


def query_rows(group: int, split: int) -> int:
    """Rows of a program's queries: one, or as many as a matrix product takes; the latter where stretches are short."""
    return 1 if group == split == 1 else max(16, triton.next_power_of_2(group))


def shape(rows: int, split: int, codes: bool) -> dict:
    """Slots of a block, stages of the pipeline and warps of a program; what an H100 measured to be fastest."""
    return {"BLOCK": 32 if split > 1 or (rows == 1 and codes) else 64, "STAGES": 3, "num_warps": 4}


def parts(groups: int, multiprocessors: int) -> int:
    """Into how many stretches to cut the slots so that every multiprocessor has two programs; at most 16."""
    return max(1, min(16, 2 * multiprocessors // groups))
