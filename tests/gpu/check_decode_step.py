"""Check the hand-fused decoding step on a CUDA GPU: each kernel against float64, the step against transformers' layers.

    python tests/gpu/check_decode_step.py [kernels attend attend-8-bit layers tokens qwen chat qwen-2b]
    python tests/gpu/check_decode_step.py unmeasured [unmeasured-families]

`unmeasured` are the layers in one launch where `persistent_step.serves` waits for a measurement: of
LLaVA-1.5-7B, or of the other models. They run only by name.

Fresh random data on every run, outputs poisoned before they are written. Prints one line per check; fails at the first
that is off.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from bench_decode import prompts, random_model, round_in_place
from torch import nn

from grace.infer.cache import round_to_int8
from grace.infer.chat import chat
from grace.infer.decode import Session, stream
from grace.infer.fuse import fuse_dense
from grace.kernels import decode_step
from grace.kernels.decode_attention import attend
from grace.models import decoder, load_processor

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from infer_models import qwen, qwen_inputs, save_llava, save_packed

CUDA = torch.device("cuda")


def close(name: str, ours: torch.Tensor, expected: torch.Tensor, most: float) -> None:
    error = ((ours.double() - expected.double()).norm() / expected.double().norm()).item()
    print(f"{name}: relative error {error:.1e}")
    assert error < most, f"{name}: {error} is not below {most}"


def poison() -> None:
    """Leave NaN in the memory that the next outputs will get."""
    torch.full((2**22,), torch.nan, device=CUDA)


def check_attend(bits: int) -> None:
    for batch, heads, group, width, length, now in (
        (1, 32, 1, 128, 768, 640), (32, 32, 1, 128, 256, 200), (2, 2, 6, 128, 1024, 1023), (3, 4, 7, 64, 64, 0),
        (5, 4, 1, 64, 64, 0), (1, 2, 6, 128, 768, 700),
    ):  # fmt: skip
        qkv = torch.randn(batch, heads * (group + 2) * width, device=CUDA).bfloat16()
        cache = torch.randn(2, batch, heads, length, width, device=CUDA).bfloat16()
        keys, values = cache
        stored, steps = (keys.clone(), values.clone()), None
        if bits == 8:
            stored, steps = zip(*(round_to_int8(t) for t in (keys, values)), strict=True)
            keys, values = (c.double() * s[..., None].double() for c, s in zip(stored, steps, strict=True))
        for t in steps or stored:
            t[:, :, now:] = torch.nan
        first = torch.zeros(batch, dtype=torch.int64, device=CUDA)
        first[0] = now // 3
        position, slot = now - first, torch.tensor(now, device=CUDA)
        turns = 10000.0 ** -(torch.arange(width // 2, device=CUDA) / (width // 2))
        angle = torch.outer(torch.arange(length, device=CUDA), turns).repeat(1, 2)
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        q, k, v = qkv.view(batch, -1, width).split([heads * group, heads, heads], 1)
        turn, lean = cos[position].double()[:, None], sin[position].double()[:, None]
        q, k = (
            (t.double() * turn + torch.cat((-t[..., width // 2 :], t[..., : width // 2]), -1) * lean).bfloat16()
            for t in (q, k)
        )
        poison()
        out = attend(qkv, *stored, first, cos, sin, position, slot, 0.1, steps=steps)
        new = [t[:, :, now].double() for t in stored]
        if bits == 8:
            new = [t * s[:, :, now, None].double() for t, s in zip(new, steps, strict=True)]
        close("  its key", new[0], k, 3e-3 if bits == 16 else 8e-3)
        close("  its value", new[1], v, 1e-9 if bits == 16 else 8e-3)
        keys[:, :, now], values[:, :, now] = k, v
        seen = (torch.arange(now + 1, device=CUDA) >= first[:, None])[:, None]
        keys, values = (t[:, :, : now + 1].double().repeat_interleave(group, 1) for t in (keys, values))
        logits = torch.einsum("bhd,bhld->bhl", q.double(), keys) * 0.1
        expected = torch.einsum("bhl,bhld->bhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), values)
        name = f"attend {batch} x {heads} x {group} x {width}, {now} tokens, {bits} bits"
        close(name, out, expected.flatten(1), 6e-3)


def check_small_kernels() -> None:
    x, delta, table = (torch.randn(n, 4096, device=CUDA).bfloat16() for n in (3, 3, 50))
    gain = torch.randn(4096, device=CUDA).bfloat16()
    token = torch.tensor([49, 0, 7], device=CUDA)
    summed = x + delta
    close("add_norm", decode_step.add_norm(x, gain, 1e-5, delta=delta),
          nn.functional.rms_norm(summed.double(), (4096,), gain.double(), 1e-5), 5e-3)  # fmt: skip
    assert torch.equal(x, summed)
    close("embed_norm", decode_step.add_norm(x, gain, 1e-5, token=token, table=table),
          nn.functional.rms_norm(table[token].double(), (4096,), gain.double(), 1e-5), 5e-3)  # fmt: skip
    both = torch.randn(3, 2 * 11008, device=CUDA).bfloat16()
    expected = nn.functional.silu(both[:, :11008].double()) * both[:, 11008:].double()
    close("silu_mul", decode_step.silu_mul(both), expected, 5e-3)
    logits = torch.randn(3, 32064, device=CUDA).bfloat16()
    logits[1, [31000, 77, 15000]] = 9
    position, slot = torch.tensor([4, 5, 6], device=CUDA), torch.tensor(9, device=CUDA)
    decode_step.argmax(logits, token, position, slot)
    assert token.tolist() == [int(row.argmax()) for row in logits.float().cpu()] and token[1] == 77
    assert position.tolist() == [5, 6, 7] and slot == 10
    print("argmax: the first of the largest")


def check_layers(
    cases: Sequence[tuple[int, int]] = ((1, 16),), unmeasured: bool = False, most: int | None = None
) -> None:
    """All layers in one launch against a launch per kernel, INT4: outputs, new keys and values.

    Args:
        cases: sequences, and bits of the cache.
        most: models.
    """
    for name, model in islice(shapes(), most):
        model = model.bfloat16().requires_grad_(False)
        fuse_dense(decoder(model))
        fill_biases(model)
        round_in_place(model, CUDA)
        for norm in [m for part, m in decoder(model).named_modules() if part.endswith("norm")]:
            nn.init.uniform_(norm.weight, 0.5, 2)
        heads = decoder(model).layers[0].self_attn.head_dim
        for batch, bits in [(batch, bits) for batch, bits in cases if bits == 16 or heads == 128]:
            compare_layers(f"{name}, batch {batch}, {bits} bits", model, batch, bits, unmeasured)


def compare_layers(name: str, model: nn.Module, batch: int, bits: int, unmeasured: bool) -> None:
    session = Session(model, batch, 704, fused=True, cache_bits=bits, unmeasured=unmeasured)
    step = session._step
    assert step.persistent is not None, "the GPU or the model was refused"
    all_layers = partial(step.persistent, step.token, step.position, step.slot, step.first)
    for now, padding in ((0, 0), (1, 0), (7, 3), (640, 0), (703, 200)):
        step.token.random_(100)
        step.slot.fill_(now), step.first.random_(padding + 1)
        step.first[0] = padding
        step.position.copy_(now - step.first)
        found = []
        for layers in (step._layer_by_layer, all_layers, all_layers):
            generator = torch.Generator(CUDA).manual_seed(now)
            for kept in session.cache.layers:
                fill(kept, now, generator)
            poison()
            with torch.inference_mode():
                found.append([layers().clone()])
            for kept in session.cache.layers:
                new = stored(kept)
                assert all(t[:, :, now + 1 :].isnan().all() for t in new)
                found[-1] += [t[:, :, now].clone() for t in new]
        case = f"{name}, {now} tokens of which {padding} padding"
        close(case, found[1][0], found[0][0], 3e-2)
        for ours, theirs in zip(found[1][1:], found[0][1:], strict=True):
            error = ((ours - theirs).double().norm() / theirs.double().norm()).item()
            assert error < 3e-2, f"{case}: new key or value off by {error}"
        assert all(torch.equal(a, b) for a, b in zip(*found[1:], strict=True)), f"{case}: not the same each time"


def fill(kept: Any, now: int, generator: torch.Generator) -> None:
    """Random keys and values in a layer's slots before `now`, NaN behind."""
    for cached, steps in ((kept.keys, "key_steps"), (kept.values, "value_steps")):
        states = torch.randn(cached.shape, device=CUDA, generator=generator).bfloat16()
        if cached.dtype == torch.int8:
            codes, scales = round_to_int8(states)
            cached.copy_(codes)
            getattr(kept, steps).copy_(scales)[:, :, now:] = torch.nan
        else:
            cached.copy_(states)[:, :, now:] = torch.nan


