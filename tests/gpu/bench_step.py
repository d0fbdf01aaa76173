"""What GRACE costs over plain bf16 fine-tuning: whole optimiser steps of LLaVA-1.5-7B, side by side in one process.

    python tests/gpu/bench_step.py --out bench_step.json          # one GPU with 80 GB
    python tests/gpu/bench_step.py --out tiny.json --shape tiny   # two small layers, for a CPU

The pipeline's own trainer runs each recipe on one model: `plain` (bf16), `GRACE` (gated DKD, relational CKA, controller,
INT4), `distilled bf16` (GRACE without quantisation) and `plain` again, whose two times show the spread. Weights, images and the
teacher's states are random; the teacher's record is a real cache on the disk, read as in training. A step is 4
micro-batches of 2 conversations of 1,024 tokens (576 of them visual, 440 supervised), with gradient checkpointing.
The vision tower runs in every step.

Masters, gradients and bf16 weights of 7B take 64 GiB; Adam's two states would be 50 GiB more, so plain gradient descent
stands in for Adam, for every recipe alike: without Adam's traffic the ratio is the harder one.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as `grace` does
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from grace.bench.machine import describe
from grace.config.runs import TrainRun
from grace.config.schema import Method, Optimisation, Quantization
from grace.data import Example
from grace.data.images import EncodedImage
from grace.distill import confidence_gate
from grace.distributed import World, join_world
from grace.files import sha256
from grace.models import decoder_linears
from grace.teacher.formats import gram
from grace.teacher.reader import HEAD_FILE, TeacherCache
from grace.teacher.shard import ShardBuilder, read_sidecar, shard_name, write_shard
from grace.train.loop import Trainer


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
    tokens: int
    group: int

    @property
    def visual(self) -> int:
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


CLIP_L = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
              patch_size=14, projection_dim=768)  # fmt: skip
CLIP_TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56,
                 patch_size=14, projection_dim=32)  # fmt: skip
SHAPES = {
    "llava15-7b": Shape(4096, 11008, 32, 32, 32_064, CLIP_L, 5120, 1024, 128),
    "tiny": Shape(64, 128, 2, 4, 512, CLIP_TINY, 96, 48, 32),
}
BATCH, MICRO_BATCH, PROMPT = 8, 2, 8
RECIPES = {
    "plain": {},
    "distilled bf16": dict(kd="gated", rcka=True, controller=True),
    "GRACE": dict(kd="gated", rcka=True, controller=True, bits=4),
}


def build_model(shape: Shape, device: torch.device) -> LlavaForConditionalGeneration:
    """The shape's model in bf16, with random weights."""
    text = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, max_position_embeddings=4096,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape.vision), text_config=text, image_token_id=shape.vocabulary - 1,
        image_seq_length=shape.visual, vision_feature_layer=-2, vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)


class RandomImage(EncodedImage):
    """Stands in for an image file: decoding JPEGs is not what is measured."""

    def open(self) -> str:
        return self.name


def build_processor(shape: Shape) -> SimpleNamespace:
    """What `collate` asks of a processor, with random pixels kept ready."""
    side = shape.vision["image_size"]
    pixels = torch.randn(MICRO_BATCH, 3, side, side, generator=torch.Generator().manual_seed(1))
    return SimpleNamespace(
        tokenizer=SimpleNamespace(pad_token_id=0),
        image_processor=lambda images, return_tensors: {"pixel_values": pixels[: len(images)]},
    )


