"""The sections that say what is trained and how, each beside the checks that it can make on its own.

No torch and no transformers in here: Snakemake imports it for every dry run.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
    model_validator,
)

from grace.precision import PRECISION_PATTERN


def _without_braces(path: str) -> str:
    """Snakemake puts a wildcard's value in the place of its name in braces, or stops."""
    if "{" in path or "}" in path:
        raise ValueError(f"{path}: Snakemake takes braces for wildcards; rename it, or give a link without them")
    return path


def _one_line(label: str) -> str:
    """Text that no table, page or terminal acts upon."""
    if not label.isprintable():
        raise ValueError("a label is one line of letters that can be printed")
    return label


Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9_+.-]*[a-z0-9])?$", max_length=64)]  # a folder's
PositiveInt = Annotated[int, Field(gt=0, lt=2**53)]
Label = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_one_line)]
PathName = Annotated[str, AfterValidator(_without_braces)]  # of what rules name
Pretrained = Annotated[str, Field(pattern=r"^[^-]"), AfterValidator(_without_braces)]
PrecisionName = Annotated[str, Field(pattern=f"^{PRECISION_PATTERN}$")]
DEMO_BENCHMARKS = (
    "colour", "object", "position", "presence", "pairs", "digits", "reading", "options", "category", "count",
    "unanswerable",
)  # fmt: skip
"""What the demo's data can be asked; all are made, so that adding one to `evaluation.benchmarks` trains
nothing again.
"""

PostTraining = Literal["rtn", "awq", "gptq"]  # roundings without training, by the names of their modules in grace.quant
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DemoData(Section):
    """Images composed from real garments, digits and textures; nothing is downloaded."""

    source: Literal["demo"] = Field(default="demo", description="demo: made here; files: files of your own")
    images: PositiveInt = Field(
        default=4000, description="training images; with finetune_images of the models made here"
    )
    finetune_images: PositiveInt | None = Field(
        default=None,
        description="further images, for the students' training alone, as instruction data that no pretraining saw; "
        "null: the same images",
    )
    label_noise: Fraction = Field(
        default=0.0,
        description="share of wrong answers of the right kind in the students' training data, as annotators leave them",
    )
    questions_per_image: PositiveInt = Field(
        default=12, description="questions asked of each training image, in one conversation"
    )
    development_questions: PositiveInt = Field(
        default=200, description="questions per benchmark in the development split"
    )
    benchmark_questions: PositiveInt = Field(default=1000, description="questions per benchmark in the test split")
    seed: Seed = Field(default=0, description="seed of the images and questions")


class Source(Section):
    """One file, or folder of files, with conversations."""

    path: PathName = Field(description="JSON, JSONL or Parquet file, or folder of Parquet or of `datasets`")
    images: str | None = Field(default=None, description="folder that the records' image paths start from")
    format: Literal["auto", "llava", "sharegpt4v", "openai", "cauldron"] = Field(
        default="auto", description="how a record holds its conversation; auto: seen from its keys"
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="how often each conversation stands in the mix: 2 twice, 0.5 a drawn half",
    )
    limit: PositiveInt | None = Field(default=None, description="take only the first so many records")
    links_into: list[str] = Field(
        default=[], description="folders outside `images` that symbolic links inside it may lead into"
    )


