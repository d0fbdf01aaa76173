"""`decode_layers` for two to eight sequences: the tensor core's right operand has eight columns, one for each.

The weights' way is that of one sequence. What eight times the activations change:

- The residual stream lies in memory. The products that add to it leave the squares of what they wrote too, a sum per
  unit and sequence, so that nobody has to read the stream twice for its norm.
- Activations get a power of two per chunk of 128 inputs and sequence on their way to fp16, which the chunk's sums are
  multiplied by again: a thread needs no more than the chunk to place it.
- Shared memory has room for ROUND stages of activations. A product of more inputs goes in rounds: all of a program's
  units take the inputs of a round before the next ones are placed, and leave their sums in shared memory.
- Attention has a piece for each part of each head of each sequence; they are dealt out to the programs.

There are ROWS of everything, BATCH rounded up to a power of two. What is computed for the rows past BATCH is not used.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from grace.kernels.decode_layers import WAYS, gated, met, step_sizes, unpacked
from grace.kernels.decode_layers_attention import attend, powers
from grace.kernels.decode_ring import (
    INPUT_NORM,
    K_NORM,
    LINE,
    POST_NORM,
    Q_NORM,
    QKV_BIAS,
    address,
    cached,
    make_ring,
    meet,
    pass_on,
    stream,
    task_slots,
)
from grace.kernels.gluon_names import barrier, next_stage, view

ROUND = 2  # stages of activations that shared memory has room for
COLUMNS = 8
ROUND_BYTES = ROUND * WAYS * COLUMNS * (128 * 2 + 2 * 4)  # activations; their scales and shifts
SUMS_BYTES = 4 * 16 * COLUMNS * 4  # of a unit, by warp
MEETINGS = gl.constexpr(5)  # of all programs, per layer; and one for the embedding
# Products: even ones take the normed residual stream, odd ones add to it.
QKV, OUTPUT, GATE_UP, DOWN = (gl.constexpr(i) for i in range(4))

_COLUMNS = gl.constexpr(COLUMNS)
_ROUND = gl.constexpr(ROUND)
_SUMS = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8]))
_ROWS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0]))  # what eight threads read lies in different banks
_PLAIN2 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
_PLAIN3 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))


@gluon.constexpr_function
def tile_chunks(rows):
    """Chunks that are placed at a time, at most 64 values per thread."""
    return min(16, 64 // rows)


@gluon.constexpr_function
def tile_layout(rows):
    """Of a tile of activations [rows, inputs]: a thread has 16 of a chunk that lie side by side when placed."""
    registers, warps = [[0, 1], [0, 2], [0, 4], [0, 32]], [[1, 0], [2, 0]]
    if rows == 8:
        registers += [[4, 0], [0, 512]]
    elif rows == 4:
        registers += [[0, 512], [0, 1024]]
    else:
        registers, warps = [*registers, [0, 1024]], [[1, 0], [0, 512]]
    lanes = [[0, 8], [0, 16], [0, 64], [0, 128], [0, 256]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows, tile_chunks(rows) * 128])


@gluon.jit
def _fetched(
    source, part_top, gain, tile, N: gl.constexpr, WHICH: gl.constexpr, ROWS: gl.constexpr, HEADS: gl.constexpr,
    D: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """A tile [ROWS, inputs] of what a product starts from, N of which there are, and of the norm's gain;
    zeros past N.
    """
    L: gl.constexpr = tile_layout(ROWS)
    WIDTH: gl.constexpr = tile_chunks(ROWS) * 128
    row = gl.arange(0, ROWS, gl.SliceLayout(1, L))[:, None]
    column = tile * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, L))
    at = column[None, :]
    inside = at + row * 0 < N
    if WHICH == OUTPUT:
        x = gl.load(source + row * (SPLIT * N) + at, mask=inside, other=0.0, cache_modifier=".cg")
        if SPLIT > 1:
            x = _joined(x, source, part_top, tile, row, at, inside, N, ROWS, HEADS, D, SPLIT)
    else:
        x = gl.load(source + row * N + at, mask=inside, other=0.0, cache_modifier=".cg")
    gains = x
    if WHICH % 2 == 0:
        gains = gl.load(gain + column, mask=column < N, other=0.0)
    return x, gains


@gluon.jit
def _joined(
    x, source, part_top, tile, row, at, inside, N: gl.constexpr, ROWS: gl.constexpr, HEADS: gl.constexpr,
    D: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """The heads' outputs from all their parts, of which x is the first."""
    CHUNKS: gl.constexpr = tile_chunks(ROWS)
    first = x.reshape((ROWS, CHUNKS, 2, 64))  # halves of chunks, each of one head
    HALVES: gl.constexpr = gl.SliceLayout(3, first.type.layout)
    sequence = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, HALVES)))[:, None, None]
    chunk = gl.arange(0, CHUNKS, gl.SliceLayout(0, gl.SliceLayout(2, HALVES)))[None, :, None]
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, HALVES)))[None, None, :]
    head = ((tile * CHUNKS + chunk) * 128 + half * 64) // D + sequence * 0
    tops = part_top + sequence * (SPLIT * HEADS) + head
    best = gl.load(tops, mask=head < HEADS, other=0.0, cache_modifier=".cg")
    for part in gl.static_range(1, SPLIT):
        top = gl.load(tops + part * HEADS, mask=head < HEADS, other=0.0, cache_modifier=".cg")
        best = gl.maximum(best, top)
    total, mixed = best * 0.0, first * 0.0
    for part in gl.static_range(SPLIT):
        sums = first
        if part > 0:
            sums = gl.load(source + row * (SPLIT * N) + part * N + at, mask=inside, other=0.0, cache_modifier=".cg")
            sums = sums.reshape((ROWS, CHUNKS, 2, 64))
        top = gl.load(tops + part * HEADS, mask=head < HEADS, other=0.0, cache_modifier=".cg")
        share = gl.exp2(top - best)
        total += share
        mixed += gl.expand_dims(share, 3) * sums
    return (mixed / gl.expand_dims(total, 3)).reshape((ROWS, CHUNKS * 128))


