"""AWQ (arXiv 2306.00978): widen the channels that carry large activations before rounding.

An input channel of a linear multiplied by s, and whatever produces that channel divided by it, leaves the layer's
function as it is; but the channel is rounded s times finer. s = a^r with a the mean |x| per channel, normalised by
sqrt(max s * min s), and r the best of 20 ratios in [0, 1) by the error of the linears' outputs on the calibration
data. What produces the channel: the norm before q, k, v and before gate, up; v before o; up before down.
Step sizes are the best of 20 by squared error (in place of AWQ's search for a clipping threshold).
"""

from typing import Any, cast

import torch
from torch import nn

from grace.quant.calibration import INPUTS, Moments
from grace.quant.grid import best_scales, dequantize, quantize

RATIOS = [step / 20 for step in range(20)]
PRODUCERS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}


def output_error(change: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of ||x change^T||^2, by the inputs' second moments [in, in]; `change` is [out, in]."""
    return ((change @ second) * change).sum()


def channel_scales(magnitude: torch.Tensor, ratio: float) -> torch.Tensor:
    """s fp32 [in] from the mean |x| [in] and the ratio r."""
    scales = magnitude.pow(ratio).clamp(min=1e-4)
    return scales / (scales.max() * scales.min()).double().sqrt().to(scales.dtype)


def search(
    weights: list[torch.Tensor], magnitude: torch.Tensor, second: torch.Tensor, bits: int, group_size: int
) -> torch.Tensor:
    """The best s [in] for linears `weights` [out_i, in] that read the same activations.

    r = 0 gives s = 1 and is tried first, so the result is never worse than rounding without s.
    """
    least, best = torch.inf, torch.ones_like(magnitude)
    for ratio in RATIOS:
        scales = channel_scales(magnitude, ratio)
        error = 0.0
        for weight in weights:
            widened = weight.float() * scales
            steps = best_scales(widened, bits, group_size)
            rounded = dequantize(quantize(widened, steps, bits), steps).float()
            error += float(output_error(rounded / scales - weight.float(), second))
        if error < least:
            least, best = error, scales
    return best


def _per_value_head(channels: torch.Tensor, attention: Any) -> torch.Tensor:
    """[in of o] -> [v heads, query heads per v head, head width]: query heads that read one v head lie together."""
    return channels.unflatten(0, (-1, attention.num_key_value_groups, attention.head_dim))


def widen(layer: nn.Module, moments: dict[str, Moments], bits: int, group_size: int) -> None:
    """Move the best s of every input into a decoder layer's fp32 weights, in place; its function stays.

    A norm's new gain is put on bf16's grid first and s follows from it, so that saving in bf16 changes nothing.
    """
    for source, parts in INPUTS.items():
        linears = [cast(nn.Linear, layer.get_submodule(part)) for part in parts]
        producer: Any = layer.get_submodule(
            PRODUCERS[source]
        )  # a norm or a linear, with weights in place of parameters
        moment = moments[source]
        magnitude = moment.magnitude / moment.tokens
        if source == "self_attn.o_proj":  # one s for all query heads that read the same v head
            heads = _per_value_head(magnitude, layer.self_attn)
            magnitude = heads.mean(1, keepdim=True).expand_as(heads).flatten()
        scales = search([linear.weight for linear in linears], magnitude, moment.second, bits, group_size)
        if isinstance(producer, nn.Linear):
            rows = scales
            if source == "self_attn.o_proj":
                rows = _per_value_head(scales, layer.self_attn)[:, 0].flatten()
            producer.weight.div_(rows[:, None])
            if producer.bias is not None:
                producer.bias.div_(rows)
        else:
            gain = (producer.weight / scales).bfloat16().float()
            scales = torch.where(gain == 0, 1.0, producer.weight / gain)
            producer.weight.copy_(gain)
        for linear in linears:
            linear.weight *= scales


def round_layer(
    layer: nn.Module, moments: dict[str, Moments], bits: int, group_size: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Widen, then round, a decoder layer's linears in place; (codes, scales) by part."""
    widen(layer, moments, bits, group_size)
    rounded = {}
    for part in (part for parts in INPUTS.values() for part in parts):
        linear = cast(nn.Linear, layer.get_submodule(part))
        scales = best_scales(linear.weight, bits, group_size, part)
        rounded[part] = quantize(linear.weight, scales, bits), scales
        linear.weight.copy_(dequantize(*rounded[part]))
    return rounded