def stored(kept: Any) -> list[torch.Tensor]:
    """Keys and values of a layer's cache, of 8 bits in fp32."""
    if kept.keys.dtype != torch.int8:
        return [kept.keys, kept.values]
    return [kept.keys * kept.key_steps.unsqueeze(-1), kept.values * kept.value_steps.unsqueeze(-1)]


def fill_biases(model: nn.Module) -> None:
    """Random biases of q, k and v, which a new model has as zeros, if at all."""
    for layer in decoder(model).layers:
        if layer.self_attn.q_proj.linear.bias is not None:
            nn.init.normal_(layer.self_attn.q_proj.linear.bias)


def shapes() -> Iterator[tuple[str, nn.Module]]:
    """A few layers of each kind, in real sizes and in small ones."""
    for hidden, inner, heads, count in ((4096, 11008, 32, 4), (5120, 13824, 40, 2), (512, 1024, 8, 3)):
        yield f"{count} layers of LLaVA, {hidden}", tiny(
            heads, hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_hidden_layers=count,
            initializer_range=0.02,
        )  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    for version, hidden, inner, heads, key_value_heads in (
        (2, 1536, 8960, 12, 2), (3, 2048, 6144, 16, 8), (3, 4096, 12288, 32, 8),  # Qwen2-VL-2B, Qwen3-VL-2B and 8B
    ):  # fmt: skip
        with CUDA:
            model = qwen(
                version, hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
                num_key_value_heads=key_value_heads, head_dim=128, initializer_range=0.02, rope_parameters=rope,
            )  # fmt: skip
        yield f"{version} layers of Qwen{version}-VL, {hidden}", model


