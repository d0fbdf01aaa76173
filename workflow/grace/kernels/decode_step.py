"""What surrounds the products of one decoding step of a Llama-type decoder, in one Triton kernel each.

A step reads every weight once; at a few sequences its time is that of the reading plus every gap between kernels. So
what transformers does in some forty kernels per layer is done here in four: `add_norm`, `attend`, `silu_mul` and, once
per step, `argmax`. All values are computed in fp32 and rounded where transformers' modules round.

On compute capability 9.0 and later the launches are programmatic and dependent: a kernel starts while its predecessor
ends, reads what no kernel writes (weights), and waits at `gdc_wait` before it touches anything else. Every kernel waits,
so that the end of one implies the end of all before it.
"""

from functools import cache

import torch
import triton
import triton.language as tl

LOCKS = 1 << 12
_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _wait(PDL: tl.constexpr):
    """Let the next kernel start, then wait for the last one to end."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def add_norm_kernel(
    x,  # [B, d] residual stream, written where EMBED or HAS_DELTA
    delta,  # [B, d] what a block adds to it
    gain,  # [d]
    y,  # [B, d]
    token,  # int64 [B]
    table,  # [vocab, d] embeddings
    D,
    EPS,
    BLOCK: tl.constexpr,
    EMBED: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    PDL: tl.constexpr,
):
    """x = table[token] (EMBED) or x + delta (HAS_DELTA); y = x / rms(x) * gain. One program per sequence."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    ok = at < D
    dtype: tl.constexpr = y.dtype.element_ty
    g = tl.load(gain + at, mask=ok, other=0.0)
    _wait(PDL)
    here = x + row.to(tl.int64) * D + at
    if EMBED:
        now = tl.load(table + tl.load(token + row) * D + at, mask=ok, other=0.0)
        tl.store(here, now, mask=ok)
    else:
        now = tl.load(here, mask=ok, other=0.0)
    if HAS_DELTA:
        more = tl.load(delta + row.to(tl.int64) * D + at, mask=ok, other=0.0)
        now = (now.to(tl.float32) + more.to(tl.float32)).to(dtype)
        tl.store(here, now, mask=ok)
    wide = now.to(tl.float32)
    scaled = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / D + EPS)).to(dtype)
    tl.store(y + row.to(tl.int64) * D + at, (scaled.to(tl.float32) * g.to(tl.float32)).to(dtype), mask=ok)


