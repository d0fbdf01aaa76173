"""`grace train`: read the frozen parameters, start from the right weights, train, and keep what ships."""

from pathlib import Path
from typing import Any

import torch

from grace.config.job_parameters import TrainRun, read_run
from grace.data import load_prepared
from grace.data.development import development_examples
from grace.data.prepared import captions_of
from grace.distributed import join_world, whole
from grace.errors import GraceError
from grace.families import check_family, family_of
from grace.files import MANIFEST
from grace.models import build_llava, load_model, load_processor, vision_tower, vocabulary
from grace.quant import save_quantization
from grace.quant.chat_template import write_bos
from grace.quant.checkpoint import name_as_published
from grace.teacher.forward import check_examples, check_sight
from grace.train.finished_run import finish, finished, publish
from grace.train.loop import Trainer, counted, run_identity
from grace.train.objective import Objective
from grace.train.watch import check_watchers
from grace.world import World


def _starting_model(run: TrainRun, processor, data: Path, init: Path | None, world: World) -> Any:
    dtype = getattr(torch, run.compute_dtype)
    if run.architecture is not None:
        model = build_llava(run.architecture, processor, data / "vision_tower", run.seed).to(dtype)
    else:
        assert init is not None  # `train` asks for it
        check_family(init, run.family)
        model: Any = load_model(init, dtype=dtype)
        if run.outliers:
            from grace.quant import add_outliers

            add_outliers(model, run.quantization.outlier_every, run.quantization.outlier_factor)
    return model.to(world.device)


def _check_weights(model, init: Path | None) -> None:
    """Refuse to start from weights that are NaN or infinite; a `GraceError` names the first."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise GraceError(f"{init}: {name} holds NaN or infinite weights; fetch or train this model again")


def _finish(model, processor, trainer: Trainer) -> None:
    """Keep the trained model beside the checkpoints, from the first process; the others help to gather the weights."""
    run = trainer.run
    weights = {name: whole(tensor).cpu() for name, tensor in model.state_dict().items()}
    weights = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in weights.items()}
    layers = trainer.optimizer.quantised()

    def save(folder: Path) -> None:
        model.config.dtype = torch.bfloat16
        model.save_pretrained(folder, state_dict=weights)
        name_as_published(folder, family_of(model).published)
        processor.save_pretrained(folder)
        write_bos(folder)
        if run.bits is not None:
            save_quantization(folder, layers, run.bits, run.quantization.group_size, "lsq")

    if trainer.world.first:
        finish(trainer.checkpoints, trainer.identity, trainer.log, save)


def train(
    run: Path,
    data: Path,
    out: Path,
    log: Path,
    checkpoints: Path,
    init: Path | None = None,
    cache: Path | None = None,
    teacher: Path | None = None,
) -> None:
    """Train the model that the frozen parameters `run` describe and write it to `out`.

    Args:
        run: a frozen `TrainRun`.
        data: the data folder.
        out: the model folder to make; what the steps took goes to `timing.jsonl` in it.
        log: JSON lines, one per optimiser step.
        checkpoints: folder for resumable checkpoints, and for the finished run until it is accepted.
        init: the model to start from; needed unless `run` gives an architecture.
        cache: the teacher's cache; needed by recipes that distil.
        teacher: the teacher's model folder, to refuse a cache of another one.

    Raises:
        GraceError: before the first step: files that do not fit together, weights or data that cannot be trained on.
    """
    parameters = read_run(run, TrainRun)
    if (parameters.architecture is None) == (init is None):
        raise GraceError(f"{run}: give --init exactly when the run has no architecture of its own")
    distils = parameters.kd != "none" or parameters.rcka
    if distils and cache is None:
        raise GraceError(f"{run}: this recipe distils; give the teacher's cache with --cache")
    world = join_world()
    identity = run_identity(
        parameters, data / MANIFEST, init / MANIFEST if init else None, cache / MANIFEST if cache and distils else None
    )
    if not any(world.gather([world.first and finished(checkpoints, identity)])):
        _train(parameters, data, checkpoints, identity, world, init, cache if distils else None, teacher)
    if world.first:
        publish(checkpoints, out, log, run=parameters.model_dump())
    world.barrier()


def _train(
    parameters: TrainRun,
    data: Path,
    checkpoints: Path,
    identity: str,
    world: World,
    init: Path | None,
    cache: Path | None,
    teacher: Path | None,
) -> None:
    """All steps that are left, and the finished run beside the checkpoints."""
    check_watchers()
    torch.manual_seed(parameters.seed)
    processor = load_processor(data / "processor")
    model = _starting_model(parameters, processor, data, init, world)
    _check_weights(model, init)
    size = vocabulary(processor)
    development = development_examples(data, processor) if parameters.optimisation.validate_every else []
    examples = load_prepared(data, vision_tower(model))
    asked = int((~captions_of(examples)).sum())
    parameters = parameters.model_copy(update={"optimisation": counted(parameters.optimisation, asked)})
    objective = Objective(model, parameters, size)
    if cache is not None:
        from grace.train.distillation import Distillation, open_cache

        objective = Distillation(model, parameters, size, open_cache(cache, parameters, data, teacher))
    part = slice(len(examples) * world.rank // world.size, len(examples) * (world.rank + 1) // world.size)
    check_examples(examples[part], model, size)
    check_sight(model, processor, examples)
    objective.check(examples)
    growing = checkpoints / "train.jsonl"  # the log is a rule's output, which Snakemake deletes when the job is killed
    trainer = Trainer(
        model,
        processor,
        examples,
        parameters,
        objective,
        growing,
        checkpoints,
        identity,
        world,
        development=development,
    )
    trainer.train()
    _finish(model, processor, trainer)