def tiny(key_value_heads: int, **changes) -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = LlamaConfig(**{
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
        "vocab_size": 1000, "num_key_value_heads": key_value_heads, "initializer_range": 0.1,
    } | changes)  # fmt: skip
    with CUDA:
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=3))
    return model.eval().requires_grad_(False)


def check_tokens() -> None:
    """In fp32, where ties do not happen, the tokens are those of transformers' generate."""
    for key_value_heads in (4, 2):
        model = tiny(key_value_heads)
        ids = torch.randint(10, 1000, (3, 40), device=CUDA)
        ids[:, 5:21] = 3
        ids[0, 5:17] = torch.randint(10, 1000, (12,), device=CUDA)
        ids[0, 17:33] = 3
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(3, 3, 56, 56, device=CUDA)}
        expected = model.generate(**inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False)[:, 40:]
        fuse_dense(model.model.language_model)
        session = Session(model, 3, 64, fused=True)
        for _ in range(2):
            ours = torch.stack(list(stream(session, inputs, 24, stop=False)), dim=1)
            assert torch.equal(ours, expected), (ours, expected)
        print(f"tokens, {key_value_heads} key-value heads: those of transformers")


def check_qwen_tokens() -> None:
    """The same for Qwen2-VL (biases, three axes of positions) and Qwen3-VL (norms of heads, deepstack), tiny."""
    for version in (2, 3):
        model = qwen(version).to(CUDA).requires_grad_(False)
        model.generation_config.eos_token_id = None  # random weights end by chance
        inputs = {name: value.to(CUDA) for name, value in qwen_inputs().items()}
        expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, 11:]
        fuse_dense(decoder(model))
        for fused in (True, False):
            session = Session(model, 2, 32, fused=fused, compile=False)
            ours = torch.stack(list(stream(session, inputs, 12, stop=False)), dim=1)
            assert torch.equal(ours, expected), (ours, expected)
        print(f"tokens, Qwen{version}-VL: those of transformers")