class FilesData(Section):
    """Conversations and images of your own, as in LLaVA-1.5's mix665k, from one or several sources."""

    source: Literal["files"] = Field(description="demo: made here; files: files of your own")
    sources: list[Source] = Field(
        default=[], description="what the mix is made of; none where every student is a released one"
    )
    max_length: PositiveInt | None = Field(
        default=2048, description="longest conversation in tokens; longer ones lose their last turns, or are left out"
    )
    min_pixels: PositiveInt = Field(default=1, description="an image with fewer pixels makes its record a bad one")
    max_pixels: int = Field(
        default=64_000_000, ge=1, le=178_000_000, description="so does one with more, seen before it is decoded"
    )
    max_bad: Fraction = Field(default=0.01, description="largest share of bad records; they are left out and listed")
    seed: Seed = Field(default=0, description="seed of the mix's order")
    benchmarks: PathName | None = Field(
        default=None, description="folder of benchmark files, Parquet or VLMEvalKit's TSV, if any"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "FilesData":
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is more than max_pixels {self.max_pixels}; change either")
        return self


class Architecture(Section):
    """A decoder made from scratch behind the vision tower (the demo's models)."""

    hidden_size: PositiveInt = Field(description="width of the decoder")
    intermediate_size: PositiveInt = Field(description="width of its feed-forward layers")
    layers: PositiveInt = Field(description="decoder layers")
    heads: PositiveInt = Field(description="attention heads; each takes an even, equal share of the width")
    init_std: PositiveFloat = Field(default=0.08, description="standard deviation of the initial weights")
    embedding_std: PositiveFloat = Field(default=0.3, description="standard deviation of the initial word embeddings")
    rope_theta: PositiveFloat = Field(default=1e5, description="base of the rotary embedding's wavelengths")

    @model_validator(mode="after")
    def _even_heads(self) -> "Architecture":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of twice {self.heads} heads; change either"
            )
        return self


class Optimisation(Section):
    """How long and how fast a model is trained."""

    steps: PositiveInt | None = Field(default=None, description="optimiser steps; or give `epochs`")
    epochs: PositiveFloat | None = Field(
        default=None, description="times that every conversation is seen; or give `steps`"
    )
    batch: PositiveInt = Field(default=16, description="conversations per optimiser step, over all processes")
    micro_batch: PositiveInt = Field(default=16, description="conversations per forward pass of one process")
    learning_rate: PositiveFloat = Field(description="peak learning rate of the weights")
    warmup: Fraction = Field(default=0.03, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(default=1e-3, ge=0, description="AdamW's weight decay")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's smoothing of squared gradients")
    clip: PositiveFloat = Field(default=1.0, description="largest norm of the gradient")
    checkpoint_every: PositiveInt = Field(default=500, description="steps between resumable checkpoints")
    checkpoint_in_background: bool = Field(
        default=True,
        description="write checkpoints while training goes on, from a copy that stays in the host's memory; false: "
        "training waits",
    )
    validate_every: PositiveInt | None = Field(
        default=None,
        description="steps between measurements of the cross-entropy on the data's development split, for the log "
        "alone",
    )
    nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="a loss that is NaN or infinite: stop with the records named, or skip the step and count",
    )
    pass_tokens: PositiveInt | None = Field(
        default=None,
        description="tokens of one forward pass of conversations laid end to end, by layers that are compiled on a "
        "GPU; null: micro_batch conversations, padded",
    )
    kept_activations: Fraction = Field(
        default=0.0,
        description="with pass_tokens on a GPU: share of a layer's activations that the backward pass finds, and does "
        "not compute again",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass to save memory"
    )
    caption_steps: int = Field(
        default=0, ge=0, description="first steps, on captions alone (models made from scratch learn to see from them)"
    )

    @model_validator(mode="after")
    def _fits(self) -> "Optimisation":
        if self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is no multiple of micro_batch {self.micro_batch}; change either")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        if self.caption_steps and self.steps is None:
            raise ValueError("caption_steps counts steps, so give `steps` and not `epochs`")
        if self.steps is not None and self.caption_steps > self.steps:
            raise ValueError(f"caption_steps {self.caption_steps} is more than all {self.steps} steps; lower it")
        return self

    @property
    def total(self) -> int:
        """Optimiser steps, once they are counted."""
        if self.steps is None:
            raise ValueError("epochs are counted in steps when the conversations are known")
        return self.steps

    @property
    def duration(self) -> str:
        """In words, for pages that people read."""
        return f"{self.steps:,} steps" if self.epochs is None else f"{self.epochs:g} epochs"


class Model(Section):
    """A model: either made here (`architecture` and `train`) or fetched (`pretrained`)."""

    pretrained: Pretrained | None = Field(
        default=None, description="folder or hub id of a pretrained model; null: train one here"
    )
    revision: PathName | None = Field(default=None, description="hub revision of `pretrained`")
    architecture: Architecture | None = Field(default=None, description="shape of the model made here")
    train: Optimisation | None = Field(default=None, description="training of the model made here")

    @model_validator(mode="after")
    def _one_source(self) -> "Model":
        made = self.architecture is not None and self.train is not None
        if made == (self.pretrained is not None):
            raise ValueError("give either `pretrained`, or both `architecture` and `train`")
        return self


