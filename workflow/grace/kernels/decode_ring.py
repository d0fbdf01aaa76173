"""The warps of `decode_layers` that do not compute: one that loads ahead of all others, one that waits for all
programs.

The ring is (words_s, pairs_s, full, empty): int16 [STAGES, WAYS, 16, 32] for words of weights, or keys or values,
int32 [STAGES, 2 WAYS, 8] for pairs of scales, and a barrier per stage that says it is full, or empty again. Where keys
and values are CODES, 8 bits each, their scales take the place of the weights'.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from grace.kernels.gluon_names import copy, next_stage, view

# A line of the table of layers: addresses.
FIELDS = ("qkv", "qkv_steps", "o", "o_steps", "gate_up", "gate_up_steps", "down", "down_steps",
          "input_norm", "post_norm", "keys", "values", "qkv_bias", "q_norm", "k_norm",
          "key_steps", "value_steps")  # fmt: skip
LINE = gl.constexpr(len(FIELDS))
INPUT_NORM, POST_NORM, KEYS, VALUES, QKV_BIAS, Q_NORM, K_NORM, KEY_STEPS, VALUE_STEPS = (
    gl.constexpr(i) for i in range(8, len(FIELDS))
)
# Stages under way at a time. They fill the memory's pipeline; what else waits in it delays the small loads between two
# products: without this limit a step of LLaVA-1.5-7B takes 1.77 ms on an H100, with it 1.61.
AHEAD = gl.constexpr(2)
SLOTS = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))  # eight rows at a time are read without a bank conflict
CODE_SLOTS = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 8, [1, 0]))  # the same of 8-bit codes, 128 a row
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_LOOK = gl.constexpr("ld.acquire.gpu.global.b32 $0, [$1];")


@gluon.jit
def address(layer, field: gl.constexpr, kind: gl.constexpr):
    """The pointer whose address is a field of a layer's line of the table."""
    return gl.multiple_of(gl.load(layer + field).to(gl.pointer_type(kind)), 16)


@gluon.jit
def cached(layer, head, LENGTH, D: gl.constexpr, DTYPE: gl.constexpr, CODES: gl.constexpr):
    """A head's keys and values, and where CODES their scales; else what is never read in their place."""
    KIND: gl.constexpr = gl.int8 if CODES else DTYPE
    keys = address(layer, KEYS, KIND) + head.to(gl.int64) * LENGTH * D
    values = address(layer, VALUES, KIND) + head.to(gl.int64) * LENGTH * D
    key_steps, value_steps = keys, values
    if CODES:
        key_steps = address(layer, KEY_STEPS, gl.float32) + head.to(gl.int64) * LENGTH
        value_steps = address(layer, VALUE_STEPS, gl.float32) + head.to(gl.int64) * LENGTH
    return keys, values, key_steps, value_steps