@triton.jit
def silu_mul_kernel(both, y, INNER, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y = silu(gate) * up, with gate and up side by side: both [B, 2 INNER] -> y [B, INNER]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = at < INNER
    dtype: tl.constexpr = y.dtype.element_ty
    _wait(PDL)
    gate = tl.load(both + row * 2 * INNER + at, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * INNER + INNER + at, mask=ok, other=0.0).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(y + row * INNER + at, (active * up).to(dtype), mask=ok)


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
def attend_kernel(
    qkv,  # [B, (KV G + 2 KV) D]: queries, keys, values of the new token
    keys,  # [B, KV, LENGTH, D] cache
    values,  # the same
    valid,  # bool [B, LENGTH]: false on padding
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
    ROWS: tl.constexpr,  # G padded to what a matrix product takes
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
    OPERANDS: tl.constexpr,
):
    """Rotate the new query and key, keep key and value, attend to all slots up to the new one.

    One program per sequence, key-value head and one of SPLIT stretches of the slots; the last to finish joins them, in
    their order, so that the result does not depend on who that was (as flash-decoding does with a second kernel).
    """
    part, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = out.dtype.element_ty
    d = tl.arange(0, D)
    half = (d + D // 2) % D
    g = tl.arange(0, ROWS)
    _wait(PDL)
    now = tl.load(slot).to(tl.int32)
    place = tl.load(position + b)
    turn = tl.load(cos + place * D + d).to(tl.float32)
    lean = tl.load(sin + place * D + d).to(tl.float32) * tl.where(d < D // 2, -1.0, 1.0)
    mine = qkv + b.to(tl.int64) * (KV * G + 2 * KV) * D
    head = (tl.minimum(g, G - 1) + h * G)[:, None] * D  # rows past G repeat the last query
    q = _rotated(
        mine, q_gain, head + d[None, :], head + half[None, :], turn[None, :], lean[None, :], EPS, D, NORM, dtype
    )
    top = tl.full((ROWS,), -1e30, tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    cached = (b.to(tl.int64) * KV + h) * LENGTH
    if part == SPLIT - 1:
        from_k = mine + (KV * G + h) * D
        k_new = _rotated(from_k, k_gain, d, half, turn, lean, EPS, D, NORM, dtype)
        v_new = tl.load(mine + (KV * G + KV + h) * D + d)
        tl.store(keys + (cached + now) * D + d, k_new.to(dtype))
        tl.store(values + (cached + now) * D + d, v_new)
        top = tl.sum(q * k_new[None, :], 1) * SCALE
        weight += 1.0
        acc += v_new.to(tl.float32)[None, :]
    q = q.to(OPERANDS)
    each = tl.cdiv(now, SPLIT)
    stop = tl.minimum(part * each + each, now)
    for begin in range(part * each, stop, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < stop
        seen = tl.load(valid + b * LENGTH + at, mask=inside, other=0) != 0
        k = tl.load(keys + (cached + at)[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        v = tl.load(values + (cached + at)[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k.to(OPERANDS)), input_precision="ieee") * SCALE
        logits = tl.where(seen[None, :], logits, -1e30)  # finite, so that differences stay numbers
        peak = tl.maximum(top, tl.max(logits, 1))
        p = tl.exp2(logits - peak[:, None])
        fade = tl.exp2(top - peak)
        weight = weight * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(OPERANDS), v.to(OPERANDS), acc * fade[:, None], input_precision="ieee")
        top = peak
    to = out + b.to(tl.int64) * KV * G * D + (h * G + g)[:, None] * D + d[None, :]
    real = (g < G)[:, None]
    if SPLIT == 1:
        tl.store(to, (acc / weight[:, None]).to(dtype), mask=real)
    else:
        group = b * KV + h
        piece = (group * SPLIT).to(tl.int64) * ROWS
        rows = piece + part * ROWS + g
        tl.store(part_sum + rows[:, None] * D + d[None, :], acc, mask=real, cache_modifier=".cg")
        tl.store(part_max + rows, top, mask=g < G, cache_modifier=".cg")
        tl.store(part_weight + rows, weight, mask=g < G, cache_modifier=".cg")
        tl.debug_barrier()  # every thread's part is written before one thread says so
        done = tl.atomic_add(locks + group, 1, sem="acq_rel")
        if done == SPLIT - 1:
            tl.debug_barrier()
            top = tl.full((ROWS,), -1e30, tl.float32)
            for other in tl.static_range(SPLIT):  # unrolled: the loads wait together
                top = tl.maximum(
                    top, tl.load(part_max + piece + other * ROWS + g, mask=g < G, other=-1e30, cache_modifier=".cg")
                )
            total = tl.zeros((ROWS, D), tl.float32)
            weight = tl.zeros((ROWS,), tl.float32)
            for other in tl.static_range(SPLIT):  # unrolled: the loads wait together
                rows = piece + other * ROWS + g
                peak = tl.load(part_max + rows, mask=g < G, other=-1e30, cache_modifier=".cg")
                share = tl.exp2(peak - top)
                weight += share * tl.load(part_weight + rows, mask=g < G, other=1.0, cache_modifier=".cg")
                sums = tl.load(part_sum + rows[:, None] * D + d[None, :], mask=real, other=0.0, cache_modifier=".cg")
                total += share[:, None] * sums
            tl.store(to, (total / weight[:, None]).to(dtype), mask=real)
            tl.store(locks + group, 0)


@triton.jit
def argmax_kernel(
    logits,  # [B, V]
    token,  # int64 [B]
    position,  # int64 [B], advanced by one
    slot,  # int64 [], advanced by one by the first sequence
    part_max,  # fp32 [B, PARTS]
    part_index,  # int32 [B, PARTS]
    locks,  # int32 [B], zero before and after
    V,
    EACH: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,  # PARTS rounded up to a power of two
    PDL: tl.constexpr,
):
    """The first of the largest logits of each sequence becomes its token; the last program of a row decides."""
    part, b = tl.program_id(0), tl.program_id(1)
    at = part * EACH + tl.arange(0, EACH)
    _wait(PDL)
    row = tl.load(logits + b.to(tl.int64) * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
    best = tl.max(row, 0)
    index = tl.min(tl.where(row == best, at, V - 1), 0)  # V - 1 where no logit equals the largest: all are NaN
    tl.store(part_max + b * PARTS + part, best, cache_modifier=".cg")
    tl.store(part_index + b * PARTS + part, index, cache_modifier=".cg")
    tl.debug_barrier()
    done = tl.atomic_add(locks + b, 1, sem="acq_rel")
    if done == PARTS - 1:
        tl.debug_barrier()
        p = tl.arange(0, PADDED)
        tops = tl.load(part_max + b * PARTS + p, mask=p < PARTS, other=float("-inf"), cache_modifier=".cg")
        where = tl.load(part_index + b * PARTS + p, mask=p < PARTS, other=V - 1, cache_modifier=".cg")
        first = tl.min(tl.where(tops == tl.max(tops, 0), where, V - 1), 0)
        tl.store(token + b, first.to(tl.int64))
        tl.store(position + b, tl.load(position + b) + 1)
        if b == 0:
            tl.store(slot, tl.load(slot) + 1)
        tl.store(locks + b, 0)


def add_norm(
    x: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    delta: torch.Tensor | None = None,
    token: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMS norm of the residual stream x [B, d], after x += delta or x = table[token] in place; [B, d]."""
    batch, width = x.shape
    y = torch.empty_like(x)
    add_norm_kernel[(batch,)](
        x, x if delta is None else delta, gain, y, x if token is None else token, x if table is None else table,
        width, eps, BLOCK=triton.next_power_of_2(width), EMBED=token is not None, HAS_DELTA=delta is not None,
        num_warps=8 if width > 1024 else 4, **launch_options(x.device),
    )  # fmt: skip
    return y


def silu_mul(both: torch.Tensor) -> torch.Tensor:
    """silu of the first half of each row times the second half: [B, 2 n] -> [B, n]."""
    batch, inner = both.shape[0], both.shape[1] // 2
    y = both.new_empty(batch, inner)
    block = 512
    silu_mul_kernel[(batch, triton.cdiv(inner, block))](
        both, y, inner, BLOCK=block, num_warps=2, **launch_options(both.device)
    )
    return y


def attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    valid: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position: torch.Tensor,
    slot: torch.Tensor,
    scale: float,
    gains: tuple[torch.Tensor, torch.Tensor] | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Attention of one new token per sequence; its key and value are put into the cache at `slot`.

    Args:
        qkv: [B, (H + 2 KV) D], queries, keys and values before rotation.
        keys, values: cache [B, KV, length, D].
        valid: bool [B, length], false on padding.
        cos, sin: of every position, [positions, D], as transformers' rotary embedding gives them.
        position: int64 [B]; slot: int64 scalar.
        scale: of the logits.
        gains, eps: of the norms of queries and keys, where the family has them.

    Returns:
        [B, H D] in qkv's dtype.
    """
    batch, heads, length, width = keys.shape
    group = qkv.shape[1] // width // heads - 2
    rows = max(16, triton.next_power_of_2(group))
    split = parts(batch * heads, _multiprocessors(keys.device))
    out = qkv.new_empty(batch, heads * group * width)
    places = batch * heads * split * rows
    sums = torch.empty(places * width if split > 1 else 1, dtype=torch.float32, device=qkv.device)
    tops, weights = torch.empty(2, places, dtype=torch.float32, device=qkv.device)
    q_gain, k_gain = gains or (qkv, qkv)
    attend_kernel[(split, heads, batch)](
        qkv, keys, values, valid, cos, sin, q_gain, k_gain, position, slot, out, sums, tops, weights,
        _locks(qkv.device, batch * heads), length, scale * 1.4426950408889634, eps,
        KV=heads, G=group, ROWS=rows, D=width, BLOCK=32 if split > 1 else 64, SPLIT=split, NORM=gains is not None,
        OPERANDS=_OPERANDS[qkv.dtype] if qkv.is_cuda else tl.float32,
        num_warps=4, num_stages=3, **launch_options(qkv.device),
    )  # fmt: skip
    return out


def argmax(logits: torch.Tensor, token: torch.Tensor, position: torch.Tensor, slot: torch.Tensor) -> None:
    """token [B] = the first largest of logits [B, V]; position [B] and slot [] go one further. All in place."""
    batch, vocabulary = logits.shape
    each = 1024
    pieces = triton.cdiv(vocabulary, each)
    tops = torch.empty(batch * pieces, dtype=torch.float32, device=logits.device)
    index = torch.empty(batch * pieces, dtype=torch.int32, device=logits.device)
    argmax_kernel[(pieces, batch)](
        logits, token, position, slot, tops, index, _locks(logits.device, batch), vocabulary,
        EACH=each, PARTS=pieces, PADDED=triton.next_power_of_2(pieces), num_warps=4, **launch_options(logits.device),
    )  # fmt: skip


def parts(groups: int, multiprocessors: int) -> int:
    """Into how many stretches to cut the slots so that every multiprocessor has two programs; at most 16."""
    return max(1, min(16, 2 * multiprocessors // groups))


@cache
def _multiprocessors(device: torch.device) -> int:
    """Of a card; where Triton interprets on a CPU, a number that makes both one and several parts occur."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 12


@cache
def launch_options(device: torch.device) -> dict:
    """PDL: programmatic dependent launch, from compute capability 9.0 on."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def _locks(device: torch.device, least: int) -> torch.Tensor:
    return torch.zeros(max(LOCKS, least), dtype=torch.int32, device=device)
