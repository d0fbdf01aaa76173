"""What AWQ and GPTQ look at: second moments of the activations that enter each linear.

One decoder layer at a time: the model runs over the calibration batches up to that layer and stops; hooks collect
`H = sum over tokens of x x^T`. Then the layer is rounded, so that the next one sees the inputs it will get in use.
Running from the start every time costs depth/2 forward passes of the whole model, but it is right for every family,
also where the decoder takes visual features in between its layers (Qwen3-VL).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from grace.errors import GraceError
from grace.families.base import LAYERS, READERS
from grace.progress import progress

# Linears that read the same activations share one H, collected at the first of them.
INPUTS = {
    parts[0]: parts
    for parts in (
        READERS["input_layernorm"], ("self_attn.o_proj",), READERS["post_attention_layernorm"], ("mlp.down_proj",),
    )
}  # fmt: skip


@dataclass
class Moments:
    """Of the activations x [tokens, in] that enter a linear.

    Attributes:
        second: fp32 [in, in], the sum over tokens of x x^T.
        magnitude: fp32 [in], the sum over tokens of |x|.
        tokens: how many.
    """

    second: torch.Tensor
    magnitude: torch.Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> "Moments":
        return cls(torch.zeros(width, width, device=device), torch.zeros(width, device=device))

    def add(self, inputs: torch.Tensor) -> None:
        """Take in activations [..., in]."""
        rows = inputs.detach().flatten(0, -2).float()
        self.second.addmm_(rows.T, rows)
        self.magnitude += rows.abs().sum(0)
        self.tokens += len(rows)


class _Enough(Exception):
    """The layer that is looked at has been passed: the rest of the forward is not needed."""


def _add(moments: Moments, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
    moments.add(arguments[0])


@torch.no_grad()
def _collect(model: nn.Module, layer: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Moments]:
    device = next(layer.parameters()).device
    moments = {part: Moments.empty(cast(nn.Linear, layer.get_submodule(part)).in_features, device) for part in INPUTS}

    def stop(*_):
        raise _Enough

    hooks: list[RemovableHandle] = [
        layer.get_submodule(part).register_forward_pre_hook(partial(_add, moments[part])) for part in INPUTS
    ]
    hooks.append(layer.register_forward_hook(stop))
    try:
        for batch in batches:
            try:
                model(**{name: tensor.to(device) for name, tensor in batch.items()})
            except _Enough:
                continue
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def layers_with_moments(
    model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]]
) -> Iterator[tuple[str, nn.Module, dict[str, Moments]]]:
    """Yield (module name, decoder layer, moments by the first linear that reads them), from the first layer on.

    The consumer rounds each layer in place before it asks for the next.

    Args:
        model: a vision-language model.
        batches: keyword arguments of its forward, one sequence each (padding would count as activations).
    """
    if not batches:
        raise GraceError("calibration: there are no examples; set quantization.calibration to at least 1")
    layers = cast(nn.ModuleList, model.get_submodule(LAYERS))
    with progress("rounding layers", len(layers)) as advance:
        for number, layer in enumerate(layers):
            name = f"{LAYERS}.{number}"
            moments = _collect(model, layer, batches)
            for part, moment in moments.items():
                if not torch.isfinite(moment.second).all():
                    raise GraceError(
                        f"{name}.{part}: NaN or infinite activations in calibration; check the model to start from"
                    )
            yield name, layer, moments
            advance()


Rounder = Callable[[nn.Module, dict[str, Moments]], dict[str, tuple[torch.Tensor, torch.Tensor]]]


@torch.no_grad()
def round_model(
    model: nn.Module, batches: Sequence[Mapping[str, torch.Tensor]], round_layer: Rounder
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Round every decoder layer in place; return codes int8 and scales bf16 (on the CPU) by module name.

    `round_layer(layer, moments)` changes the layer's weights to their dequantised values and returns (codes, scales)
    by the part's name within the layer.
    """
    rounded = {}
    for name, layer, moments in layers_with_moments(model, batches):
        for part, (codes, scales) in round_layer(layer, moments).items():
            rounded[f"{name}.{part}"] = codes.cpu(), scales.cpu()
    return rounded
