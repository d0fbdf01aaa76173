"""What a GRACE step costs over plain bf16 fine-tuning, with AdamW, side by side in one process.

    python tests/gpu/bench_step.py --out bench_step.json          # one GPU with 141 GB
    python tests/gpu/bench_step.py --out qwen.json --shape qwen2vl-2b
    python tests/gpu/bench_step.py --out tiny.json --shape tiny   # two small layers, for a CPU

The pipeline's own trainer runs each recipe on one model: `plain` (bf16), `GRACE` (gated DKD, relational CKA,
controller, INT4) and `plain` again, whose two times show the spread; with --padded also `plain` as it is without
`pass_tokens`. Weights, images and the teacher's states are random; the teacher's record is a real cache on the disk,
read as in training. Conversations have the lengths of a shape's range, drawn evenly; half of their text is supervised;
the tower runs in every step. MFU is 6 FLOPs per trained weight of a matrix and token over the bf16 GEMM rate measured
in the same process.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as `grace` does
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from grace.bench.machine import describe
from grace.config.job_parameters import TrainRun
from grace.config.schema import Method, Optimisation, Quantization
from grace.data import Example
from grace.data.images import EncodedImage
from grace.distill import confidence_gate
from grace.distill.relational_cka import gram_matrix
from grace.distributed import Sharding, join_world
from grace.files import file_entry, read_json
from grace.models import decoder_linears, vocabulary
from grace.teacher.index import INDEX_FILE, write_index
from grace.teacher.reader import HEAD_FILE, TeacherCache
from grace.teacher.shard import ShardBuilder, shard_name, write_shard
from grace.train.distillation import Distillation
from grace.train.loop import Trainer
from grace.train.objective import Objective
from grace.world import World


@dataclass(frozen=True)
class Shape:
    """Of student and teacher: widths, vocabulary, tokens."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    vision: dict
    teacher_width: int
    lengths: tuple[int, int]  # of conversations, visual tokens included
    visual: int  # tokens of an image
    group: int
    batch: int
    pass_tokens: int
    key_value_heads: int | None = None  # of Qwen2-VL; None: LLaVA


CLIP_L = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
              patch_size=14, projection_dim=768)  # fmt: skip
CLIP_TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56,
                 patch_size=14, projection_dim=32)  # fmt: skip
VIT_QWEN = dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16, mlp_ratio=4, patch_size=14)
VIT_TINY = dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2, patch_size=14)
SHAPES = {
    "llava15-7b": Shape(4096, 11008, 32, 32, 32_064, CLIP_L, 5120, (650, 2048), 576, 128, 32, 8192),
    "qwen2vl-2b": Shape(1536, 8960, 28, 12, 151_936, VIT_QWEN, 3584, (330, 1730), 256, 128, 64, 16384, 2),
    "tiny": Shape(64, 128, 2, 4, 512, CLIP_TINY, 96, (24, 48), 16, 32, 8, 96),
    "tiny-qwen": Shape(64, 128, 2, 4, 512, VIT_TINY, 96, (24, 48), 16, 32, 8, 96, 2),
}
START = 1  # tokens before an image
WHOLE = Sharding()
RECIPES = {
    "plain": {},
    "GRACE": dict(kd="gated", rcka=True, controller=True, bits=4),
}


def build_model(shape: Shape, device: torch.device) -> PreTrainedModel:
    """The shape's model in bf16, with random weights."""
    image = shape.vocabulary - 1
    common = dict(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, max_position_embeddings=4096,
    )  # fmt: skip
    if shape.key_value_heads:
        half = shape.hidden // shape.heads // 2
        sections = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]
        rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}
        text = common | dict(num_key_value_heads=shape.key_value_heads, rope_parameters=rope)
        ids = dict(image_token_id=image, video_token_id=image - 1, vision_start_token_id=image - 2)
        make = partial(
            Qwen2VLForConditionalGeneration,
            Qwen2VLConfig(text_config=text, vision_config=shape.vision, tie_word_embeddings=True, **ids),
        )
    else:
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**shape.vision), text_config=LlamaConfig(**common), image_token_id=image,
            image_seq_length=shape.visual, vision_feature_layer=-2, vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )  # fmt: skip
        make = partial(LlavaForConditionalGeneration, config)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return make()
    finally:
        torch.set_default_dtype(torch.float32)


class RandomImage(EncodedImage):
    """Stands in for an image file: decoding JPEGs is not what is measured."""

    def open(self) -> str:
        return self.name


