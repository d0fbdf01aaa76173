"""What an experiment is: the one definition that the JSON schema, the commented default and every check come from.

No torch and no transformers in here: Snakemake imports it for every dry run.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9_+.-]*[a-z0-9])?$")]
PrecisionName = Annotated[str, Field(pattern=r"^(bf16|int[2348])(-outliers)?$")]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DemoData(Section):
    """Pictures composed from real garments, digits and textures; nothing is downloaded."""

    source: Literal["demo"] = "demo"
    pictures: PositiveInt = Field(4000, description="training pictures")
    questions_per_picture: PositiveInt = Field(
        12, description="questions asked of each training picture, in one conversation"
    )
    development_questions: PositiveInt = Field(200, description="questions per benchmark in the development split")
    benchmark_questions: PositiveInt = Field(1000, description="questions per benchmark in the test split")
    seed: Seed = Field(0, description="seed of the pictures and questions")


class LlavaData(Section):
    """A conversation file in LLaVA's format beside its picture folder, as in LLaVA-1.5's mix665k."""

    source: Literal["llava"]
    conversations: str = Field(description="path of the JSON file with the conversations")
    pictures: str = Field(description="folder that the JSON file's `image` paths start from")
    limit: PositiveInt | None = Field(None, description="take only the first so many conversations")


class Architecture(Section):
    """A decoder made from scratch behind the vision tower (the demo's models)."""

    hidden_size: PositiveInt = Field(description="width of the decoder")
    intermediate_size: PositiveInt = Field(description="width of its feed-forward layers")
    layers: PositiveInt = Field(description="decoder layers")
    heads: PositiveInt = Field(description="attention heads")
    init_std: PositiveFloat = Field(0.08, description="standard deviation of the initial weights")


class Optimisation(Section):
    """How long and how fast a model is trained."""

    steps: PositiveInt = Field(description="optimiser steps")
    batch: PositiveInt = Field(16, description="conversations per optimiser step, over all processes")
    micro_batch: PositiveInt = Field(16, description="conversations per forward pass of one process")
    learning_rate: PositiveFloat = Field(description="peak learning rate of the weights")
    warmup: Fraction = Field(0.03, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(1e-3, ge=0, description="AdamW's weight decay")
    clip: PositiveFloat = Field(1.0, description="largest norm of the gradient")
    checkpoint_every: PositiveInt = Field(500, description="steps between resumable checkpoints")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")
    caption_steps: int = Field(0, ge=0, description="first steps, trained on captions alone (models made from scratch)")


class Model(Section):
    """A model: either made here (`architecture` and `train`) or fetched (`pretrained`)."""

    pretrained: str | None = Field(None, description="folder or hub id of a pretrained model; null: train one here")
    revision: str | None = Field(None, description="hub revision of `pretrained`")
    architecture: Architecture | None = Field(None, description="shape of the model made here")
    train: Optimisation | None = Field(None, description="training of the model made here")

    @model_validator(mode="after")
    def _one_source(self) -> "Model":
        made = self.architecture is not None and self.train is not None
        if made == (self.pretrained is not None):
            raise ValueError("give either `pretrained`, or both `architecture` and `train`")
        return self


class Cache(Section):
    """What is kept of the teacher so that it never runs inside training."""

    format: Literal["hidden", "hidden-int8", "sampled"] = Field(
        "hidden", description="how the teacher's logits are kept"
    )
    shards: PositiveInt = Field(2, description="independent parts, each a job of its own")
    audit: Fraction = Field(
        0.001, description="share of the records also kept in full precision, to measure the cache's error"
    )


class Method(Section):
    """GRACE's own constants, under the paper's names."""

    temperature: PositiveFloat = Field(2.0, description="T of the distillation")
    alpha: float = Field(1.0, ge=0, description="weight of the target-class part (TCKD)")
    beta_dkd: float = Field(4.0, ge=0, description="weight of the non-target part (NCKD)")
    omega: float = Field(3.0, ge=0, description="weight of the relational CKA loss")
    omega_warmup: Fraction = Field(0.1, description="share of the steps in which omega rises linearly from 0")
    tau: float = Field(3.0, description="the controller's budget for the distillation loss")
    eta: PositiveFloat = Field(0.003, description="the controller's step size")
    beta_init: float = Field(0.5, ge=0, description="first weight of the distillation loss")
    beta_min: float = Field(0.1, ge=0, description="its lower bound")
    beta_max: float = Field(1.0, ge=0, description="its upper bound")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="smoothing of the loss that the controller reads")

    @model_validator(mode="after")
    def _ordered(self) -> "Method":
        if not self.beta_min <= self.beta_init <= self.beta_max:
            raise ValueError("beta_min <= beta_init <= beta_max does not hold")
        return self


class Quantization(Section):
    """How decoder weights become integers."""

    group_size: Literal[16, 32, 64, 128, 256] = Field(128, description="weights along the input that share a step size")
    scale_lr_factor: PositiveFloat = Field(10.0, description="learning rate of the step sizes over that of the weights")
    calibration: PositiveInt = Field(128, description="training conversations that AWQ and GPTQ look at")
    outlier_every: PositiveInt = Field(32, description="the outlier transform scales one channel in so many")
    outlier_factor: PositiveFloat = Field(16.0, description="by this factor")


class Recipe(Section):
    """What a student is trained with, or how it is rounded without training."""

    post_training: Literal["rtn", "awq", "gptq"] | None = Field(None, description="round without training; null: train")
    kd: Literal["none", "plain", "gated"] = Field(
        "none", description="distillation: none, plain KL, or gated decoupled"
    )
    rcka: bool = Field(False, description="align the visual tokens by relational CKA")
    controller: bool = Field(False, description="let the information-bottleneck controller set beta")
    label: str | None = Field(None, description="name in tables; null: the recipe's own name")
    method: dict[str, float] = Field(default_factory=dict, description="constants of `method` that this recipe changes")
    train: dict[str, float | int | bool] = Field(
        default_factory=dict, description="keys of `finetune` that this recipe changes"
    )

    @model_validator(mode="after")
    def _sensible(self) -> "Recipe":
        if self.post_training and (self.kd != "none" or self.rcka or self.controller or self.train or self.method):
            raise ValueError("a post-training recipe takes no training keys (kd, rcka, controller, method, train)")
        if self.controller and self.kd == "none":
            raise ValueError("`controller` sets the weight of a distillation loss: set `kd` to plain or gated too")
        return self


class Runs(Section):
    """Which recipes are run, at which precisions, with which seeds."""

    recipes: list[Name] = Field(min_length=1, description="keys of `recipes`")
    precisions: list[PrecisionName] = Field(
        min_length=1, description="bf16, int8, int4, int3 or int2, also with -outliers"
    )
    seeds: list[Seed] = Field(min_length=1, description="each seed is a student of its own")


class Evaluation(Section):
    """How predictions are made."""

    benchmarks: list[Name] = Field(min_length=1, description="names in the benchmark registry")
    batch: PositiveInt = Field(128, description="questions per forward pass")
    max_new_tokens: PositiveInt = Field(8, description="longest answer in tokens")
    limit: PositiveInt | None = Field(None, description="only the first so many questions of each benchmark")
    harness: Literal["lm-eval", "lmms-eval", "vlmeval"] = Field(
        "lm-eval", description="who asks the questions and scores the answers"
    )
    vlmeval_checkout: str | None = Field(
        None, description="folder of a VLMEvalKit checkout, where `harness` is vlmeval"
    )


class Bench(Section):
    """The kernel and decoding benchmarks."""

    rows: list[PositiveInt] = Field(
        [1, 2, 4, 8, 16, 32, 64, 128], description="M: activation rows of the kernel benchmark"
    )
    batches: list[PositiveInt] = Field([1, 8], description="batch sizes of the decoding benchmark")
    new_tokens: PositiveInt = Field(32, description="tokens decoded per sequence")
    repeats: PositiveInt = Field(5, description="timed repetitions; the median is reported")


class Resources(Section):
    """What a job asks of the machine or the cluster; memory in MB, runtime in minutes."""

    cpus: PositiveInt = 1
    mem_mb: PositiveInt = 2000
    gpus: int = Field(0, ge=0)
    runtime: PositiveInt = 30


class Experiment(Section):
    """One experiment, from pictures to tables."""

    experiment: Name = Field(description="name of the experiment and of its folder under results/")
    family: Literal["llava", "qwen2_vl", "qwen3_vl"] = Field("llava", description="model family of teacher and student")
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="dtype of the arithmetic in training; weights are always on bf16's grid, so what trains is what ships",
    )
    data: Annotated[DemoData | LlavaData, Field(discriminator="source")]
    teacher: Model
    student: Model
    cache: Cache = Cache()
    method: Method = Method()
    quantization: Quantization = Quantization()
    finetune: Optimisation = Field(description="training of every student recipe, starting from the baseline")
    recipes: dict[Name, Recipe] = Field(
        description="what students are trained with; `baseline` is the starting point and needs no entry"
    )
    runs: list[Runs] = Field(min_length=1, description="the students that the tables are made of")
    baseline_seeds: list[Seed] = Field(
        [0], min_length=1, description="seeds of the baseline; a run's seed starts from the baseline of that seed"
    )
    evaluation: Evaluation
    bench: Bench = Bench()
    resources: dict[str, Resources] = Field(default_factory=dict, description="per rule: what its jobs ask for")

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        if "baseline" in self.recipes:
            raise ValueError("recipes.baseline is reserved for the starting point; choose another name")
        for index, run in enumerate(self.runs):
            for name in run.recipes:
                if name not in self.recipes:
                    raise ValueError(
                        f"runs[{index}].recipes names `{name}`, which `recipes` lacks; it has {', '.join(self.recipes)}"
                    )
                if self.recipes[name].post_training and any(p.startswith("bf16") for p in run.precisions):
                    raise ValueError(f"runs[{index}]: `{name}` rounds weights, so bf16 is not a precision for it")
            missing = sorted(set(run.seeds) - set(self.baseline_seeds))
            if missing and self.student.pretrained is None:
                raise ValueError(f"runs[{index}].seeds has {missing}, which baseline_seeds lacks; add them there")
        return self

    def students(self) -> list[tuple[str, str, int]]:
        """Every (recipe, precision, seed) of the experiment, baselines first, each once, in the config's order."""
        listed = [("baseline", "bf16", seed) for seed in self.baseline_seeds]
        listed += [(r, p, s) for run in self.runs for p in run.precisions for r in run.recipes for s in run.seeds]
        return list(dict.fromkeys(listed))
