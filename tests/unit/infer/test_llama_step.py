"""The hand-fused decoding step, in Triton's interpreter, against transformers' generate and torch's own operators."""

import pytest
import torch
from apart import run_apart
from infer_models import QUESTIONS, make_image, qwen, qwen_inputs, save_llava, save_packed, theirs
from torch import nn

from grace.errors import GraceError
from grace.infer import llama_step
from grace.infer.decode import Session, stream
from grace.infer.fuse import fuse_dense
from grace.infer.load import load_for_inference
from grace.infer.prompt import build_prompts
from grace.kernels import decode_step
from grace.kernels.decode_attention import attend
from grace.models import load_processor


def answers(model, inputs, new_tokens):
    session = Session(model, len(inputs["input_ids"]), inputs["input_ids"].shape[1] + new_tokens, fused=True)
    return torch.stack(list(stream(session, inputs, new_tokens, stop=False)), dim=1)


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_the_tokens_are_those_of_transformers(tmp_path, key_value_heads):
    folder = save_llava(tmp_path / "plain", key_value_heads=key_value_heads)
    prompts = build_prompts(load_processor(folder), [(make_image(i), text) for i, text in enumerate(QUESTIONS)])
    expected = theirs(folder, prompts, 10)
    ours = answers(load_for_inference(folder, dtype=torch.float32), prompts, expected.shape[1])
    ended = (expected == 2).cumsum(1) > 0
    assert (ours == expected)[~ended].all() and (~ended).sum() > 15


@pytest.mark.parametrize("version", [2, 3])
def test_qwen_with_biases_norms_of_heads_and_three_axes(version):
    model, inputs = qwen(version), qwen_inputs()
    generator = torch.Generator().manual_seed(0)
    if version == 2:
        for layer in model.model.language_model.layers:
            nn.init.normal_(layer.self_attn.q_proj.bias, generator=generator)
            nn.init.normal_(layer.self_attn.k_proj.bias, generator=generator)
    else:
        for layer in model.model.language_model.layers:
            nn.init.uniform_(layer.self_attn.q_norm.weight, 0.5, 2, generator=generator)
            nn.init.uniform_(layer.self_attn.k_norm.weight, 0.5, 2, generator=generator)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, 11:]
    fuse_dense(model.model.language_model)
    assert torch.equal(answers(model, inputs, 8), expected)


def test_a_packed_model_says_the_same_fused_or_not(tmp_path):
    packed = save_packed(save_llava(tmp_path / "plain"), tmp_path / "packed")
    inputs = build_prompts(load_processor(packed), [(make_image(0), "what is this")])
    model = load_for_inference(packed, dtype=torch.float32)
    session = Session(model, 1, inputs["input_ids"].shape[1] + 8, fused=False)
    expected = torch.stack(list(stream(session, inputs, 8, stop=False)), dim=1)
    assert torch.equal(answers(model, inputs, 8), expected)


def test_an_8_bit_cache_says_nearly_the_same(tmp_path):
    """Logits of a step over int8 keys and values against those over 16-bit ones, and what the codes stand for."""
    folder = save_llava(tmp_path / "plain", key_value_heads=2)
    model = load_for_inference(folder, dtype=torch.float32)
    prompts = build_prompts(load_processor(folder), [(make_image(i), text) for i, text in enumerate(QUESTIONS)])
    tokens = prompts["input_ids"].shape[1]
    sessions = [Session(model, 3, tokens + 2, fused=True, cache_bits=bits) for bits in (16, 8)]
    assert sessions[1].prefill(prompts).tolist() == sessions[0].prefill(prompts).tolist()
    exact, codes = (session.cache.layers[-1] for session in sessions)
    assert codes.keys.dtype == torch.int8 and codes.keys.shape == exact.keys.shape
    for name in ("keys", "values"):
        told = getattr(codes, name) * getattr(codes, name[:-1] + "_steps").unsqueeze(-1)
        there = getattr(exact, name)
        half = there.abs().amax(-1, keepdim=True) / 254
        assert ((told - there).abs() <= half * 1.001).all() and (there[:, :, :tokens] != 0).any()
    logits = []
    for session in sessions:
        seen = session.head.register_forward_hook(lambda module, inputs, output: logits.append(output))
        session.step()
        seen.remove()
    assert 0 < (logits[1] - logits[0]).norm() < 0.02 * logits[0].norm()


def test_an_8_bit_cache_needs_the_fused_step(tmp_path):
    model = load_for_inference(save_llava(tmp_path / "plain"))
    for bits, fused in ((8, None), (8, False), (4, True)):
        with pytest.raises(GraceError, match=f"a cache of {bits} bits: .*; use 16"):
            Session(model, 1, 30, fused=fused, cache_bits=bits)


def test_what_the_step_does_not_know(tmp_path):
    folder = save_llava(tmp_path / "plain")
    decoder = load_for_inference(folder).model.language_model
    assert llama_step.knows(decoder)
    assert not llama_step.knows(load_for_inference(folder, fuse=False).model.language_model)
    for field, value in [("hidden_act", "gelu"), ("model_type", "gemma"), ("sliding_window", 64)]:
        before = getattr(decoder.config, field, None)
        setattr(decoder.config, field, value)
        assert not llama_step.knows(decoder)
        setattr(decoder.config, field, before)
    decoder.config.rope_parameters["rope_type"] = "dynamic"
    assert not llama_step.knows(decoder)


