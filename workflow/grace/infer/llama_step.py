"""One decoding step of a Llama-type decoder by hand: GEMMs, and the fused kernels of `grace.kernels.decode_step`.

It computes what transformers' own layers compute, from the same modules and over the same static cache, and is tested
against them. Prefill, and every decoder that `knows` refuses, run transformers' code. One sequence of an INT4 model
whose layers are plain enough takes all of them in one launch instead (`persistent_step`).
"""

from typing import Any

import torch
from torch import nn
from transformers import StaticCache

from grace.infer import persistent_step
from grace.infer.fuse import Fused
from grace.kernels import decode_step
from grace.kernels import skinny_gemm as skinny
from grace.kernels.decode_attention import attend

# Decoders whose layers are norm, attention with rotary embeddings, norm, gated MLP. The Qwen ones give every position
# three axes, which agree for every token after a prompt.
FAMILIES = {"llama", "mistral", "qwen2_vl_text", "qwen3_vl_text"}
STATIC_ROPE = {"default", "linear", "llama3", "yarn", "mrope"}  # rotary frequencies that do not depend on the length
HEAD_DIMS = (16, 32, 64, 128, 256)


def knows(decoder: Any) -> bool:
    """Whether `LlamaStep` computes what this decoder, its linears joined by `grace.infer.fuse`, does."""
    config = decoder.config
    rope = getattr(config, "rope_parameters", None) or {}
    first = decoder.layers[0]
    return (
        config.model_type in FAMILIES
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in STATIC_ROPE
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
        and first.self_attn.head_dim in HEAD_DIMS
        and all(isinstance(m, Fused) for layer in decoder.layers for m in (layer.self_attn.q_proj, layer.mlp.gate_proj))
    )


class LlamaStep:
    """Decodes one more token of every sequence, in place; every tensor it reads or writes keeps its address.

    Args:
        decoder, embedding, head: the parts of a model that `knows` accepts.
        cache: initialised, with room for `length` tokens.
        token: int64 [batch, 1], the last token, replaced by the next.
        position: int64 [batch], its position in the sequence.
        slot: int64 [], its place in the cache.
        first: int64 [batch], the first slot that is not padding.
        logprob: fp32 [batch], replaced by the next token's log-probability, where it is wanted.
        unmeasured: whether all layers may go in one launch where no GPU has run it so (`persistent_step.serves`).
    """

    def __init__(
        self,
        decoder: Any,
        embedding: nn.Embedding,
        head: nn.Module,
        cache: StaticCache,
        token: torch.Tensor,
        position: torch.Tensor,
        slot: torch.Tensor,
        first: torch.Tensor,
        logprob: torch.Tensor | None = None,
        unmeasured: bool = False,
    ) -> None:
        self.logprob = logprob
        self.layers, self.norm, self.head = list(decoder.layers), decoder.norm, head
        self.table, self.cache = embedding.weight, cache
        self.token, self.position, self.slot, self.first = token.view(-1), position, slot, first
        self.stream = self.table.new_empty(len(position), self.table.shape[1])
        self.cos, self.sin = rotary_table(decoder.rotary_emb, cache.get_max_length(), self.table.dtype)
        self.persistent = persistent_step.prepare(
            decoder, self.table, cache, (self.cos, self.sin), self.token, self.position, self.slot, self.first,
            unmeasured=unmeasured,
        )  # fmt: skip

    def __call__(self) -> None:
        if self.persistent is not None:
            hidden = self.persistent(self.token, self.position, self.slot, self.first)
        else:
            hidden = self._layer_by_layer()
        logits = skinny.linear(self.head, hidden)
        if self.logprob is not None:
            best = logits.float()
            self.logprob.copy_(best.amax(-1) - best.logsumexp(-1))
        decode_step.argmax(logits, self.token, self.position, self.slot)

    def _layer_by_layer(self) -> torch.Tensor:
        """The normed output of the last layer, [batch, d]."""
        x, layers = self.stream, self.layers
        norm = layers[0].input_layernorm
        hidden = decode_step.add_norm(
            x, norm.weight, norm.variance_epsilon, token=self.token, table=self.table
        )  # [batch, d]
        after = [*(layer.input_layernorm for layer in layers[1:]), self.norm]
        for layer, cached, following in zip(layers, self.cache.layers, after, strict=True):
            attention, mlp, norm = layer.self_attn, layer.mlp, layer.post_attention_layernorm
            qkv = skinny.linear(attention.q_proj.linear, hidden)  # [batch, (H + 2 KV) D]
            out = skinny.linear(attention.o_proj, self._attend(attention, qkv, cached))
            hidden = decode_step.add_norm(x, norm.weight, norm.variance_epsilon, delta=out)
            out = skinny.linear(mlp.down_proj, decode_step.silu_mul(skinny.linear(mlp.gate_proj.linear, hidden)))
            hidden = decode_step.add_norm(x, following.weight, following.variance_epsilon, delta=out)
        return hidden

    def _attend(self, attention: Any, qkv: torch.Tensor, cached: Any) -> torch.Tensor:
        norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else ()
        return attend(
            qkv, cached.keys, cached.values, self.first, self.cos, self.sin, self.position, self.slot,
            attention.scaling,
            steps=(cached.key_steps, cached.value_steps) if cached.keys.dtype == torch.int8 else None,
            gains=(norms[0].weight, norms[1].weight) if norms else None,
            eps=norms[0].variance_epsilon if norms else 0.0,
        )  # fmt: skip


def rotary_table(rotary: Any, positions: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions 0, 1, ...: each [positions, D] in `dtype`, both halves alike."""
    place = torch.arange(positions, device=rotary.inv_freq.device, dtype=torch.float32)
    angle = torch.outer(place, rotary.inv_freq.float()).repeat(1, 2)
    cos, sin = ((f(angle) * rotary.attention_scaling).to(dtype) for f in (torch.cos, torch.sin))
    return cos, sin
