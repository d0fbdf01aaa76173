"""Measure decoding on a CUDA GPU, bf16 and INT4 in one run: prefill, tokens/s by batch size, memory.

    python tests/gpu/bench_decode.py MODEL [MODEL ...] --out decode.json [--batches 1,8,32] [--new-tokens 128]
    python tests/gpu/bench_decode.py --random llava-1.5-7b --out decode.json
    python tests/gpu/bench_decode.py --random qwen2-vl-2b --out decode.json    (or qwen3-vl-2b)

Folders may be plain or packed. `--random` makes a model in its real shape with random weights, plain and rounded to
nearest in groups of 128, in memory: speed and memory do not depend on what the weights are. Both are measured with keys
and values in 16 bits and in 8 (`--caches`). Prints one line per model, batch and cache, and the INT4 : bf16 ratios of
this run.
"""

import argparse
import gc
import statistics
import sys
from pathlib import Path

import torch
from read_bandwidth import read_bandwidth
from torch import nn

from grace.bench.decode import bench_decode
from grace.bench.machine import ceilings, describe
from grace.bench.memory import peak_bytes, weight_bytes
from grace.files import write_json
from grace.infer.decode import Session
from grace.infer.fuse import fuse_dense
from grace.infer.int4_linear import Int4Linear
from grace.models import decoder, output_head

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from infer_models import llava_7b

PROMPT = 640  # tokens: 576 of the image and a question
GROUP = 128
MIB = 2**20


