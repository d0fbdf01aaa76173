"""What a training or a cache will take, by arithmetic: memory, FLOPs, seconds, bytes.

    weights       2 bytes each in bf16; of a trained one also 16: fp32 master, gradient sum and Adam's two moments
    theta         the same 16 per quantised group
    activations   a layer's input for every layer, and of the compiled layers the share `kept_activations` of what they
                  compute; while a layer's backward pass runs, all that it computes
    FLOPs         6 per trained weight of a matrix and token, 2 per decoder weight and token of the teacher

A layer computes 8 d + 3 m numbers a token (projections, attention, both norms, residuals; gate, up and their product),
d and m being its widths. What share of the GPU's bf16 rate is reached was measured (`MFU`, by the width of the model);
how it scales was not.
"""

from dataclasses import dataclass
from math import log2

from grace.config.sections import Optimisation

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: a word of what the driver calls it.
        rate: FLOP/s of a large bf16 product; measured for H200, three quarters of the data sheet for the others.
        memory: GiB that a process can have.
    """

    name: str
    rate: float
    memory: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 740e12, 139), Gpu("H100", 740e12, 79), Gpu("A100", 234e12, 79), Gpu("L40S", 272e12, 44),
        Gpu("B200", 1690e12, 178),
    )
}  # fmt: skip
MFU = {1536: 0.44, 4096: 0.54}  # packed rows, by the decoder's width; H200, docs/log/2026-11-30-training.md
PADDED = 0.25  # of what packed rows reach, where conversations are padded: an old measurement on an H100
CACHE = 0.55  # of the rate, writing the teacher's cache: not measured yet
EACH_DOUBLING = 0.95  # of twice the speed, by twice the GPUs: not measured yet
CHECKPOINTS = 3  # two are kept while a third is written


@dataclass(frozen=True)
class ModelSize:
    """Numbers of weights, and widths.

    Attributes:
        weights: all.
        trained: those that training changes.
        matrices: of the trained ones those in matrices.
        decoder: of the decoder's linears, which are quantised.
        hidden, intermediate, layers: of the decoder.
        head: rows of the head.
    """

    weights: int
    trained: int
    matrices: int
    decoder: int
    hidden: int
    intermediate: int
    layers: int
    head: int


@dataclass(frozen=True)
class DataSize:
    """What there is to train on, after mixing.

    Attributes:
        conversations, tokens, supervised, images: totals.
        visual: tokens of an image, on average.
        longest: tokens of the longest conversation.
        sampled: conversations that the totals were drawn from; None: all were counted.
    """

    conversations: int
    tokens: int
    supervised: int
    images: int
    visual: float
    longest: int
    sampled: int | None = None


@dataclass(frozen=True)
class Need:
    """What one job takes.

    Attributes:
        tokens, flops: in all.
        gib: peak memory of a GPU; None: not predicted.
        hours: of the job.
        bytes: that it leaves on the disk.
        passing: bytes that lie there only while it runs.
    """

    tokens: float
    flops: float
    gib: float | None
    hours: float
    bytes: float
    passing: float = 0.0


def mfu(hidden: int) -> float:
    """The share of the bf16 rate that training in packed rows reaches, between the two widths that were measured."""
    (narrow, low), (wide, high) = MFU.items()
    at = (log2(hidden) - log2(narrow)) / (log2(wide) - log2(narrow))
    return low + (high - low) * min(max(at, 0.0), 1.0)


def training_memory(
    model: ModelSize, optimisation: Optimisation, longest: int, gpus: int, bits: int | None, group: int,
    teacher_head: int = 0,
) -> float:  # fmt: skip
    """Peak GiB of one GPU.

    Args:
        longest: tokens of a conversation, where conversations are padded.
        bits, group: of the quantised weights; `bits` None for bf16.
        teacher_head: numbers in the teacher's head, where training multiplies by it.
    """
    others = model.weights - model.decoder  # whole on every GPU
    state = 16 * ((model.trained - model.decoder) + model.decoder / gpus)
    state += 2 * (others + model.decoder / gpus)
    if gpus > 1:
        state += 2 * 3 * model.decoder / model.layers  # layers that are whole for their turn, and their gradients
    if bits is not None:
        state += 16 * model.decoder / group / gpus
    tokens = optimisation.pass_tokens or optimisation.micro_batch * longest
    computed = 2 * tokens * (8 * model.hidden + 3 * model.intermediate)  # by one layer
    if optimisation.pass_tokens is not None:
        kept = model.layers * optimisation.kept_activations * computed
    else:  # layers as they come keep more: norms in fp32, masks
        kept = 0.0 if optimisation.gradient_checkpointing else 1.3 * model.layers * computed
    inputs = 2 * tokens * model.hidden * model.layers
    head = 2 * model.head * model.hidden  # its gradient, beside the sum
    return (state + inputs + kept + computed + head + 2 * teacher_head) / GIB


def training(
    model: ModelSize, optimisation: Optimisation, data: DataSize, gpu: Gpu, gpus: int, bits: int | None, group: int,
    teacher_head: int = 0,
) -> Need:  # fmt: skip
    """One trained model; `optimisation` may count in epochs or in steps."""
    mean = data.tokens / data.conversations
    if optimisation.epochs is not None:
        tokens = optimisation.epochs * data.tokens
    else:
        tokens = optimisation.total * optimisation.batch * mean
    flops = 6.0 * model.matrices * tokens
    share = mfu(model.hidden) * (1.0 if optimisation.pass_tokens else PADDED)
    seconds = flops / (gpu.rate * share * gpus * EACH_DOUBLING ** log2(gpus))
    memory = training_memory(model, optimisation, data.longest, gpus, bits, group, teacher_head)
    left = 2.0 * model.weights + (model.decoder * (1 + 2 / group) if bits is not None else 0.0)
    return Need(tokens, flops, memory, seconds / 3600, left, CHECKPOINTS * 12.0 * model.trained)


def cache_bytes(data: DataSize, width: int, form: str) -> float:
    """Of the teacher's cache in the format `form`, shards alone."""
    token = {"hidden": 2.0 * width + 4, "hidden-int8": width + 2 * -(-width // 32) + 4, "sampled": 4.0 * (4 + 64)}[form]
    n = data.visual
    return data.supervised * token + data.images * (n * (n - 1) / 2 + 4 * n + 4) + data.conversations * 100.0


def caching(model: ModelSize, data: DataSize, gpu: Gpu, form: str, shards: int, pass_tokens: int, disk: float) -> Need:
    """One of the `shards` jobs that write the cache; `disk` is in bytes/s."""
    tokens = data.tokens / shards
    flops = 2.0 * model.decoder * tokens
    size = cache_bytes(data, model.hidden, form) / shards
    seconds = max(flops / (gpu.rate * CACHE), size / disk)
    states = 2 * pass_tokens * model.hidden * (model.layers + 1) + 2 * pass_tokens * (
        8 * model.hidden + 3 * model.intermediate
    )
    head = 4 * model.head * model.hidden + 3 * 4 * min(
        2**26, pass_tokens * model.head
    )  # in fp32, and logits of some rows
    return Need(tokens, flops, (2 * model.weights + states + head) / GIB, seconds / 3600, size, size)