def check_real_qwen() -> None:
    """Qwen2-VL-2B's decoder shape, random weights: one step's logits, by the fused step and by transformers' layers."""
    model = random_model("qwen2-vl-2b", CUDA)
    fuse_dense(decoder(model))
    fill_biases(model)
    for precision in ("bf16", "int4"):
        for batch in (3, 1):  # of one sequence in INT4 all layers are one launch
            ours, eight, theirs = (step_logits(model, batch, *how) for how in ((True, 16), (True, 8), (False, 16)))
            name = f"Qwen2-VL-2B's shape, {precision}, batch {batch}"
            close(f"{name}: logits of a step", ours, theirs, 6e-2)
            close(f"{name}, 8-bit cache: logits of a step", eight, theirs, 6e-2)
        if precision == "bf16":
            round_in_place(model, CUDA)


def step_logits(model: nn.Module, batch: int, fused: bool, bits: int) -> torch.Tensor:
    """The logits [batch, vocab] of the first step after a prompt: by the head or, in a fused step, what argmax got."""
    kept: list[torch.Tensor] = []
    argmax = decode_step.argmax

    def keeping(logits: torch.Tensor, *more: torch.Tensor) -> None:
        kept.append(logits)
        argmax(logits, *more)

    seen = model.lm_head.register_forward_hook(lambda module, inputs, y: kept.append(y))
    with patch.object(decode_step, "argmax", keeping):
        session = Session(model, batch, 700, fused=fused, compile=False, cache_bits=bits)
    seen.remove()  # the last call was the captured one: its output is written by every replay
    with torch.inference_mode():
        session.prefill(prompts(model, batch, CUDA))
        session.step()
    return kept[-1].flatten(0, -2).clone()


def check_chat() -> None:
    """`grace chat` on the GPU: its first word is transformers' own (later ones may tie in bf16)."""
    from PIL import Image

    from grace.infer.load import load_for_inference
    from grace.infer.prompt import build_prompts, open_image

    with TemporaryDirectory() as place:
        plain = save_llava(Path(place) / "plain")
        Image.effect_noise((120, 80), 90).convert("RGB").save(Path(place) / "noise.png")
        for folder in (plain, save_packed(plain, Path(place) / "packed")):
            image, question = Path(place) / "noise.png", "what is this"
            (text,) = chat(folder, [image], question, device="cuda", new_tokens=12)
            model = load_for_inference(folder, device="cuda")
            inputs = build_prompts(load_processor(folder), [(open_image(image), question)])
            session = Session(model, 1, inputs["input_ids"].shape[1] + 12, fused=False, compile=False)
            tokens = torch.cat(list(stream(session, inputs, 12)))
            told = load_processor(folder).tokenizer.decode(tokens, skip_special_tokens=True)
            assert text and text.split()[0] == told.split()[0], (text, told)
            print(f"chat, {folder.name}: {text!r}; transformers' layers: {told!r}")


CHECKS = {
    "kernels": check_small_kernels,
    "attend": lambda: check_attend(16),
    "attend-8-bit": lambda: check_attend(8),
    "layers": check_layers,
    "unmeasured": lambda: check_layers([(1, 8), (2, 16), (3, 8), (4, 16), (8, 16), (8, 8)], unmeasured=True, most=1),
    "unmeasured-families": lambda: check_layers([(1, 8), (5, 16)], unmeasured=True),
    "tokens": check_tokens,
    "qwen": check_qwen_tokens,
    "chat": check_chat,
    "qwen-2b": check_real_qwen,
}

if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    for name in sys.argv[1:] or [name for name in CHECKS if not name.startswith("unmeasured")]:
        CHECKS[name]()
    print("all passed")