def random_model(name: str, device: torch.device) -> nn.Module:
    """A published model's shape in bf16 with random weights, made on the GPU."""
    import transformers

    if name == "llava-1.5-7b":
        config, build = llava_7b(), transformers.LlavaForConditionalGeneration
    elif name == "qwen2-vl-2b":
        text = dict(
            hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
            num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        )  # fmt: skip
        config = transformers.Qwen2VLConfig(text_config=text, vision_config={"hidden_size": 1536})
        build = transformers.Qwen2VLForConditionalGeneration
    else:
        text = dict(
            hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 5e6},
        )  # fmt: skip
        config = transformers.Qwen3VLConfig(
            text_config=text, vision_config={"out_hidden_size": 2048}, tie_word_embeddings=True
        )
        build = transformers.Qwen3VLForConditionalGeneration
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return build(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def prompts(model: nn.Module, batch: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens; for LLaVA with a random image of 576 tokens among them."""
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(5, 30000, (batch, PROMPT), device=device, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.model_type == "llava":
        ids[:, 1:577] = model.config.image_token_id
        inputs["pixel_values"] = torch.randn(batch, 3, 336, 336, device=device, generator=generator)
    return inputs


def round_in_place(model: nn.Module, device: torch.device) -> None:
    """Replace the (fused) decoder linears by `Int4Linear`, rounded to nearest."""
    for parent in list(decoder(model).layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                groups = child.weight.data.float().view(child.out_features, -1, GROUP)
                scales = (groups.abs().amax(-1) / 7.5).bfloat16()
                codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7).to(torch.int8)
                codes = codes.view(child.weight.shape)
                setattr(parent, name, Int4Linear(codes, scales, child.bias, torch.bfloat16, device))


def measure(
    model: nn.Module, name: str, precision: str, batches: list[int], caches: list[int], new_tokens: int,
    repeats: int, device: torch.device, kernels: bool, unmeasured: bool,
) -> list:  # fmt: skip
    """Rows like decode.csv's for a model without a processor."""
    rows, weights = [], weight_bytes(model)
    for batch, bits in [(batch, bits) for batch in batches for bits in caches]:
        inputs = prompts(model, batch, device)
        held: list[Session] = []

        def prefill(inputs=inputs, held=held, batch=batch, bits=bits) -> None:
            if not held:
                held.append(Session(model, batch, PROMPT + new_tokens, cache_bits=bits, unmeasured=unmeasured))
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
        step = statistics.median(steps)
        rows.append(
            {
                "model": f"{name} (random)", "precision": precision, "device": torch.cuda.get_device_name(device),
                "batch": batch, "cache": bits, "prompt_tokens": PROMPT, "new_tokens": new_tokens,
                "prefill_ms": statistics.median(prefills), "step_ms": step,
                "tokens_per_second": batch / step * 1e3,
                "read_mib": read_bytes(model, batch, PROMPT + new_tokens // 2, bits) / MIB,
                "weight_mib": weights / MIB, "peak_mib": peak / MIB,
            }
        )  # fmt: skip
        print(*(f"{v:.2f}" if isinstance(v, float) else v for v in rows[-1].values()), sep=" | ", flush=True)
        if kernels:
            prefill()
            print_kernels(held[0], f"{precision}, batch {batch}, {bits}-bit cache, {step:.3f} ms")
        held.clear()
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def read_bytes(model: nn.Module, batch: int, tokens: int, cache_bits: int) -> int:
    """What a step cannot do without reading: the layers, the head, and keys and values of `tokens` per sequence."""
    text = model.config.get_text_config()
    head = text.hidden_size // text.num_attention_heads
    vector = head * output_head(model).weight.itemsize if cache_bits == 16 else head + 4  # bytes of a key or a value
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * batch * tokens * vector
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
        calls, total = event.count / 5, event.device_time_total
        print(f"  {total / 5:8.1f} us  {calls:5.0f} x {total / event.count:6.2f}  {event.key[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--random", choices=["llava-1.5-7b", "qwen2-vl-2b", "qwen3-vl-2b"])
    parser.add_argument("--out", type=Path, default=Path("decode.json"))
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--caches", default="16,8", help="with --random: bits of keys and values")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--unmeasured",
        action="store_true",
        help="with --random: take kernels that no GPU has run yet where there are any",
    )
    parser.add_argument("--kernels", action="store_true", help="with --random: also print the kernels of one step")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    if bool(chosen.models) == bool(chosen.random):
        raise SystemExit("give model folders, or --random llava-1.5-7b")
    device = torch.device("cuda")
    batches, caches = ([int(n) for n in text.split(",")] for text in (chosen.batches, chosen.caches))
    limits = ceilings(device) | {"read_bytes_per_second": read_bandwidth(device)}
    if chosen.models:
        rows = bench_decode(chosen.models, batches, chosen.new_tokens, chosen.repeats, device)
    else:
        model = random_model(chosen.random, device)
        fuse_dense(decoder(model))
        how = (caches, chosen.new_tokens, chosen.repeats, device, chosen.kernels, chosen.unmeasured)
        rows = measure(model, chosen.random, "bf16", batches, *how)
        round_in_place(model, device)
        gc.collect()
        torch.cuda.empty_cache()
        rows += measure(model, chosen.random, "int4", batches, *how)
    write_json(chosen.out, {"machine": describe(device), "ceilings": limits, "rows": rows})
    for row in rows:
        what = f"{row['precision']}, batch {row['batch']}, {row['cache']}-bit cache"
        if "read_mib" in row:
            floor = row["read_mib"] * MIB / limits["read_bytes_per_second"] * 1e3
            share = 100 * floor / row["step_ms"]
            print(f"{what}: reading alone takes {floor:.2f} ms, {share:.0f}% of {row['step_ms']:.3f}")
        else:
            print(what, *(f"{v:.2f}" if isinstance(v, float) else v for v in row.values()), sep=" | ")
    speed = {(row["precision"], row["batch"], row["cache"]): row for row in rows}
    for (precision, batch, cache), row in speed.items():
        if precision == "int4" and ("bf16", batch, 16) in speed:
            dense = speed["bf16", batch, 16]
            fast = row["tokens_per_second"] / dense["tokens_per_second"]
            less = 1 - row["peak_mib"] / dense["peak_mib"]
            print(
                f"batch {batch}: INT4 with a cache of {cache} bits decodes {fast:.2f} x bf16 with one of 16, "
                f"peak memory -{100 * less:.1f}%"
            )


if __name__ == "__main__":
    main()
