"""`grace train`: read the frozen parameters, start from the right weights, train, and keep what ships."""

import shutil
from pathlib import Path

import torch

from grace.config.runs import TrainRun
from grace.data import load_examples
from grace.errors import GraceError
from grace.files import MANIFEST, read_json, whole_folder
from grace.models import build_llava, load_model, load_processor
from grace.quant import save_quantization
from grace.teacher.reader import TeacherCache
from grace.train.loop import run_identity, train_model


def train(
    run: Path,
    data: Path,
    out: Path,
    log: Path,
    checkpoints: Path,
    init: Path | None = None,
    cache: Path | None = None,
) -> None:
    """Train the model that the frozen parameters `run` describe and write it to `out`.

    Args:
        run: a frozen `TrainRun`.
        data: the data folder.
        out: the model folder to make.
        log: JSON lines, one per optimiser step.
        checkpoints: folder for resumable checkpoints; emptied when the run ends well.
        init: the model to start from; needed unless `run` gives an architecture.
        cache: the teacher's cache; needed by recipes that distil.
    """
    parameters = TrainRun.model_validate(read_json(run))
    if (parameters.architecture is None) == (init is None):
        raise GraceError(f"{run}: give --init exactly when the run has no architecture of its own")
    processor = load_processor(data / "processor")
    dtype = getattr(torch, parameters.compute_dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(parameters.seed)
    if parameters.architecture is not None:
        model = build_llava(parameters.architecture, processor, data / "vision_tower", parameters.seed).to(dtype)
    else:
        model = load_model(init, dtype=dtype)
        if parameters.outliers:
            from grace.quant import add_outliers

            add_outliers(model, parameters.quantization.outlier_every, parameters.quantization.outlier_factor)
    model.to(device)
    distils = parameters.kd != "none" or parameters.rcka
    targets = TeacherCache.open(cache) if distils and cache is not None else None
    identity = run_identity(
        parameters, data / MANIFEST, init / MANIFEST if init else None, cache / MANIFEST if targets else None
    )
    examples = load_examples(data, processor)
    optimizer = train_model(model, processor, examples, parameters, targets, log, checkpoints, identity)
    with whole_folder(out, run=parameters.model_dump(), identity=identity) as folder:
        model.to("cpu", torch.bfloat16).eval().save_pretrained(folder)
        processor.save_pretrained(folder)
        if parameters.bits is not None:
            save_quantization(
                folder,
                optimizer.quantised(),
                bits=parameters.bits,
                group_size=parameters.quantization.group_size,
                method="lsq",
            )
    shutil.rmtree(checkpoints)