class Vocabulary:
    """What is asked of a tokenizer here."""

    pad_token_id, added_tokens_decoder = 0, {}

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def build_processor(shape: Shape) -> SimpleNamespace:
    """What `collate` asks of a processor, with random pixels kept ready."""
    generator, most = torch.Generator().manual_seed(1), shape.batch
    if shape.key_value_heads:
        side = 2 * round(shape.visual**0.5)  # patches; four are merged into a token
        pixels = torch.randn(most, side * side, 3 * 2 * 14 * 14, generator=generator)

        def images(images, return_tensors):
            grid = torch.tensor([[1, side, side]] * len(images))
            return {"pixel_values": pixels[: len(images)].flatten(0, 1), "image_grid_thw": grid}
    else:
        size = shape.vision["image_size"]
        pixels = torch.randn(most, 3, size, size, generator=generator)

        def images(images, return_tensors):
            return {"pixel_values": pixels[: len(images)]}

    return SimpleNamespace(tokenizer=Vocabulary(shape.vocabulary), image_processor=images)


def build_examples(shape: Shape, count: int) -> list[Example]:
    """Conversations: a start token, the image, and text of which the second half is supervised."""
    generator = torch.Generator().manual_seed(2)
    examples = []
    for number in range(count):
        length = int(torch.randint(*shape.lengths, (1,), generator=generator))
        ids = torch.randint(1, shape.vocabulary - 8, (length,), generator=generator)
        ids[START : START + shape.visual] = shape.vocabulary - 1
        labels = ids.clone()
        text = START + shape.visual
        labels[: text + (length - text) // 2] = -100
        image = RandomImage(f"image {number}", b"", None, f"{number:064x}")
        examples.append(Example(f"{number}", f"{number:064x}", ids, labels, caption=False, images=(image,)))
    return examples


def build_cache(folder: Path, shape: Shape, examples: list[Example], device: torch.device) -> TeacherCache:
    """A teacher cache in the format `hidden` of a random teacher."""
    generator = torch.Generator(device).manual_seed(3)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    width = shape.teacher_width
    head = (random(shape.vocabulary, width) * width**-0.5).bfloat16()
    counts = [example.supervised_tokens() for example in examples]
    builder = ShardBuilder([example.key for example in examples], counts)
    for index, count in enumerate(counts):
        hidden = (2 * random(count, width)).bfloat16()
        builder.put(index, hidden=hidden.cpu(), gates=confidence_gate(hidden @ head.T).cpu())
        builder.put_grams(index, [str(index)], [gram_matrix(random(shape.visual, 64))])
    name = shard_name(0, 1)
    write_shard(folder, name, builder.finished(), pins={})
    from safetensors.torch import save_file

    save_file({"weight": head.cpu()}, folder / HEAD_FILE)
    entry = read_json(folder / f"{name}.json")
    write_index(folder, [entry])
    files = {name: file_entry(folder / name) for name in (HEAD_FILE, INDEX_FILE)}
    manifest = dict(format="hidden", vocabulary=shape.vocabulary, width=width, temperature=None, records=len(examples),
                    supervised_tokens=sum(counts), shards=[entry], files=files)  # fmt: skip
    return TeacherCache(folder, manifest)


class Stopwatch:
    """Seconds and peak memory of one method's calls, the device waited for on both sides."""

    def __init__(self, owner: object, method: str, device: torch.device) -> None:
        self.work, self.device, self.seconds, self.peak = getattr(owner, method), device, 0.0, 0.0
        setattr(owner, method, self)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def __call__(self, *arguments):
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = self.work(*arguments)
        self._wait()
        self.seconds += time.perf_counter() - start
        if self.device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() / 2**30)
        return result


def run_recipe(
    name: str, model: PreTrainedModel, shape: Shape, examples: list[Example], cache: TeacherCache, steps: int,
    world: World, scratch: Path, warm: int = 2, apart: int = 1, sharding: Sharding = WHOLE, traced: bool = False,
    **change: object,
) -> dict:  # fmt: skip
    """`steps` timed optimiser steps after `warm` of warm-up, then, where `apart` is 1, one taken apart.

    With `traced` the profiler takes that step apart: the share of its time in which anything was communicated. `change`
    are other values of `optimisation`.
    """
    wanted: dict = dict(batch=shape.batch, micro_batch=2, learning_rate=1e-6, checkpoint_every=10**6,
                        pass_tokens=shape.pass_tokens) | change  # fmt: skip
    optimisation = Optimisation(steps=warm + steps + apart, **wanted)
    run = TrainRun(family="llava", compute_dtype="bfloat16", seed=0, optimisation=optimisation, method=Method(),
                   quantization=Quantization(group_size=shape.group), **RECIPES[name])  # fmt: skip
    cuda = world.device.type == "cuda"
    gc.collect()  # the trainer before this one
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    log = scratch / f"{name}.jsonl"
    processor = build_processor(shape)
    size = vocabulary(processor)
    objective = Distillation(model, run, size, cache) if run.kd != "none" else Objective(model, run, size)
    where = scratch / "checkpoints"
    trainer = Trainer(model, processor, examples, run, objective, log, where, "bench", world, sharding)
    rounds: list[int] = []
    watches: list[Stopwatch] = []
    peaks: list[float] = []
    plain_step = trainer._step
    shares: list[float] = []

    def step(number: int, chosen: list[Example], *rest) -> dict | None:
        rounds.append(sum(1 for _ in trainer._cuts(chosen)))
        if number == warm + steps and traced:
            peaks.append(trainer.meter.memory_gib())
            entry, share = communicating(partial(plain_step, number, chosen, *rest), world.device)
            shares.append(share)
            return entry
        if number == warm + steps:
            peaks.append(trainer.meter.memory_gib())
            watches.extend([Stopwatch(trainer.objective, "backward", world.device),
                            Stopwatch(trainer.optimizer, "step", world.device)])  # fmt: skip
        return plain_step(number, chosen, *rest)

    trainer._step = step
    trainer.train()
    trainer.optimizer.remove_hooks()
    peaks.append(trainer.meter.memory_gib())
    if not world.first:
        return {}
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    log.unlink()
    timed = entries[warm : warm + steps]
    taken = {}
    if shares:
        taken = {"communication": shares[0]}
    elif apart:
        taken = {"forward_backward_ms": 1e3 * watches[0].seconds, "optimiser_ms": 1e3 * watches[1].seconds}
    last = {key: entries[-1][key] for key in ("loss", "ce", "kd", "rcka", "beta", "grad_norm") if key in entries[-1]}
    per_token = [entry["seconds"] / entry["tokens"] for entry in timed]
    return {
        "recipe": name, "tokens_per_second": 1 / median(per_token),
        "step_ms": 1e3 * median(entry["seconds"] for entry in timed), "steps_ms": [1e3 * e["seconds"] for e in timed],
        "tokens": [entry["tokens"] for entry in timed], "passes": rounds[warm : warm + steps],
        "flops_per_token": trainer.meter.flops_per_token, **taken, "peak_gib": peaks[0],
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0,
        "losses": [entry["loss"] for entry in entries], "last": last,
    }  # fmt: skip


