"""Measure decoding on a CUDA card, bf16 and INT4 in one run: prefill, tokens/s by batch size, memory.

    python tests/gpu/bench_decode.py MODEL [MODEL ...] --out decode.json [--batches 1,8,32] [--new-tokens 128]
    python tests/gpu/bench_decode.py --random llava-1.5-7b --out decode.json

Folders may be plain or packed. `--random` makes LLaVA-1.5-7B in its real shape with random weights, plain and rounded
to nearest in groups of 128, in memory: speed and memory do not depend on what the weights are. Prints one line per
model and batch, and the INT4 : bf16 ratios of this run.
"""

import argparse
import gc
from pathlib import Path

import torch
from torch import nn

from grace.bench.decode import bench_decode
from grace.bench.machine import ceilings, describe
from grace.bench.memory import peak_bytes, weight_bytes
from grace.bench.timing import interleaved_medians
from grace.files import write_json
from grace.infer.decode import Session
from grace.infer.fuse import fuse_dense
from grace.infer.int4_linear import Int4Linear
from grace.models import decoder, output_head

PROMPT = 640  # tokens: 576 of the picture and a question
GROUP = 128
MIB = 2**20


def random_llava(device: torch.device) -> nn.Module:
    """LLaVA-1.5-7B's shape in bf16 with random weights, made on the card."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=32064), image_token_id=32000)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def round_in_place(model: nn.Module, device: torch.device) -> None:
    """Replace the (fused) decoder linears by `Int4Linear`, rounded to nearest."""
    for parent in list(decoder(model).layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                groups = child.weight.data.float().view(child.out_features, -1, GROUP)
                scales = (groups.abs().amax(-1) / 7.5).bfloat16()
                codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7).to(torch.int8)
                codes = codes.view(child.weight.shape)
                setattr(parent, name, Int4Linear(codes, scales, None, torch.bfloat16, device))


def measure(
    model: nn.Module, name: str, batches: list[int], new_tokens: int, repeats: int, device: torch.device, kernels: bool
) -> list:
    """Rows like decode.csv's for a model without a processor: random tokens and a random picture."""
    generator = torch.Generator(device).manual_seed(0)
    rows, weights = [], weight_bytes(model)
    for batch in batches:
        ids = torch.randint(5, 30000, (batch, PROMPT), device=device, generator=generator)
        ids[:, 1:577] = model.config.image_token_id
        pixels = torch.randn(batch, 3, 336, 336, device=device, generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        held: list[Session] = []

        def prefill(inputs=inputs, held=held, batch=batch) -> None:
            if not held:
                held.append(Session(model, batch, PROMPT + new_tokens))
            with torch.inference_mode():
                held[0].prefill(inputs)

        peak = weights + peak_bytes(prefill, device)
        begin, first, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        prefills, steps = [], []
        for _ in range(repeats):
            begin.record()
            prefill()
            first.record()
            for _ in range(new_tokens - 1):
                held[0].step()
            end.record()
            end.synchronize()
            prefills.append(begin.elapsed_time(first))
            steps.append(first.elapsed_time(end) / (new_tokens - 1))
        step = sorted(steps)[len(steps) // 2]
        rows.append(
            {
                "model": "llava-1.5-7b (random)", "precision": name, "device": torch.cuda.get_device_name(device),
                "batch": batch, "prompt_tokens": PROMPT, "new_tokens": new_tokens,
                "prefill_ms": sorted(prefills)[len(prefills) // 2], "step_ms": step,
                "tokens_per_second": batch / step * 1e3,
                "read_mib": read_bytes(model, batch, PROMPT + new_tokens // 2) / MIB, "weight_mib": weights / MIB, "peak_mib": peak / MIB,
            }
        )  # fmt: skip
        if kernels:
            prefill()
            print_kernels(held[0], f"{name}, batch {batch}, {step:.3f} ms")
        held.clear()
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def read_bytes(model: nn.Module, batch: int, tokens: int) -> int:
    """What a step cannot do without reading: the layers, the head, and keys and values of `tokens` per sequence."""
    text = model.config.get_text_config()
    width = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    cache = 2 * text.num_hidden_layers * width * batch * tokens * output_head(model).weight.itemsize
    return weight_bytes(decoder(model).layers) + output_head(model).weight.nbytes + cache


def print_kernels(session: Session, what: str) -> None:
    """The kernels of one step by time. Dependent launches overlap, so that the sum can exceed the step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(5):
            session.step()
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda event: -event.device_time_total)
    print(f"{what}: kernels of one step")
    for event in events[:14]:
        calls = event.count / 5
        print(
            f"  {event.device_time_total / 5:8.1f} us  {calls:5.0f} x {event.device_time_total / event.count:6.2f}  {event.key[:90]}"
        )


def read_bandwidth(device: torch.device) -> float:
    """Bytes/s of a plain reduction over 4 GiB: what reading weights can reach."""
    source = torch.ones(2**30, dtype=torch.int32, device=device)
    return source.nbytes / interleaved_medians({"read": [source.sum]}, 5, device)["read"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--random", choices=["llava-1.5-7b"])
    parser.add_argument("--out", type=Path, default=Path("decode.json"))
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--kernels", action="store_true", help="with --random: also print the kernels of one step")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    if bool(chosen.models) == bool(chosen.random):
        raise SystemExit("give model folders, or --random llava-1.5-7b")
    device = torch.device("cuda")
    batches = [int(text) for text in chosen.batches.split(",")]
    limits = ceilings(device) | {"read_bytes_per_second": read_bandwidth(device)}
    if chosen.models:
        rows = bench_decode(chosen.models, batches, chosen.new_tokens, chosen.repeats, device)
    else:
        model = random_llava(device)
        fuse_dense(decoder(model))
        rows = measure(model, "bf16", batches, chosen.new_tokens, chosen.repeats, device, chosen.kernels)
        round_in_place(model, device)
        gc.collect()
        torch.cuda.empty_cache()
        rows += measure(model, "int4", batches, chosen.new_tokens, chosen.repeats, device, chosen.kernels)
    write_json(chosen.out, {"machine": describe(device), "ceilings": limits, "rows": rows})
    for row in rows:
        print(*(f"{v:.2f}" if isinstance(v, float) else v for v in row.values()), sep=" | ")
        if "read_mib" in row:
            floor = row["read_mib"] * MIB / limits["read_bytes_per_second"] * 1e3
            print(f"  reading alone takes {floor:.2f} ms: {100 * floor / row['step_ms']:.0f}% of the step")
    for batch in batches:
        speed = {row["precision"]: row for row in rows if row["batch"] == batch}
        if {"bf16", "int4"} <= speed.keys():
            fast = speed["int4"]["tokens_per_second"] / speed["bf16"]["tokens_per_second"]
            less = 1 - speed["int4"]["peak_mib"] / speed["bf16"]["peak_mib"]
            print(f"batch {batch}: INT4 decodes {fast:.2f} x bf16, peak memory -{100 * less:.0f}%")


if __name__ == "__main__":
    main()