@gluon.jit
def _place(shared, tile, x, ROWS: gl.constexpr):
    """Leave a tile x [ROWS, inputs], fp32, as `_product` takes it: within a chunk as `decode_layers` has it."""
    x_s, shift_s, scale_s = shared
    CHUNKS: gl.constexpr = tile_chunks(ROWS)
    x = x.reshape((ROWS, CHUNKS, 128))
    scale, unscale = powers(gl.max(gl.abs(x), 2))
    odd = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, x.type.layout))) // 32 % 2 == 1
    odd = odd[None, None, :]  # they meet 1024 + 16 n
    x = (x * gl.expand_dims(scale, 2) * gl.where(odd, 0.0625, 1.0)).to(gl.float16)
    shift = gl.sum(x.to(gl.float32) * gl.where(odd, -1152.0, -1032.0), 2)
    shift_s.index(tile).slice(0, ROWS, 1).store(shift.permute((1, 0)))
    scale_s.index(tile).slice(0, ROWS, 1).store(unscale.permute((1, 0)))
    x = x.reshape((ROWS, CHUNKS, 2, 2, 4, 4, 2)).permute((1, 0, 2, 4, 5, 3, 6)).reshape((CHUNKS, ROWS, 128))
    if ROWS < 8:  # all columns, since part of the swizzled ones cannot be written
        x = gl.join(x, x).permute((0, 3, 1, 2)).reshape((CHUNKS, 2 * ROWS, 128))
    if ROWS < 4:
        x = gl.join(x, x).permute((0, 3, 1, 2)).reshape((CHUNKS, 4 * ROWS, 128))
    x_s.index(tile).store(x)


