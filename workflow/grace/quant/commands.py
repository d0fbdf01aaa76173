"""`grace quantize`, `grace pack` and `grace export`."""

from functools import partial
from pathlib import Path
from typing import Any, cast

from grace.config.job_parameters import QuantizeRun, read_run
from grace.errors import GraceError
from grace.families import check_family
from grace.files import whole_folder


def quantize(run: Path, init: Path, data: Path | None, out: Path) -> None:
    """Round a model without training and write the student's folder.

    Args:
        run: a frozen `QuantizeRun`.
        init: the model folder to start from.
        data: the data folder; AWQ and GPTQ look at its first `quantization.calibration` training conversations, RTN at
            none.
        out: the model folder to make.

    Raises:
        GraceError: `init` is no checkpoint or of another family, a group does not divide a layer, or the calibration
            data are unusable or not given.
    """
    parameters = read_run(run, QuantizeRun)
    check_family(init, parameters.family)
    if data is None and parameters.post_training != "rtn":
        raise GraceError(
            f"{run}: {parameters.post_training} looks at training conversations; give --data, a data folder"
        )
    settings = parameters.quantization
    outliers = (settings.outlier_every, settings.outlier_factor) if parameters.outliers else None
    with whole_folder(out, run=parameters.model_dump()) as folder:
        if data is None or parameters.post_training == "rtn":
            from grace.quant.rtn import round_checkpoint

            round_checkpoint(init, folder, parameters.bits, settings.group_size, outliers, parameters.scale)
        else:
            _round_with_activations(parameters, init, data, folder, outliers)


def _round_with_activations(
    parameters: QuantizeRun, init: Path, data: Path, folder: Path, outliers: tuple[int, float] | None
) -> None:
    # The only place where quant looks up the layers: the algorithms themselves take any model and any batches.
    import torch

    from grace.data import collate, load_examples
    from grace.models import forward_inputs, load_model, load_processor
    from grace.quant import add_outliers, awq, gptq, save_quantization
    from grace.quant.calibration import round_model
    from grace.quant.checkpoint import Checkpoint, copy_companions
    from grace.quant.grid import group_count
    from grace.quant.names import quantised_module

    settings = parameters.quantization
    source = Checkpoint.of_folder(init)
    for key in source:  # before the model is loaded and the data read
        if module := quantised_module(key):
            group_count(source.spec(key).shape[1], settings.group_size, module)
    processor = load_processor(data / "processor")
    model = load_model(init, torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    if outliers:
        add_outliers(model, *outliers)
    batches = []
    for example in load_examples(data, processor, limit=settings.calibration):
        batch = collate([example], processor)
        batches.append(forward_inputs(model, batch.input_ids, batch.attention_mask, batch.pixels))
    method = {"awq": awq, "gptq": gptq}[parameters.post_training]
    rule = partial(method.round_layer, bits=parameters.bits, group_size=settings.group_size)
    layers = round_model(model, batches, rule)
    cast(Any, model).cpu().to(torch.bfloat16).save_pretrained(folder)  # transformers hides the signature of `to`
    copy_companions(init, folder)
    save_quantization(folder, layers, parameters.bits, settings.group_size, parameters.post_training)