def reference_attention(q, keys, values, seen, scale):
    """q [B, H, D], cache [B, KV, L, D], seen bool [B, L], in fp64."""
    groups = q.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(groups, 1) for t in (keys, values))
    logits = torch.einsum("bhd,bhld->bhl", q.double(), keys) * scale
    weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhl,bhld->bhd", weights, values)


def rounded(x):
    """int8 codes and scales of x [..., D], and what they stand for."""
    steps = x.float().abs().amax(-1) / 127
    codes = (x.float() / steps[..., None].clamp(min=1e-30) + 0.5).floor().to(torch.int8)
    return codes, steps, codes * steps[..., None]


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "group", "width", "length", "now"),
    [
        (1, 1, 1, 16, 200, 171),
        (2, 2, 3, 32, 100, 99),
        (3, 1, 7, 64, 70, 0),
        (2, 8, 1, 128, 140, 130),
        (13, 1, 1, 16, 40, 0),
        (1, 2, 1, 32, 9, 1),
    ],
)
def test_attend(batch, heads, group, width, length, now, dtype, bits):
    generator = torch.Generator().manual_seed(length)
    rand = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    qkv = rand(batch, heads * (group + 2) * width)
    keys, values = rand(batch, heads, length, width), rand(batch, heads, length, width)
    first = torch.zeros(batch, dtype=torch.int64)
    first[0] = now // 3
    position, slot = now - first, torch.tensor(now)
    angle = torch.outer(torch.arange(length), 10000.0 ** -(torch.arange(width // 2) / (width // 2))).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    if bits == 8:
        codes, steps, (keys, values) = zip(*(rounded(t) for t in (keys, values)), strict=True)
        for s in steps:
            s[:, :, now:] = torch.nan
    else:
        codes, steps = (keys, values), None
        keys, values = keys.clone(), values.clone()
        for t in codes:
            t[:, :, now:] = torch.nan  # nothing past the new token may be read
    old = [t.clone() for t in (*codes, *(steps or ()))]
    out = attend(qkv, *codes, first, cos, sin, position, slot, 0.3, steps=steps)

    q, k, v = qkv.view(batch, -1, width).split([heads * group, heads, heads], 1)
    turn, lean = cos[position].double()[:, None], sin[position].double()[:, None]

    def rotate(t):
        t = t.double()
        other = torch.cat((-t[..., width // 2 :], t[..., : width // 2]), -1)
        return (t * turn + other * lean).to(dtype)

    near = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    new = [t[:, :, now].float() for t in codes]
    if bits == 8:
        new = [t * s[:, :, now, None] for t, s in zip(new, steps, strict=True)]
        assert all(t[:, :, now].abs().amax(-1).eq(127).all() for t in codes)
        near_new = {"rtol": 0, "atol": 0.5 * float(max(s[:, :, now].max() for s in steps)) + 2 * near["atol"]}
    else:
        near_new = near
    torch.testing.assert_close(new[0], rotate(k).float(), **near_new)
    torch.testing.assert_close(new[1], v.float(), **(near_new if bits == 8 else {"rtol": 0, "atol": 0}))
    for cache, before in zip((*codes, *(steps or ())), old, strict=True):
        before[:, :, now] = cache[:, :, now]
        assert torch.equal(cache.nan_to_num(7), before.nan_to_num(7))
    keys[:, :, now], values[:, :, now] = rotate(k), v
    seen = torch.arange(now + 1) >= first[:, None]
    expected = reference_attention(rotate(q), keys[:, :, : now + 1], values[:, :, : now + 1], seen, 0.3)
    assert (out.view(batch, -1, width) - expected).norm() < near["rtol"] * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_gate(dtype):
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    x, delta, gain, table = rand(3, 100), rand(3, 100), rand(100), rand(9, 100)
    token = torch.tensor([8, 0, 8])
    near = {"rtol": 2e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}

    def norm(t):
        return nn.functional.rms_norm(t.double(), (100,), gain.double(), 1e-5).to(dtype)

    expected = x + delta
    y = decode_step.add_norm(x, gain, 1e-5, delta=delta)
    torch.testing.assert_close(y, norm(expected), **near)
    torch.testing.assert_close(x, expected)
    y = decode_step.add_norm(x, gain, 1e-5, token=token, table=table)
    assert torch.equal(x, table[token])
    torch.testing.assert_close(y, norm(table[token]), **near)
    both = rand(3, 1400)
    expected = nn.functional.silu(both[:, :700].double()) * both[:, 700:].double()
    torch.testing.assert_close(decode_step.silu_mul(both).double(), expected.to(dtype).double(), **near)


def test_argmax_takes_the_first_of_equals_and_moves_on():
    logits = torch.randn(3, 2500, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[0, [2100, 77, 1500]] = 9
    logits[1, 2499] = 9
    token, position, slot = torch.zeros(3, dtype=torch.int64), torch.tensor([4, 5, 6]), torch.tensor(9)
    for turn in (1, 2):
        decode_step.argmax(logits, token, position, slot)
        assert token.tolist() == [77, 2499, int(logits[2].argmax())]
        assert position.tolist() == [4 + turn, 5 + turn, 6 + turn] and slot == 9 + turn


def test_compiles_for_ampere_and_hopper():
    run_apart("decode_step_compile.py")