@gluon.jit
def _place_round(
    shared, source, part_top, gain, scale, begin, stages, N: gl.constexpr, WHICH: gl.constexpr, ROWS: gl.constexpr,
    HEADS: gl.constexpr, D: gl.constexpr, SPLIT: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Place the inputs of so many stages from stage `begin` on; `scale` [ROWS] is the norm's, where there is one."""
    TILES: gl.constexpr = 16 // tile_chunks(ROWS)  # per stage
    L: gl.constexpr = tile_layout(ROWS)
    x, gains = _fetched(source, part_top, gain, begin * TILES, N, WHICH, ROWS, HEADS, D, SPLIT)
    for tile in range(stages * TILES):
        ahead, gains_ahead = _fetched(  # asked for before this tile is placed
            source, part_top, gain, begin * TILES + tile + 1, N, WHICH, ROWS, HEADS, D, SPLIT
        )
        y = x.to(gl.float32)
        if WHICH % 2 == 0:
            y = (y * gl.convert_layout(scale, gl.SliceLayout(1, L))[:, None]).to(DTYPE).to(gl.float32)
            y *= gains.to(gl.float32)[None, :]
        _place(shared, tile, y.to(DTYPE).to(gl.float32), ROWS)
        x, gains = ahead, gains_ahead


@gluon.jit
def _activations(x_s, step, ROWS: gl.constexpr):
    """A stage of activations as the right operand [WAYS, 128, COLUMNS]."""
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, _SUMS, 8)
    X: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 0, 64], [4, 0, 0], [8, 0, 0]],
        [[0, 0, 16], [0, 0, 32], [0, 1, 0], [0, 2, 0], [0, 4, 0]], [[1, 0, 0], [2, 0, 0]], [], [16, 8, 128],
    )  # fmt: skip
    x = view(x_s, gl.float16, [_ROUND, 16, _COLUMNS, 128], _ROWS).index(step).load(X)
    x = x.reshape((16, _COLUMNS, 2, 4, 4, 2, 2)).permute((0, 2, 5, 3, 4, 6, 1)).reshape((16, 128, _COLUMNS))
    return gl.convert_layout(x, RIGHT, assert_trivial=True)


@gluon.jit
def _by_warp(acc):
    """Sums over each warp's chunks [4, 16, COLUMNS] of all chunks' [WAYS, 16, COLUMNS]: no thread asks another."""
    return gl.sum(acc.reshape((4, 4, 16, _COLUMNS)), 0)


