"""The frozen parameters of one job: what a rule writes to `results/{experiment}/config/` and the job alone reads.

Jobs never read config.yaml: an edit while jobs are queued would otherwise run with new values and be recorded with
the old ones. Each class is one subcommand's complete set of parameters; paths come as command-line flags instead.
"""

from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from grace.config.schema import (
    Architecture,
    Bench,
    Cache,
    DemoData,
    Evaluation,
    Experiment,
    FilesData,
    Method,
    Optimisation,
    Quantization,
    Section,
)
from grace.config.sections import PostTraining
from grace.config.tuning import Tuning
from grace.errors import GraceError, problem
from grace.files import read_json
from grace.precision import split_precision

Run = TypeVar("Run", bound=Section)


def read_run(path: Path, kind: type[Run]) -> Run:
    """The frozen parameters of a job; a `GraceError` where the file is missing, cut or another job's."""
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        raise GraceError(
            f"{path}: not the frozen parameters of this job ({problem(error)}); delete it, and Snakemake writes it "
            "again"
        ) from None


class DataRun(Section):
    """`grace prepare`: the images, the conversations and the benchmarks."""

    data: DemoData | FilesData
    benchmarks: list[str]
    family: str | None = Field(default=None, description="of the models that data of your own is read for")


class TrainRun(Section):
    """`grace train`: teacher, baseline and every trained student, in one shape."""

    family: str
    compute_dtype: Literal["float32", "bfloat16"]
    architecture: Architecture | None = Field(
        default=None, description="make the model from scratch in this shape; null: start from --init"
    )
    seed: int
    optimisation: Optimisation
    kd: str = "none"
    constants: dict[str, float] = Field(default_factory=dict)
    rcka: bool = False
    controller: bool = False
    method: Method = Method()
    bits: int | None = Field(default=None, description="width of the decoder's weights; null: bf16")
    quantization: Quantization = Quantization()
    outliers: bool = Field(
        default=False, description="apply the function-preserving outlier transform to the starting weights"
    )


class QuantizeRun(Section):
    """`grace quantize`: rounding without training."""

    family: str
    post_training: PostTraining
    scale: Literal["maxabs", "format", "best"] = "maxabs"
    bits: int
    quantization: Quantization
    outliers: bool = False
    seed: int = 0


class CacheRun(Section):
    """`grace cache write`."""

    family: str
    compute_dtype: Literal["float32", "bfloat16"]
    cache: Cache
    temperature: float = Field(description="T that the `sampled` format bakes in")
    seed: int = 0


class EvaluateRun(Section):
    """`grace evaluate`."""

    family: str
    evaluation: Evaluation


class TuneRun(Section):
    """`grace tune`: the trials that are compared, each in a folder `{recipe}/trial{number}/seed{seed}`,
    counted from 1.
    """

    tuning: Tuning
    benchmarks: list[str]


class BenchRun(Section):
    """`grace bench kernel` and `grace bench decode`."""

    family: str
    bench: Bench
    group_size: int


def student_run(config: Experiment, recipe: str, precision: str, seed: int) -> TrainRun | QuantizeRun:
    """The frozen parameters of one student; only what it depends on, so that nothing else re-runs it."""
    bits, outliers = split_precision(precision)
    if recipe == "baseline":
        if config.student.pretrained is not None:
            raise ValueError("a pretrained baseline is fetched, not trained")
        assert config.student.train is not None, "a model without `pretrained` has `train`"
        return TrainRun(
            family=config.family,
            compute_dtype=config.compute_dtype,
            architecture=config.student.architecture,
            seed=seed,
            optimisation=config.student.train,
        )
    chosen = config.recipes[recipe]
    if chosen.post_training:
        if bits is None:
            raise ValueError("a recipe that rounds has no bf16 student")
        return QuantizeRun(
            family=config.family,
            post_training=chosen.post_training,
            scale=chosen.scale,
            bits=bits,
            quantization=config.quantization,
            outliers=outliers,
            seed=seed,
        )
    method = config.recipe_method(chosen) if chosen.distils else Method()
    return TrainRun(
        family=config.family,
        compute_dtype=config.compute_dtype,
        seed=seed,
        optimisation=config.recipe_optimisation(chosen),
        kd=chosen.kd,
        constants=chosen.constants,
        rcka=chosen.rcka,
        controller=chosen.controller,
        method=method,
        bits=bits,
        quantization=config.quantization if bits else Quantization(),
        outliers=outliers,
    )


def teacher_run(config: Experiment) -> TrainRun:
    """The frozen parameters of a teacher that is trained here."""
    if config.teacher.train is None:
        raise ValueError("a pretrained teacher is fetched, not trained")
    return TrainRun(
        family=config.family,
        compute_dtype=config.compute_dtype,
        architecture=config.teacher.architecture,
        seed=config.teacher.seed,
        optimisation=config.teacher.train,
    )