def communicating(step: Callable[[], dict | None], device: torch.device) -> tuple[dict | None, float]:
    """What a step returns, and the share of its time in which a collective ran, beside computation or not.

    On GPUs those are NCCL's kernels, on CPUs gloo's operations, of this process; those at the same time count once.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        start = time.perf_counter()
        entry = step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    wanted = "ncclDevKernel" if device.type == "cuda" else "gloo:"
    spans = sorted(
        (event.time_range.start, event.time_range.end) for event in trace.events() or () if wanted in event.name
    )
    busy, until = 0.0, 0.0
    for begin, end in spans:  # in microseconds
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return entry, busy / 1e6 / seconds


def gemm_rate(device: torch.device) -> float:
    """FLOP/s of a bf16 GEMM of 8192 x 8192 x 8192 on random data, the best of three medians; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * 8192**3 / (min(median(times[i : i + 10]) for i in (0, 10, 20)) / 1e3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shape", choices=SHAPES, default="llava15-7b")
    parser.add_argument("--steps", type=int, default=4, help="timed optimiser steps of each recipe")
    parser.add_argument("--kept", type=float, default=0.0, help="kept_activations")
    parser.add_argument("--padded", action="store_true", help="also plain steps without pass_tokens")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    world = join_world()
    device = world.device
    rate = gemm_rate(device)
    model = build_model(shape, device)
    examples = build_examples(shape, 2 * shape.batch)
    padded = {"pass_tokens": None, "gradient_checkpointing": True}
    plan = [("plain", padded)] if arguments.padded else []
    plan += [(name, {"kept_activations": arguments.kept}) for name in ("plain", "GRACE", "plain")]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        cache = build_cache(Path(scratch) / "cache", shape, examples, device)
        for name, change in plan:
            row = run_recipe(name, model, shape, examples, cache, arguments.steps, world, Path(scratch), **change)
            row["mfu"] = row["tokens_per_second"] * row["flops_per_token"] / rate if rate else None
            rows.append(row | {"change": change})
            print(json.dumps(rows[-1]), flush=True)
    first, grace, again = rows[-3:]
    plain = (first["step_ms"] + again["step_ms"]) / 2
    summary = {
        "gemm_tflop_s": rate / 1e12, "plain_ms": plain,
        "plain_spread": abs(first["step_ms"] - again["step_ms"]) / plain,
        "plain_mfu": first["mfu"], "grace_mfu": grace["mfu"], "grace_over_plain": grace["step_ms"] / plain,
        "grace_extra_gib": grace["peak_gib"] - max(first["peak_gib"], again["peak_gib"]),
        "peak_gib": grace["peak_gib"],
    }  # fmt: skip
    if arguments.padded:
        summary["padded_over_packed"] = rows[0]["step_ms"] / plain
    about = {
        "shape": arguments.shape, "batch": shape.batch, "pass_tokens": shape.pass_tokens, "lengths": shape.lengths,
        "visual_tokens": shape.visual,
        "quantised_weights": sum(m.weight.numel() for m in decoder_linears(model).values()),
        **describe(device),
    }  # fmt: skip
    arguments.out.write_text(json.dumps({"summary": summary, "recipes": rows, "about": about}, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    return 0 if all(torch.isfinite(torch.tensor(row["last"]["loss"])) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