@gluon.jit
def make_ring(WAYS: gl.constexpr, STAGES: gl.constexpr):
    """An empty ring in shared memory; and the barriers by which `_compute` says that it is done,
    and `meet` lets it go.
    """
    words_s = gl.allocate_shared_memory(gl.int16, [STAGES, WAYS, 16, 32], gl.SwizzledSharedLayout(8, 1, 1, [2, 1, 0]))
    pairs_s = gl.allocate_shared_memory(gl.int32, [STAGES, 2 * WAYS, 8], gl.SwizzledSharedLayout(4, 1, 1, [1, 0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    go = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=32)  # every lane of `stream`, once its copies are there
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(done, count=1)
    mbarrier.init(go, count=1)
    return (words_s, pairs_s, full, empty), done, go


@gluon.jit
def pass_on(dealt, OUT: gl.constexpr, P: gl.constexpr):
    """A program's first unit of the next product: units are dealt on from the program where the last product ended."""
    return (dealt + P - OUT // 16 % P) % P


@gluon.jit
def own_slots(slot, first, KV: gl.constexpr, SPLIT: gl.constexpr):
    """This program's head, its part of the slots, the new token's slot, and the part's begin and end (none: empty)."""
    pid = gl.program_id(0)
    now, start = gl.load(slot).to(gl.int32), gl.load(first).to(gl.int32)
    part = pid % SPLIT
    each = (now - start + SPLIT - 1) // SPLIT
    begin = start + part * each
    stop = gl.minimum(begin + each, now)
    if pid >= KV * SPLIT:
        stop = begin
    return gl.minimum(pid // SPLIT, KV - 1), part, now, begin, stop


@gluon.jit
def task_slots(task, slot, first, KV: gl.constexpr, SPLIT: gl.constexpr):
    """Of one of a batch's pieces of attention: sequence * KV + head, part, new token's slot,
    the part's begin and end.
    """
    part, pair = task % SPLIT, task // SPLIT
    now, start = gl.load(slot).to(gl.int32), gl.load(first + pair // KV).to(gl.int32)
    each = (now - start + SPLIT - 1) // SPLIT
    begin = start + part * each
    return pair, part, now, begin, gl.minimum(begin + each, now)


@gluon.jit
def _stream_product(
    words,
    pairs,
    ring,
    stage,
    phase,
    dealt,
    SHAPES: gl.constexpr,
    WHICH: gl.constexpr,
    P: gl.constexpr,
    STAGES: gl.constexpr,
    ROUND: gl.constexpr,
):
    """Bring the words and pairs of scales of all this program's units, WAYS chunks per stage.

    At most ROUND stages of a unit follow each other; then come as many of the next unit.
    Returns the next stage, its parity, and the program's first unit of the next product.
    """
    words_s, pairs_s, full, empty = ring
    OUT: gl.constexpr = SHAPES[WHICH][0]
    CHUNKS: gl.constexpr = SHAPES[WHICH][1]
    PAIRED: gl.constexpr = SHAPES[WHICH][2]
    WAYS: gl.constexpr = words_s.shape[1]
    HALF: gl.constexpr = (OUT + 127) // 128 * 64  # words of scales per group
    SIDES: gl.constexpr = 2 if PAIRED else 1
    L: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 8, 4], [1, 1, 1], [2, 1, 0])
    S: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [1, 1], [1, 0])
    way = gl.arange(0, WAYS, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    word = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    line = gl.arange(0, WAYS * SIDES, gl.SliceLayout(1, S))[:, None]
    pair = gl.arange(0, 8, gl.SliceLayout(0, S))[None, :]
    if PAIRED:
        row = row % 8 + row // 8 * (OUT // 2)
    inside = way * (OUT * 32) + row * 32 + word
    pair_inside = line % WAYS * HALF + line // WAYS * (OUT // 4) + pair
    STEPS: gl.constexpr = (CHUNKS + WAYS - 1) // WAYS
    for begin in gl.static_range(0, STEPS, ROUND):
        for unit in range(dealt, OUT // 16, P):
            for step in range(begin, min(begin + ROUND, STEPS)):
                async_copy.wait_group(AHEAD - 1)
                mbarrier.wait(empty.index(stage), phase)
                from_words = words + (step * (WAYS * OUT * 32) + unit * (512 // SIDES)) + inside
                from_pairs = pairs + (step * (WAYS * HALF) + unit // SIDES * 8) + pair_inside
                to_pairs = pairs_s.index(stage).slice(0, WAYS * SIDES, 0)
                if CHUNKS % WAYS == 0:
                    copy(words_s.index(stage), from_words)
                    copy(to_pairs, from_pairs)
                else:  # chunks past the end become zeros
                    left = CHUNKS - step * WAYS
                    copy(words_s.index(stage), from_words, mask=way + row * 0 + word * 0 < left)
                    copy(to_pairs, from_pairs, mask=line % WAYS + pair * 0 < left)
                async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
                async_copy.commit_group()
                stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase, pass_on(dealt, OUT, P)


@gluon.jit
def _stream_slots(
    cache, steps, ring, stage, phase, begin, stop, D: gl.constexpr, STAGES: gl.constexpr, CODES: gl.constexpr
):
    """Bring a stage full of keys or values [slots, D] from slot `begin` on; with CODES also their scales,
    from `steps`.
    """
    words_s, pairs_s, full, empty = ring
    COUNT: gl.constexpr = words_s.shape[1] * (1024 if CODES else 512) // D
    AT_ONCE: gl.constexpr = 16 if CODES else 8
    L: gl.constexpr = gl.BlockedLayout([1, AT_ONCE], [32 * AT_ONCE // D, D // AT_ONCE], [1, 1], [1, 0])
    row = begin + gl.arange(0, COUNT, gl.SliceLayout(1, L))[:, None]
    d = gl.arange(0, D, gl.SliceLayout(0, L))[None, :]
    async_copy.wait_group(AHEAD - 1)
    mbarrier.wait(empty.index(stage), phase)
    to = view(words_s.index(stage), cache.dtype.element_ty, [COUNT, D], CODE_SLOTS if CODES else SLOTS)
    copy(to, cache + row * D + d, mask=row + d * 0 < stop)
    if CODES:
        at = begin + gl.arange(0, COUNT, gl.BlockedLayout([1], [32], [1], [0]))
        copy(view(pairs_s.index(stage), gl.float32, [COUNT], PLAIN), steps + at, mask=at < stop)
    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
    async_copy.commit_group()
    return next_stage(stage, phase, STAGES)


@gluon.jit
def _stream_part(
    layer, head, begin, stop, ring, stage, phase, LENGTH, D: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr,
    CODES: gl.constexpr,
):  # fmt: skip
    """Bring slots begin..stop of one head of a sequence, keys and values in turn."""
    COUNT: gl.constexpr = ring[0].shape[1] * (1024 if CODES else 512) // D
    keys, values, key_steps, value_steps = cached(layer, head, LENGTH, D, DTYPE, CODES)
    for start in range(begin, stop, COUNT):
        stage, phase = _stream_slots(keys, key_steps, ring, stage, phase, start, stop, D, STAGES, CODES)
        stage, phase = _stream_slots(values, value_steps, ring, stage, phase, start, stop, D, STAGES, CODES)
    return stage, phase


@gluon.jit
def stream(
    table, slot, first, ring, LAYERS, LENGTH, SHAPES: gl.constexpr, KV: gl.constexpr, D: gl.constexpr,
    SPLIT: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr, CODES: gl.constexpr,
    BATCH: gl.constexpr, ROUND: gl.constexpr,
):  # fmt: skip
    """Fill the ring with everything that `_compute` takes out of it, in its order."""
    stage, phase = 0, 1
    dealt = gl.program_id(0)
    if BATCH == 1:
        h, _part, _now, begin, stop = own_slots(slot, first, KV, SPLIT)
    for layer in range(LAYERS):
        here = table + layer * LINE
        for p in gl.static_range(4):
            words, pairs = address(here, 2 * p, gl.int16), address(here, 2 * p + 1, gl.int32)
            stage, phase, dealt = _stream_product(words, pairs, ring, stage, phase, dealt, SHAPES, p, P, STAGES, ROUND)
            if p == 0:
                if BATCH == 1:
                    stage, phase = _stream_part(
                        here, h, begin, stop, ring, stage, phase, LENGTH, D, STAGES, DTYPE, CODES
                    )
                else:
                    for task in range(gl.program_id(0), BATCH * KV * SPLIT, P):
                        pair, _part, _now, begin, stop = task_slots(task, slot, first, KV, SPLIT)
                        stage, phase = _stream_part(
                            here, pair, begin, stop, ring, stage, phase, LENGTH, D, STAGES, DTYPE, CODES
                        )


@gluon.jit
def meet(counter, done, go, MEETINGS, P: gl.constexpr):
    """As often as asked: once `_compute` is done with a phase say so, wait for all programs, and let it go on."""
    target, phase = 0, 0
    for _ in range(MEETINGS):
        mbarrier.wait(done, phase)
        gl.atomic_add(counter, 1, sem="release")
        target += P
        there = gl.inline_asm_elementwise(_LOOK, "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1)
        while there < target:
            there = gl.inline_asm_elementwise(_LOOK, "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1)
        mbarrier.arrive(go)
        phase ^= 1
    gone = gl.atomic_add(counter + 1, 1, sem="acq_rel")
    if gone == P - 1:  # nobody looks at the counter any more
        gl.store(counter, 0)
        gl.store(counter + 1, 0)
