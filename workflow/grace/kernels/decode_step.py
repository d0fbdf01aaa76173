"""What surrounds the products of one decoding step of a Llama-type decoder, in one Triton kernel each.

A step reads every weight once; at a few sequences its time is that of the reading plus every gap between kernels. So
what transformers does in some forty kernels per layer is done here in four: `add_norm`, `attend` (in
`decode_attention`), `silu_mul` and, once per step, `argmax`. All values are computed in fp32 and rounded where
transformers' modules round. `dependent_launch` says how the kernels follow each other.
"""

import torch
import triton
import triton.language as tl

from grace.kernels.dependent_launch import launch_options, locks, wait


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
    wait(PDL, FIRST=EMBED)
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
    wait(PDL)
    gate = tl.load(both + row * 2 * INNER + at, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * INNER + INNER + at, mask=ok, other=0.0).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(y + row * INNER + at, (active * up).to(dtype), mask=ok)


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
    wait(PDL)
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


def argmax(logits: torch.Tensor, token: torch.Tensor, position: torch.Tensor, slot: torch.Tensor) -> None:
    """token [B] = the first largest of logits [B, V]; position [B] and slot [] go one further. All in place."""
    batch, vocabulary = logits.shape
    each = 1024
    pieces = triton.cdiv(vocabulary, each)
    tops = torch.empty(batch * pieces, dtype=torch.float32, device=logits.device)
    index = torch.empty(batch * pieces, dtype=torch.int32, device=logits.device)
    argmax_kernel[(pieces, batch)](
        logits, token, position, slot, tops, index, locks(logits.device, batch), vocabulary,
        EACH=each, PARTS=pieces, PADDED=triton.next_power_of_2(pieces), num_warps=4, **launch_options(logits.device),
    )  # fmt: skip