@gluon.jit
def _product(
    shared, sums_s, ring, stage, phase, source, part_top, gain, scale, bias, y, squares, dealt,
    SHAPES: gl.constexpr, WHICH: gl.constexpr, ROWS: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr,
    SPLIT: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """y [ROWS, outputs] = x W^T for this program's units, from `source` on.

    QKV adds the bias, where there is one; GATE_UP leaves silu(gate) * up; OUTPUT and DOWN add to the residual
    stream y, and leave `squares` [units, ROWS].
    Returns the next stage, its parity, and the program's first unit of the next product.
    """
    x_s, shift_s, scale_s = shared
    _words_s, _pairs_s, full, empty = ring
    OUT: gl.constexpr = SHAPES[WHICH][0]
    CHUNKS: gl.constexpr = SHAPES[WHICH][1]
    PAIRED: gl.constexpr = SHAPES[WHICH][2]
    BIASED: gl.constexpr = SHAPES[WHICH][3]
    STEPS: gl.constexpr = (CHUNKS + 15) // 16
    ROUNDS: gl.constexpr = (STEPS + _ROUND - 1) // _ROUND
    ADDED: gl.constexpr = WHICH % 2 == 1
    WIDTH: gl.constexpr = OUT // 2 if PAIRED else OUT
    EACH: gl.constexpr = 8 if PAIRED else 16
    LEFT: gl.constexpr = gl.DotOperandLayout(0, _SUMS, 8)
    blank = _by_warp(gl.zeros((16, 16, _COLUMNS), gl.float32, _SUMS))  # what `total` will look like
    blank = gl.sum(blank, 0)
    if PAIRED:
        blank = gated(blank, DTYPE)
    each = gl.arange(0, EACH, gl.SliceLayout(1, blank.type.layout))[:, None]
    row = gl.arange(0, _COLUMNS, gl.SliceLayout(0, blank.type.layout))
    real = row[None, :] + each * 0 < ROWS
    for turn in range(ROUNDS):
        stages = gl.minimum(STEPS - turn * _ROUND, _ROUND)
        barrier()  # everyone is done with the last activations
        _place_round(
            shared, source, part_top, gain, scale, turn * _ROUND, stages, CHUNKS * 128, WHICH, ROWS, HEADS, D, SPLIT,
            DTYPE,
        )  # fmt: skip
        barrier()  # all of these stand; said here, the compiler does not say it in the loop
        own = 0
        for unit in range(dealt, OUT // 16, P):
            out = unit * EACH + each
            places = y + row[None, :] * WIDTH + out
            if ADDED:  # asked for before the unit's words are waited for
                old = gl.load(places, mask=real, other=0.0, cache_modifier=".cg").to(gl.float32)
            if BIASED:
                more = gl.load(bias + out).to(gl.float32)
            acc = gl.zeros((16, 16, _COLUMNS), gl.float32, _SUMS)
            for step in range(stages):
                mbarrier.wait(full.index(stage), phase)
                left, low, high = unpacked(ring, stage, unit, PAIRED, LEFT)
                right = _activations(x_s, step, ROWS)
                shift = view(shift_s, gl.float32, [_ROUND, 16, _COLUMNS], _PLAIN2).index(step)
                shift = gl.expand_dims(shift.load(gl.SliceLayout(1, _SUMS)), 1)
                shift, _ = gl.broadcast(shift, acc)
                sums = mma_v2(left, right, shift)
                unscale = view(scale_s, gl.float32, [_ROUND, 16, _COLUMNS], _PLAIN2).index(step)
                unscale, _ = gl.broadcast(gl.expand_dims(unscale.load(gl.SliceLayout(1, _SUMS)), 1), acc)
                sizes, _ = gl.broadcast(step_sizes(low, high, _SUMS, DTYPE), sums)
                acc += sums * (sizes * unscale)
                mbarrier.arrive(empty.index(stage))
                stage, phase = next_stage(stage, phase, STAGES)
            parts = _by_warp(acc)
            if ROUNDS > 1:
                if turn > 0:
                    parts += sums_s.index(own).load(parts.type.layout)
                if turn < ROUNDS - 1:
                    sums_s.index(own).store(parts)
                own += 1
            if turn == ROUNDS - 1:
                total = gl.sum(parts, 0)
                if PAIRED:
                    total = gated(total, DTYPE)
                if BIASED:
                    total += more
                if ADDED:
                    total = (old + total.to(DTYPE).to(gl.float32)).to(DTYPE).to(gl.float32)
                    gl.store(squares + unit * ROWS + row, gl.sum(total * total, 0), mask=row < ROWS)
                gl.store(places, total.to(DTYPE), mask=real)
    return stage, phase, pass_on(dealt, OUT, P)


@gluon.jit
def _scales(squares, UNITS: gl.constexpr, PAD: gl.constexpr, ROWS: gl.constexpr, HIDDEN: gl.constexpr, EPS):
    """1 / rms of the residual stream of each sequence, fp32 [ROWS], from the sums that the products left."""
    L: gl.constexpr = gl.BlockedLayout([1, ROWS], [32, 1], [4, 1], [1, 0])
    unit = gl.arange(0, PAD, gl.SliceLayout(1, L))[:, None]
    row = gl.arange(0, ROWS, gl.SliceLayout(0, L))[None, :]
    each = gl.load(squares + unit * ROWS + row, mask=unit + row * 0 < UNITS, other=0.0, cache_modifier=".cg")
    return gl.rsqrt(gl.sum(each, 0) / HIDDEN + EPS)


@gluon.jit
def _embed(
    token, embedding, x, squares, ROWS: gl.constexpr, BATCH: gl.constexpr, HIDDEN: gl.constexpr, P: gl.constexpr
):
    """Begin the residual stream x [ROWS, HIDDEN] with this program's units of the tokens' embeddings."""
    L: gl.constexpr = gl.BlockedLayout([8, 1], [2, 16], [1, 4], [0, 1])
    row = gl.arange(0, _COLUMNS, gl.SliceLayout(0, L))
    tokens = gl.load(token + gl.minimum(row, BATCH - 1))
    real = row < ROWS
    for unit in range(gl.program_id(0), HIDDEN // 16, P):
        at = unit * 16 + gl.arange(0, 16, gl.SliceLayout(1, L))[:, None]
        values = gl.load(embedding + tokens[None, :] * HIDDEN + at)
        gl.store(x + row[None, :] * HIDDEN + at, values, mask=real[None, :] & (at < HIDDEN))
        values = values.to(gl.float32)
        gl.store(squares + unit * ROWS + row, gl.sum(values * values, 0), mask=real)


@gluon.jit
def _compute(
    table, token, embedding, norm, qkv, x, inner, squares, hidden, cos, sin, position, slot, first, part_sum, part_top,
    shared, sums_s, ring, done, go, LAYERS, LENGTH, SCALE, EPS, SHAPES: gl.constexpr, HIDDEN: gl.constexpr,
    INNER: gl.constexpr, KV: gl.constexpr, G: gl.constexpr, D: gl.constexpr, NORMED: gl.constexpr,
    PADS: gl.constexpr, SPLIT: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr,
    CODES: gl.constexpr, BATCH: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """This program's share of every phase of every layer."""
    UNITS: gl.constexpr = HIDDEN // 16
    HEADS: gl.constexpr = KV * G
    dealt = gl.program_id(0)
    stage, phase, meeting = 0, 0, 0
    _embed(token, embedding, x, squares, ROWS, BATCH, HIDDEN, P)
    mbarrier.arrive(done)
    for layer in range(LAYERS):
        here = table + layer * LINE
        gain, bias = address(here, INPUT_NORM, DTYPE), address(here, QKV_BIAS, DTYPE)
        meeting = met(go, meeting)
        scale = _scales(squares, UNITS, PADS[0] // 16, ROWS, HIDDEN, EPS)
        stage, phase, dealt = _product(
            shared, sums_s, ring, stage, phase, x, part_top, gain, scale, bias, qkv, squares, dealt, SHAPES, QKV, ROWS,
            HEADS, D, SPLIT, P, STAGES, DTYPE,
        )  # fmt: skip
        mbarrier.arrive(done)
        gains = (address(here, Q_NORM, DTYPE), address(here, K_NORM, DTYPE))
        meeting = met(go, meeting)
        for task in range(gl.program_id(0), BATCH * KV * SPLIT, P):
            pair, part, now, begin, stop = task_slots(task, slot, first, KV, SPLIT)
            keys, values, key_steps, value_steps = cached(here, pair, LENGTH, D, DTYPE, CODES)
            sequence = pair // KV
            place = gl.load(position + sequence).to(gl.int32) * D
            own = sequence * (SPLIT * HEADS)
            stage, phase = attend(
                qkv + sequence * ((HEADS + 2 * KV) * D), keys, values, (key_steps, value_steps), gains, cos + place,
                sin + place, ring, stage, phase, pair % KV, part, now, begin, stop, part_sum + own * D, part_top + own,
                SCALE, EPS, KV, G, D, NORMED, SPLIT, STAGES, DTYPE, CODES,
            )  # fmt: skip
        mbarrier.arrive(done)
        meeting = met(go, meeting)
        stage, phase, dealt = _product(
            shared, sums_s, ring, stage, phase, part_sum, part_top, gain, scale, bias, x, squares, dealt, SHAPES,
            OUTPUT, ROWS, HEADS, D, SPLIT, P, STAGES, DTYPE,
        )  # fmt: skip
        mbarrier.arrive(done)
        gain = address(here, POST_NORM, DTYPE)
        meeting = met(go, meeting)
        scale = _scales(squares, UNITS, PADS[0] // 16, ROWS, HIDDEN, EPS)
        stage, phase, dealt = _product(
            shared, sums_s, ring, stage, phase, x, part_top, gain, scale, bias, inner, squares, dealt, SHAPES, GATE_UP,
            ROWS, HEADS, D, SPLIT, P, STAGES, DTYPE,
        )  # fmt: skip
        mbarrier.arrive(done)
        meeting = met(go, meeting)
        stage, phase, dealt = _product(
            shared, sums_s, ring, stage, phase, inner, part_top, gain, scale, bias, x, squares, dealt, SHAPES, DOWN,
            ROWS, HEADS, D, SPLIT, P, STAGES, DTYPE,
        )  # fmt: skip
        mbarrier.arrive(done)
    L: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    at = gl.arange(0, PADS[0], L)
    gain = gl.load(norm + at, mask=at < HIDDEN, other=0.0).to(gl.float32)
    met(go, meeting)
    for row in range(gl.program_id(0), BATCH, P):
        mine = row * HIDDEN + at
        y = gl.load(x + mine, mask=at < HIDDEN, other=0.0, cache_modifier=".cg").to(gl.float32)
        y = (y * gl.rsqrt(gl.sum(y * y, 0) / HIDDEN + EPS)).to(DTYPE).to(gl.float32)
        gl.store(hidden + mine, (y * gain).to(DTYPE), mask=at < HIDDEN)


@gluon.jit(do_not_specialize=["LAYERS", "LENGTH"])
def batch_kernel(
    table,  # int64 [LAYERS, LINE]: addresses of each layer's tensors, in the order of `decode_ring.FIELDS`
    token,  # int64 [BATCH]
    embedding,  # [vocab, HIDDEN]
    norm,  # [HIDDEN], of the last norm
    qkv,  # [ROWS, (G + 2) KV D]; this and the next three: what programs leave for each other
    x,  # [ROWS, HIDDEN], the residual stream
    inner,  # [ROWS, INNER]
    squares,  # fp32 [HIDDEN / 16, ROWS]
    hidden,  # [BATCH, HIDDEN], the result
    cos,  # [positions, D]
    sin,  # [positions, D]
    position,  # int64 [BATCH]
    slot,  # int64 []: where the new keys and values go
    first,  # int64 [BATCH]: the first slot of each sequence that is not padding
    part_sum,  # fp32, or the others' type where SPLIT is 1: [ROWS, SPLIT, KV G, D], finite before
    part_top,  # fp32 [ROWS, SPLIT, KV G], finite before
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
    SPLIT: gl.constexpr,  # parts of the slots
    WAYS: gl.constexpr,
    STAGES: gl.constexpr,
    P: gl.constexpr,  # programs, all resident: launch it cooperatively
    CODES: gl.constexpr,  # keys and values are int8 codes with scales, and D is 128
    BATCH: gl.constexpr,  # 2 to 8
    UNITS: gl.constexpr,  # of a program at most, where a product goes in rounds
):
    """hidden = the last norm of all layers' outputs for the tokens; their keys and values are put into the cache."""
    DTYPE: gl.constexpr = qkv.dtype.element_ty
    ROWS: gl.constexpr = 2 if BATCH <= 2 else 4 if BATCH <= 4 else 8
    CHUNKS: gl.constexpr = tile_chunks(ROWS)
    TILES: gl.constexpr = _ROUND * 16 // CHUNKS
    x_s = gl.allocate_shared_memory(gl.float16, [TILES, CHUNKS, _COLUMNS, 128], _ROWS)
    shift_s = gl.allocate_shared_memory(gl.float32, [TILES, CHUNKS, _COLUMNS], _PLAIN2)
    scale_s = gl.allocate_shared_memory(gl.float32, [TILES, CHUNKS, _COLUMNS], _PLAIN2)
    sums_s = gl.allocate_shared_memory(gl.float32, [UNITS, 4, 16, _COLUMNS], _PLAIN3)
    ring, done, go = make_ring(WAYS, STAGES)
    gl.warp_specialize(
        [
            (_compute, (
                table, token, embedding, norm, qkv, x, inner, squares, hidden, cos, sin, position, slot, first,
                part_sum, part_top, (x_s, shift_s, scale_s), sums_s, ring, done, go, LAYERS, LENGTH, SCALE, EPS,
                SHAPES, HIDDEN, INNER, KV, G, D, NORMED, PADS, SPLIT, P, STAGES, DTYPE, CODES, BATCH, ROWS,
            )),
            (stream, (
                table, slot, first, ring, LAYERS, LENGTH, SHAPES, KV, D, SPLIT, P, STAGES, DTYPE, CODES, BATCH, _ROUND,
            )),
            (meet, (counter, done, go, LAYERS * MEETINGS + 1, P)),
        ],
        [1, 1],  # warps beside the four that compute
        [96, 24],  # registers of their threads
    )  # fmt: skip
