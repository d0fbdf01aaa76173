"""Round-to-nearest: the baseline that looks at nothing but the weights.

The scale of a group is a convention, one of `SCALES`: max|w| / Qp clips nothing; compressed-tensors, whose format
ships, divides by half the code range; the best of 20 by squared error is where quantisation-aware training starts and
what AWQ and GPTQ round with. Needs neither transformers nor data, and holds one tensor at a time.
"""

from pathlib import Path

import torch

from grace.errors import GraceError
from grace.progress import progress
from grace.quant.checkpoint import Checkpoint, TensorSpec, copy_companions, copy_config, write_checkpoint
from grace.quant.grid import best_scales, dequantize, format_scales, largest_scales, quantize
from grace.quant.names import quantised_module
from grace.quant.outliers import with_outliers
from grace.quant.student import read_quantization, write_quantization

SCALES = {"maxabs": largest_scales, "format": format_scales, "best": best_scales}


def round_checkpoint(
    init: Path,
    folder: Path,
    bits: int,
    group_size: int,
    outliers: tuple[int, float] | None = None,
    scale: str = "maxabs",
) -> None:
    """Write the RTN student of checkpoint folder `init` into the existing `folder`.

    Args:
        outliers: (every, factor) of the outlier transform to apply first.
        scale: a key of `SCALES`.

    Raises:
        GraceError: `init` is no checkpoint, or a group does not divide a linear's input.
    """
    source = Checkpoint.of_folder(init)
    linears = {module: key for key in source if (module := quantised_module(key))}
    if not linears:
        raise GraceError(
            f"{init}: has no decoder linears (layers.N.self_attn.q_proj and so on); give a Llama-type model"
        )

    def weight(key: str) -> torch.Tensor:
        tensor = source[key]
        return with_outliers(key, tensor, *outliers) if outliers else tensor

    def rounded(module: str, kind: str) -> torch.Tensor:
        advance(note=module)
        original = weight(linears[module])
        scales = SCALES[scale](original, bits, group_size, module)
        return scales if kind == "scales" else quantize(original, scales, bits)

    def produce(key: str) -> torch.Tensor:
        advance(note=key)
        module = quantised_module(key)
        if module:
            return dequantize(*stored[module])
        tensor = weight(key)
        return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor

    found = [source.spec(key) for key in source]
    specs = [TensorSpec(s.name, torch.bfloat16 if s.dtype.is_floating_point else s.dtype, s.shape) for s in found]
    shapes = {module: source.spec(key).shape for module, key in linears.items()}
    with progress("rounding", 2 * len(shapes) + len(specs)) as advance:
        write_quantization(folder, shapes, rounded, bits, group_size, "rtn")
        stored = read_quantization(folder)
        write_checkpoint(folder, specs, produce)
    copy_config(init, folder, dtype="bfloat16")
    copy_companions(init, folder)
