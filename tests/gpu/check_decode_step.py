"""Check the hand-fused decoding step on a CUDA card: each kernel against float64, the step against transformers' layers.

    python tests/gpu/check_decode_step.py

Fresh random data on every run, outputs poisoned before they are written. Prints one line per check; fails at the first
that is off.
"""

import torch
from torch import nn

from grace.infer.decode import Session, stream
from grace.infer.fuse import fuse_dense
from grace.kernels import decode_step
from grace.kernels.decode_attention import attend

CUDA = torch.device("cuda")


def close(name: str, ours: torch.Tensor, expected: torch.Tensor, most: float) -> None:
    error = ((ours.double() - expected.double()).norm() / expected.double().norm()).item()
    print(f"{name}: relative error {error:.1e}")
    assert error < most, f"{name}: {error} is not below {most}"


def poison() -> None:
    """Leave NaN in the memory that the next outputs will get."""
    torch.full((2**22,), torch.nan, device=CUDA)


def check_attend() -> None:
    for batch, heads, group, width, length, now in (
        (1, 32, 1, 128, 768, 640), (32, 32, 1, 128, 256, 200), (2, 2, 6, 128, 1024, 1023), (3, 4, 7, 64, 64, 0),
    ):  # fmt: skip
        qkv = torch.randn(batch, heads * (group + 2) * width, device=CUDA).bfloat16()
        keys, values = torch.randn(2, batch, heads, length, width, device=CUDA).bfloat16()
        keys[:, :, now:], values[:, :, now:] = torch.nan, torch.nan
        first = torch.zeros(batch, dtype=torch.int64, device=CUDA)
        first[0] = now // 3
        position, slot = now - first, torch.tensor(now, device=CUDA)
        turns = 10000.0 ** -(torch.arange(width // 2, device=CUDA) / (width // 2))
        angle = torch.outer(torch.arange(length, device=CUDA), turns).repeat(1, 2)
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        poison()
        out = attend(qkv, keys, values, first, cos, sin, position, slot, 0.1)
        q, k, _ = qkv.view(batch, -1, width).split([heads * group, heads, heads], 1)
        turn, lean = cos[position].double()[:, None], sin[position].double()[:, None]
        turned = [
            (t.double() * turn + torch.cat((-t[..., width // 2 :], t[..., : width // 2]), -1) * lean).bfloat16()
            for t in (q, k)
        ]
        close("  its key", keys[:, :, now], turned[1], 3e-3)
        seen = (torch.arange(now + 1, device=CUDA) >= first[:, None])[:, None]
        k, v = (t[:, :, : now + 1].double().repeat_interleave(group, 1) for t in (keys, values))
        logits = torch.einsum("bhd,bhld->bhl", turned[0].double(), k) * 0.1
        expected = torch.einsum("bhl,bhld->bhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v)
        close(f"attend {batch} x {heads} x {group} x {width}, {now} tokens", out, expected.flatten(1), 6e-3)


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


def tiny(key_value_heads: int) -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, vocab_size=1000,
        num_key_value_heads=key_value_heads, initializer_range=0.1,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=3))
    return model.to(CUDA).eval().requires_grad_(False)


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


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    check_small_kernels()
    check_attend()
    check_tokens()