class Teacher(Model):
    """The model that is learned from. Students have their runs' seeds; there is one teacher."""

    seed: Seed = Field(default=0, description="seed of the model made here")


class Release(Section):
    """A checkpoint that the authors of GRACE released: dense with its codes beside it, packed for AWQ, or bf16."""

    pretrained: Pretrained = Field(description="folder or hub id of the checkpoint")
    revision: PathName | None = Field(default=None, description="hub revision of `pretrained`")


class Cache(Section):
    """What is kept of the teacher so that it never runs inside training."""

    format: Literal["hidden", "hidden-int8", "sampled"] = Field(
        default="hidden", description="how the teacher's logits are kept"
    )
    shards: int = Field(default=2, ge=1, le=9999, description="independent parts, each a job of its own")
    pass_tokens: PositiveInt | None = Field(
        default=None,
        description="tokens of one forward pass of the teacher over conversations laid end to end, by layers that are "
        "compiled on a GPU; null: padded batches",
    )
    audit: Fraction = Field(
        default=0.001, description="share of the records also kept in full precision, to measure the cache's error"
    )


class Method(Section):
    """GRACE's own constants, under the paper's names."""

    temperature: PositiveFloat = Field(default=2.0, description="T of the distillation")
    logits_dtype: Literal["float32", "model"] = Field(
        default="float32",
        description="what both models' logits are rounded to in the loss; `model`: the head's dtype, half the memory",
    )
    alpha: float = Field(default=1.0, ge=0, description="weight of the target-class part (TCKD)")
    beta_dkd: float = Field(default=4.0, ge=0, description="weight of the non-target part (NCKD)")
    omega: float = Field(default=3.0, ge=0, description="weight of the relational CKA loss")
    omega_warmup: Fraction = Field(default=0.1, description="share of the steps in which omega rises linearly from 0")
    tau: float = Field(default=3.0, description="the controller's budget for the distillation loss")
    eta: PositiveFloat = Field(default=0.003, description="the controller's step size")
    beta_init: float = Field(default=0.5, ge=0, description="first weight of the distillation loss")
    beta_min: float = Field(default=0.1, ge=0, description="its lower bound")
    beta_max: float = Field(default=1.0, ge=0, description="its upper bound")
    ema_decay: float = Field(default=0.99, ge=0, lt=1, description="smoothing of the loss that the controller reads")

    @model_validator(mode="after")
    def _ordered(self) -> "Method":
        if not self.beta_min <= self.beta_init <= self.beta_max:
            raise ValueError("beta_min <= beta_init <= beta_max does not hold")
        return self


class Quantization(Section):
    """How decoder weights become integers."""

    group_size: Literal[16, 32, 64, 128, 256] = Field(
        default=128, description="weights along the input that share a scale"
    )
    scale_lr_factor: PositiveFloat = Field(
        default=10.0, description="learning rate of the scales over that of the weights"
    )
    calibration: PositiveInt = Field(default=128, description="training conversations that AWQ and GPTQ look at")
    outlier_every: PositiveInt = Field(default=32, description="the outlier transform scales one channel in so many")
    outlier_factor: PositiveFloat = Field(default=16.0, description="by this factor")


class Changes(Section):
    """Keys of another section, each optional: what a recipe changes of it. False when it changes none."""

    def __bool__(self) -> bool:
        return bool(self.model_dump())

    @model_serializer(mode="wrap")
    def _only_changes(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in whole(self).items() if value is not None}


def _changes(section: type[Section]) -> type[Changes]:
    """`section` with every key optional, under the same checks."""
    keys: dict[str, Any] = {}
    for key, field in section.model_fields.items():
        checked: Any = Annotated[(field.annotation, Field(description=field.description), *field.metadata)]
        keys[key] = (checked | None, Field(default=None, description=field.description))
    return create_model(f"{section.__name__}Changes", __base__=Changes, **keys)


class MethodChanges(_changes(Method)):
    """Keys of Method that a recipe changes."""


class OptimisationChanges(_changes(Optimisation)):
    """Keys of Optimisation that a recipe changes."""
