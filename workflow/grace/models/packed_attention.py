"""Causal attention over sequences that are laid end to end in one row, so that no padding is computed.

On a GPU torch's variable-length flash attention reads the row as it is; elsewhere each sequence goes through scaled dot
product attention on its own. transformers' decoders call it by the name `PACKED` and hand the keyword arguments
`packed_offsets` and `packed_longest` of their forward down to it (`grace.data.packing` makes the rows).
"""

from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

PACKED = "grace_packed"


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    packed_offsets: torch.Tensor | None = None,
    packed_longest: int = 0,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' decoder layers ask for it.

    Args:
        query: [1, heads, tokens, width]; key, value: [1, key_value_heads, tokens, width].
        scaling: of the products; None: width ** -0.5.
        packed_offsets: int32 [sequences + 1], where each sequence begins, and the end; some may be empty.
        packed_longest: no sequence is longer.

    Returns:
        ([1, tokens, heads, width], None)
    """
    assert packed_offsets is not None, "a packed model is called with packed_offsets"
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # [tokens, heads, width]
        repeats = q.shape[1] // k.shape[1]
        if (
            repeats > 1
        ):  # as a view: the gradient of a plain repetition is summed one by one where it must be deterministic
            k, v = (part[:, :, None].expand(-1, -1, repeats, -1).flatten(1, 2) for part in (k, v))
        at, longest = packed_offsets, packed_longest
        mixed = varlen_attn(q, k, v, at, at, longest, longest, scale=scaling, window_size=(-1, 0))
        return cast(torch.Tensor, mixed)[None], None
    grouped, offsets, parts = query.shape[1] != key.shape[1], packed_offsets.tolist(), []
    for begin, end in pairwise(offsets):
        if end > begin:
            q, k, v = (part[:, :, begin:end] for part in (query, key, value))
            parts.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def use_packed_attention(model: Any) -> None:
    """Let the decoder of a vision-language model attend within the sequences of packed rows;
    its tower stays as it is.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED, lambda *unused, **arguments: None)  # offsets stand for a mask
    model.set_attn_implementation({"text_config": PACKED})
