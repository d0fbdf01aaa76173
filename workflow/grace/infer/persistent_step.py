"""All layers of one sequence's step in one launch, where model and GPU allow it: `grace.kernels.decode_layers`."""

import warnings
from typing import Any

import torch
from torch import nn
from transformers import StaticCache

from grace.infer.int4_linear import Int4Linear
from grace.kernels.decode_attention import LOG2_E
from grace.kernels.w4a16 import gluon, gpu
from grace.kernels.w4a16_layout import CHUNK

# What a GPU has run. What `serves` calls unmeasured, and fp16, compiles and waits for one.
WIDEST = (8192, 8192, 16384)  # residual stream, heads side by side, inner: padded, in registers of four warps
DTYPE = torch.bfloat16
STAGES = 10  # more do not help
HEAD_DIMS = (64, 128)
MOST_SEQUENCES = 8  # columns of the tensor core
CODES_DIM = 128  # of heads whose keys and values have 8 bits
MOST_QUERIES = 16  # of a key-value head: rows of the tensor core
TILE = 16  # outputs of a unit
MOST_PARTS = 8  # of a head's slots. Every program reads the parts of all heads: more cost more than they spare


class PersistentLayers:
    """Everything between tokens and the input of the output head, for sequences whose model `serves` accepts.

    Args:
        decoder: its linears joined by `grace.infer.fuse` and packed.
        embedding: [vocab, d].
        cache: initialised, at most 8 sequences, 16 bits or 8.
        cos, sin: of every position, [positions, D].
    """

    def __init__(self, decoder: Any, embedding: torch.Tensor, cache: Any, cos: torch.Tensor, sin: torch.Tensor) -> None:
        layers, device = list(decoder.layers), embedding.device
        self.batch, heads, self.length, width = cache.layers[0].keys.shape
        qkv, o, _, down = _linears(layers[0])
        hidden, wide, inner = o.out_features, o.in_features, down.in_features
        here = gpu(device)[0]
        self.kernel = _kernel().layers_kernel if self.batch == 1 else _batch_kernel().batch_kernel
        self.programs = here.multiprocessors
        self.constants = constants(
            hidden, inner, heads, wide // width // heads, width, here.shared, self.programs, self.batch,
            biased=qkv.bias is not None, normed=hasattr(layers[0].self_attn, "q_norm"),
            codes=cache.layers[0].keys.dtype == torch.int8,
        )  # fmt: skip
        self.embedding, self.norm, self.turns, self.layers = embedding, decoder.norm.weight, (cos, sin), len(layers)
        self.scale, self.eps = layers[0].self_attn.scaling * LOG2_E, decoder.norm.variance_epsilon
        self.table = torch.tensor([_addresses(*pair) for pair in zip(layers, cache.layers, strict=True)], device=device)
        rows, split, fp32 = _rows(self.batch), self.constants["SPLIT"], {"dtype": torch.float32, "device": device}
        self.between = [embedding.new_empty(rows * n) for n in (qkv.out_features, hidden, inner)]
        self.between.append(
            embedding.new_empty(hidden) if self.batch == 1 else torch.empty(hidden // TILE * rows, **fp32)
        )
        self.parts = [torch.zeros(rows * split * n, **fp32) for n in (wide, wide // width)]
        if self.batch > 1 and split == 1:  # nothing to join
            self.parts[0] = self.parts[0].to(embedding.dtype)
        self.counter = torch.zeros(2, dtype=torch.int32, device=device)

    def __call__(
        self, token: torch.Tensor, position: torch.Tensor, slot: torch.Tensor, first: torch.Tensor
    ) -> torch.Tensor:
        """The normed output [B, d] for int64 tokens [B], at positions [B]; their keys and values go to `slot` [].

        `first` [B] is each sequence's first slot that is not padding.
        """
        hidden = self.embedding.new_empty(self.batch, self.embedding.shape[1])
        self.kernel[(self.programs,)](
            self.table, token, self.embedding, self.norm, *self.between, hidden, *self.turns, position, slot, first,
            *self.parts, self.counter, self.layers, self.length, self.scale, self.eps,
            **self.constants, num_warps=4, launch_cooperative_grid=True,
        )  # fmt: skip
        return hidden


def prepare(
    decoder: nn.Module,
    embedding: torch.Tensor,
    cache: StaticCache,
    turns: tuple[torch.Tensor, torch.Tensor],
    *places: torch.Tensor,
    unmeasured: bool = False,
) -> PersistentLayers | None:
    """The layers in one launch, tried once over an empty cache; None where `serves` refuses, or the GPU the launch.

    It does where not all multiprocessors are this process's (MPS): all programs have to run at once.

    Args:
        turns: cosines and sines; places: token, position, slot and first slot, as `PersistentLayers` takes them.
        unmeasured: as `serves` takes it.
    """
    if not serves(decoder, embedding, cache, unmeasured):
        return None
    layers = PersistentLayers(decoder, embedding, cache, *turns)
    try:
        layers(*places)
    except Exception as error:  # of Triton's compiler, its launcher or the driver
        warnings.warn(f"decoding takes a launch per kernel, since one for all layers failed: {error}", stacklevel=2)
        return None
    return layers


def serves(decoder: Any, embedding: torch.Tensor, cache: Any, unmeasured: bool = False) -> bool:
    """Whether `PersistentLayers` computes this decoder's steps, on its GPU, over this cache.

    It takes a Hopper GPU, bf16, one sequence in 16 bits (LLaVA's layers: up to 8, and up to 2 in 8 bits), at most 16
    heads for each key-value head, and INT4 linears in groups of 128, with biases of queries, keys and values alone, in
    sizes whose activations fit into registers and shared memory.

    Args:
        unmeasured: accept what no GPU has run, or not faster, too: up to 8 sequences, in 8 bits as well.
    """
    keys, here = cache.layers[0].keys, gpu(embedding.device)[0]
    if not here.hopper or None in (_kernel(), _batch_kernel()) or embedding.dtype != DTYPE:
        return False
    if len(keys) > (MOST_SEQUENCES if unmeasured else _measured(decoder, keys)):
        return False
    if keys.dtype != DTYPE and (keys.dtype != torch.int8 or keys.shape[3] != CODES_DIM):
        return False
    kinds = set()
    for layer in decoder.layers:
        linears, norms = _linears(layer), _norms(layer)
        biased, *others = (linear.bias is not None for linear in linears)
        alike = {norm.variance_epsilon for norm in norms} == {decoder.norm.variance_epsilon}
        if not all(_triton_int4(m) for m in linears) or any(others) or not alike:
            return False
        kinds.add((*((m.out_features, m.in_features) for m in linears), biased, len(norms)))
    heads, width = keys.shape[1], keys.shape[3]
    (qkv, o, gate_up, down, *_), *others = kinds
    (hidden, wide), inner = o, down[1]
    sizes = (heads, wide // width // heads, width, here.shared, here.multiprocessors, len(keys))
    return (
        not others
        and wide % (heads * width) == 0
        and wide <= MOST_QUERIES * heads * width
        and qkv == (wide + 2 * heads * width, hidden)
        and (gate_up, down) == ((2 * inner, hidden), (hidden, inner))
        and width in HEAD_DIMS
        and heads <= here.multiprocessors
        and all(pad <= most for pad, most in zip(_pads(hidden, wide, inner), WIDEST, strict=True))
        and constants(hidden, inner, *sizes)["STAGES"] >= 4
    )


def _measured(decoder: Any, keys: torch.Tensor) -> int:
    """Sequences up to which a GPU has run such layers over such a cache, faster than a launch per kernel."""
    layer = decoder.layers[0]
    llama = _linears(layer)[0].bias is None and len(_norms(layer)) == 2
    if keys.dtype == DTYPE:
        return MOST_SEQUENCES if llama else 1
    return 2 if llama else 0


def constants(
    hidden: int, inner: int, heads: int, group: int, width: int, shared: int, programs: int, batch: int = 1,
    biased: bool = False, normed: bool = False, codes: bool = False,
) -> dict:  # fmt: skip
    """What the kernel is compiled for.

    Args:
        heads: of keys and values; group: heads of queries for each; width: of a head.
        shared: bytes of shared memory that a program may have; batch: sequences.
        biased: queries, keys and values have biases; normed: queries and keys have norms; codes: the cache has 8 bits.
    """
    kernel, wide = _kernel(), heads * group * width
    pads, chunks = _pads(hidden, wide, inner), hidden // CHUNK
    shapes = (  # outputs, chunks of inputs, whether one half of the outputs gates the other, whether it has a bias
        (wide + 2 * heads * width, chunks, False, biased), (hidden, wide // CHUNK, False, False),
        (2 * inner, chunks, True, False), (hidden, inner // CHUNK, False, False),
    )  # fmt: skip
    told = {
        "SHAPES": shapes, "HIDDEN": hidden, "INNER": inner, "KV": heads, "G": group, "D": width, "NORMED": normed,
        "PADS": pads, "SPLIT": min(MOST_PARTS, programs // heads), "WAYS": kernel.WAYS, "STAGES": stages(pads, shared),
        "P": programs, "CODES": codes,
    }  # fmt: skip
    if batch == 1:
        return told
    units = batch_units(shapes, programs)
    more = {
        "BATCH": batch,
        "UNITS": units,
        "STAGES": batch_stages(units, shared),
        "SPLIT": parts(batch * heads, programs),
    }
    return told | more


def parts(pairs: int, programs: int) -> int:
    """Into how many parts a batch's heads are cut, so that the program with most to do is done early.

    What comes before and after a part's slots is taken for a quarter of a head's slots, which is not measured.
    """
    return min(range(1, MOST_PARTS + 1), key=lambda split: -(-pairs * split // programs) * (1 / split + 1 / 4))


def _linears(layer: Any) -> tuple[Any, Any, Any, Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return attention.q_proj.linear, attention.o_proj, mlp.gate_proj.linear, mlp.down_proj


def _norms(layer: Any) -> list[Any]:
    """Of a layer's input and its MLP's, and of queries and keys where it has them."""
    attention = layer.self_attn
    heads = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
    return [layer.input_layernorm, layer.post_attention_layernorm, *heads]


def _triton_int4(linear: nn.Module) -> bool:
    return (
        isinstance(linear, Int4Linear)
        and linear.backend == "triton"
        and linear.group_size == CHUNK
        and linear.scales.dtype == DTYPE
    )


def _addresses(layer: nn.Module, kept: Any) -> list[int]:
    """A layer's line of the kernel's table: see `decode_ring.FIELDS`. What the layer lacks is zero, and never read."""
    linears = _linears(layer)
    packed = [t for linear in linears for t in (linear.weight, linear.scales)]
    before, after, *of_heads = (norm.weight for norm in _norms(layer))
    steps = [kept.key_steps, kept.value_steps] if kept.keys.dtype == torch.int8 else [None, None]
    extra = [linears[0].bias, *(of_heads or (None, None)), *steps]
    return [0 if t is None else t.data_ptr() for t in (*packed, before, after, kept.keys, kept.values, *extra)]


def _pads(*sizes: int) -> tuple[int, ...]:
    """Sizes rounded up to powers of two, and to the inputs of a stage."""
    return tuple(max(_kernel().WAYS * CHUNK, 1 << (n - 1).bit_length()) for n in sizes)


def stages(pads: tuple[int, ...], shared: int) -> int:
    """Stages for which shared memory has room beside the activations, 2 bytes each, and one sum per chunk."""
    left = shared - max(pads) * 2 - max(pads) // CHUNK * 4 - _kernel().SHARED_REST
    return min(STAGES, left // _kernel().STAGE_BYTES)


def batch_units(shapes: tuple[tuple, ...], programs: int) -> int:
    """The most units that a program has of a product that goes in rounds, at least 1."""
    once = _batch_kernel().ROUND * _kernel().WAYS
    return max([1, *(-(-outputs // TILE // programs) for outputs, chunks, *_ in shapes if chunks > once)])


def batch_stages(units: int, shared: int) -> int:
    """As `stages`, beside a round's activations of eight sequences and the sums of so many units."""
    kernel = _batch_kernel()
    left = shared - kernel.ROUND_BYTES - units * kernel.SUMS_BYTES - _kernel().SHARED_REST
    return min(STAGES, left // _kernel().STAGE_BYTES)


def _rows(batch: int) -> int:
    """A batch rounded up to a power of two."""
    return 1 << (batch - 1).bit_length()


def _batch_kernel() -> Any:
    """The batch's kernel's module, or None as `_kernel`."""
    return gluon("decode_layers_batch")


def _kernel() -> Any:
    """The kernel's module; None where Triton has no Gluon, and `serves` refuses."""
    return gluon("decode_layers")