def build_examples(shape: Shape, count: int) -> list[Example]:
    """Conversations of `tokens` tokens: a start token, the image, a prompt, and an answer that is supervised."""
    generator = torch.Generator().manual_seed(2)
    examples = []
    for number in range(count):
        ids = torch.randint(1, shape.vocabulary - 1, (shape.tokens,), generator=generator)
        ids[1 : 1 + shape.visual] = shape.vocabulary - 1
        labels = ids.clone()
        labels[: 1 + shape.visual + PROMPT] = -100
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
        builder.put_gram(index, str(index), gram(random(shape.visual, 64)))
    name = shard_name(0, 1)
    write_shard(folder, name, builder.finished(), pins={})
    from safetensors.torch import save_file

    save_file({"weight": head.cpu()}, folder / HEAD_FILE)
    entry = read_sidecar(folder, name)
    about = {"bytes": (folder / HEAD_FILE).stat().st_size, "sha256": sha256(folder / HEAD_FILE)}
    manifest = dict(format="hidden", vocabulary=shape.vocabulary, width=width, temperature=None, records=len(examples),
                    supervised_tokens=sum(counts), shards=[entry], files={HEAD_FILE: about})  # fmt: skip
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
    name: str, model, shape: Shape, examples: list[Example], cache: TeacherCache, steps: int, world: World, scratch: Path
) -> dict:  # fmt: skip
    """`steps` timed optimiser steps after 2 of warm-up, then one taken apart."""
    warm, apart = 2, 1
    optimisation = Optimisation(
        steps=warm + steps + apart, batch=BATCH, micro_batch=MICRO_BATCH, learning_rate=1e-6,
        gradient_checkpointing=True, checkpoint_every=10**6,
    )  # fmt: skip
    run = TrainRun(family="llava", compute_dtype="bfloat16", seed=0, optimisation=optimisation, method=Method(),
                   quantization=Quantization(group_size=shape.group), **RECIPES[name])  # fmt: skip
    cuda = world.device.type == "cuda"
    gc.collect()  # the trainer before this one
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    log = scratch / f"{name}.jsonl"
    arguments = (model, build_processor(shape), examples, run, cache if run.kd != "none" else None)
    trainer = Trainer(*arguments, log, scratch / "checkpoints", "bench", world)
    groups = [{key: g[key] for key in ("params", "weight_decay", "peak")} for g in trainer.optimizer.adam.param_groups]
    trainer.optimizer.adam = torch.optim.SGD(groups, lr=1e-6, fused=True)
    found = {}
    plain_step = trainer._step

    def step(number: int, *rest) -> dict:
        if number == warm + steps:
            found["peak_gib"] = trainer.meter.memory_gib()
            found["watches"] = [Stopwatch(trainer.objective, "backward", world.device),
                                Stopwatch(trainer.optimizer, "step", world.device)]  # fmt: skip
        return plain_step(number, *rest)

    trainer._step = step
    trainer.train()
    if not world.first:
        return {}
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    log.unlink()
    timed = [entry["seconds"] for entry in entries[warm : warm + steps]]
    backward, optimise = found["watches"]
    last = {key: entries[-1][key] for key in ("loss", "ce", "kd", "rcka", "beta", "grad_norm") if key in entries[-1]}
    return {
        "recipe": name, "step_ms": 1e3 * median(timed), "steps_ms": [1e3 * t for t in timed],
        "forward_backward_ms": 1e3 * backward.seconds / apart, "optimiser_ms": 1e3 * optimise.seconds / apart,
        "peak_gib": found["peak_gib"], "peak_forward_backward_gib": backward.peak, "peak_optimiser_gib": optimise.peak,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0, "mfu": entries[-1 - apart].get("mfu"), "losses": [entry["loss"] for entry in entries],
        "last": last,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shape", choices=SHAPES, default="llava15-7b")
    parser.add_argument("--steps", type=int, default=6, help="timed optimiser steps of each recipe")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    world = join_world()
    device = world.device
    model = build_model(shape, device)
    examples = build_examples(shape, 2 * BATCH)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        cache = build_cache(Path(scratch) / "cache", shape, examples, device)
        for name in ("plain", "GRACE", "distilled bf16", "plain"):
            rows.append(run_recipe(name, model, shape, examples, cache, arguments.steps, world, Path(scratch)))
            print(json.dumps(rows[-1]), flush=True)
    first, grace, distilled, again = rows
    plain = (first["step_ms"] + again["step_ms"]) / 2
    summary = {
        "plain_ms": plain, "plain_spread": abs(first["step_ms"] - again["step_ms"]) / plain,
        "distilled_over_plain": distilled["step_ms"] / plain, "grace_over_plain": grace["step_ms"] / plain,
        "grace_extra_gib": grace["peak_gib"] - first["peak_gib"],
        "grace_extra_forward_backward_gib": grace["peak_forward_backward_gib"] - first["peak_forward_backward_gib"],
        "distilled_extra_gib": distilled["peak_gib"] - first["peak_gib"],
        "distilled_extra_forward_backward_gib":
            distilled["peak_forward_backward_gib"] - first["peak_forward_backward_gib"],
    }  # fmt: skip
    about = {
        "shape": arguments.shape, "batch": BATCH, "micro_batch": MICRO_BATCH, "tokens": shape.tokens,
        "visual_tokens": shape.visual, "quantised_weights": sum(m.weight.numel() for m in decoder_linears(model).values()),
        **describe(device),
    }  # fmt: skip
    arguments.out.write_text(json.dumps({"summary": summary, "recipes": rows, "about": about}, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    return 0 if all(torch.isfinite(torch.tensor(row["last"]["loss"])) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
