"""A static key-value cache in 16 bits or in 8."""

from typing import Any

import torch
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer

TINY = 1e-30  # scale that a vector of zeros is divided by


def make_cache(
    config: PreTrainedConfig, batch: int, length: int, bits: int, dtype: torch.dtype, device: torch.device
) -> StaticCache:
    """Room for `batch` sequences of `length` tokens in every layer, allocated, in `dtype` or as 8-bit codes."""
    text = config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=length)
    if bits == 8:
        layers: list[Any] = [Int8Layer(max_cache_len=length) for _ in cache.layers]
        cache.layers = layers
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache.early_initialization(batch, text.num_key_value_heads, width, dtype, device)
    return cache


class Int8Layer(StaticLayer):
    """Keys and values as int8 codes [B, KV, length, D] and a scale per token and head, fp32 [B, KV, length].

    For prompts: `update` returns the keys and values that it was given, unrounded, so that nothing but the codes stays.
    Decoding steps read and write the codes themselves (`grace.kernels.decode_attention`).
    """

    keys: torch.Tensor
    values: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states.to(torch.int8), value_states.to(torch.int8))
        place = {"dtype": torch.float32, "device": self.device}
        self.key_steps, self.value_steps = (torch.zeros(t.shape[:3], **place) for t in (self.keys, self.values))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the codes of a prompt's keys and values [B, KV, tokens, D] from slot 0 on; hand both back."""
        tokens = key_states.shape[2]
        self.cumulative_length.add_(tokens)
        for states, codes, steps in (
            (key_states, self.keys, self.key_steps),
            (value_states, self.values, self.value_steps),
        ):
            codes[:, :, :tokens], steps[:, :, :tokens] = round_to_int8(states)
        return key_states, value_states


def round_to_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in [-127, 127] like x [..., D] and scales fp32 [...] with x = code * step, off by at most half a step."""
    steps = x.abs().amax(-1).float() / 127
    return (x / steps.clamp(min=TINY).unsqueeze(-1)).add_(0.5).floor_().to(torch.int8), steps
