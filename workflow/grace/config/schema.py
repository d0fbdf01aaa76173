"""What an experiment is: the one definition that the JSON schema, the commented default and every check come from.

No torch and no transformers in here: Snakemake imports it for every dry run.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from grace.benchmarks.registry import task_id
from grace.config.evaluation import Bench, Evaluation
from grace.config.objectives import SAMPLED, objective_constants, objective_names
from grace.config.resources import TRAININGS, Job, Resources
from grace.config.sections import (
    DEMO_BENCHMARKS,
    Architecture,
    Cache,
    DemoData,
    FilesData,
    Label,
    Method,
    MethodChanges,
    Model,
    Name,
    Optimisation,
    OptimisationChanges,
    PostTraining,
    PrecisionName,
    Quantization,
    Release,
    Section,
    Seed,
    Teacher,
)
from grace.config.tuning import PARTS, Tuning
from grace.errors import GraceError
from grace.families import FAMILIES

__all__ = [
    "Architecture", "Bench", "Cache", "DemoData", "Evaluation", "Experiment", "FilesData", "Method", "Model",
    "Optimisation", "Quantization", "Recipe", "Resources", "Runs", "Section",
]  # fmt: skip

if TYPE_CHECKING:
    FamilyName = str  # a type checker knows no literal that is computed
else:
    FamilyName = Literal[*FAMILIES]


class Recipe(Section):
    """What a student is trained with, or how it is rounded without training."""

    post_training: PostTraining | None = Field(default=None, description="round without training; null: train")
    scale: Literal["maxabs", "format", "best"] = Field(
        default="maxabs",
        description="of `rtn`: max|w| / Qp, max|w| / half the code range (compressed-tensors' own), or the best of 20",
    )
    kd: str = Field(
        default="none",
        description="distillation: none, plain (KL), gated (gated decoupled), or another file of "
        "grace/distill/objectives",
    )
    constants: dict[str, float] = Field(
        default_factory=dict, description="constants of the distillation objective's own, by the names in its file"
    )
    rcka: bool = Field(default=False, description="align the visual tokens by relational CKA")
    controller: bool = Field(default=False, description="let the information-bottleneck controller set beta")
    start: str | None = Field(
        default=None,
        description="trained recipe whose bf16 student of the same seed this one starts from, as in grace/bf16; null: "
        "the baseline",
        pattern=r"^[^/]+/bf16$",
    )
    released: dict[PrecisionName, Release] = Field(
        default_factory=dict,
        description="fetch students instead of making them: by precision a checkpoint in a format of GRACE's release",
    )
    label: Label | None = Field(default=None, description="name in tables; null: the recipe's own name")
    method: MethodChanges = Field(default=MethodChanges(), description="constants of `method` that this recipe changes")
    train: OptimisationChanges = Field(
        default=OptimisationChanges(), description="keys of `finetune` that this recipe changes"
    )

    @property
    def trains(self) -> bool:
        """Whether its students are trained here."""
        return not (self.post_training or self.released)

    @property
    def distils(self) -> bool:
        """Whether they learn, or learnt, from a teacher."""
        return self.kd != "none" or self.rcka

    @field_validator("kd")
    @classmethod
    def _known(cls, kd: str) -> str:
        if kd not in (known := ["none", *objective_names()]):
            raise ValueError(f"no objective `{kd}`; there are {', '.join(known)}")
        return kd

    @model_validator(mode="after")
    def _sensible(self) -> "Recipe":
        own = (
            []
            if self.kd == "none"
            else [name for name in objective_constants(self.kd) if name not in Method.model_fields]
        )
        for name in self.constants:
            if name not in own:
                has = f"it has {', '.join(own) or 'none'}"
                fix = "set it under `method`" if name in Method.model_fields else has
                raise ValueError(f"`{name}` is no constant of `{self.kd}`'s own; {fix}")
        if self.post_training and (self.distils or self.controller or self.train or self.method):
            raise ValueError("a post-training recipe takes no training keys (kd, rcka, controller, method, train)")
        if self.released and (self.post_training or self.start or self.train or self.method or self.constants):
            raise ValueError(
                "a released student is not made here: beside `released` and `label` a recipe takes only what it was "
                "trained with (kd, rcka, controller)"
            )
        if odd := [name for name in self.released if name not in ("bf16", "int4", "int8")]:
            raise ValueError(f"released.{odd[0]}: there are releases at bf16, int8 and int4")
        if self.scale != "maxabs" and self.post_training != "rtn":
            raise ValueError("`scale` is of `post_training: rtn` alone; the others take the best of 20")
        if self.controller and self.kd == "none":
            raise ValueError("`controller` sets the weight of a distillation loss: set `kd` too")
        return self


STANDARD = {
    "finetune": Recipe(),
    "kd": Recipe(kd="plain"),
    "gdkd": Recipe(kd="gated"),
    "rcka": Recipe(rcka=True),
    "ib": Recipe(kd="plain", controller=True),
    "gdkd+rcka": Recipe(kd="gated", rcka=True),
    "gdkd+ib": Recipe(kd="gated", controller=True),
    "rcka+ib": Recipe(kd="plain", rcka=True, controller=True),
    "grace": Recipe(kd="gated", rcka=True, controller=True),
    "rtn": Recipe(post_training="rtn"),
    "awq": Recipe(post_training="awq"),
    "gptq": Recipe(post_training="gptq"),
}
"""Recipes that every experiment has: the paper's, each part of GRACE alone and in pairs,
and rounding without training.
"""


class Runs(Section):
    """Which recipes are run, at which precisions, with which seeds."""

    recipes: list[Name] = Field(min_length=1, description="keys of `recipes`")
    precisions: list[PrecisionName] = Field(
        min_length=1, description="bf16, int8, int4, int3 or int2, also with -outliers"
    )
    seeds: list[Seed] = Field(min_length=1, description="each seed is a student of its own")


class Experiment(Section):
    """One experiment, from images to tables."""

    experiment: Name = Field(description="name of the experiment and of its folder under results/")
    family: FamilyName = Field(default="llava", description="model family of teacher and student")
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16",
        description="dtype of the arithmetic in training; weights are always on bf16's grid, so what trains is what "
        "ships",
    )
    data: Annotated[DemoData | FilesData, Field(discriminator="source", description="images and conversations")]
    teacher: Teacher = Field(description="the large model that is learned from")
    student: Model = Field(description="the small model: its bf16 baseline is where every recipe starts")
    cache: Cache = Field(
        default=Cache(), description="what is kept of the teacher, so that it never runs inside training"
    )
    method: Method = Field(default=Method(), description="GRACE's own constants, under the paper's names")
    quantization: Quantization = Field(default=Quantization(), description="how decoder weights become integers")
    finetune: Optimisation | None = Field(
        default=None,
        description="training of every student recipe, starting from the baseline; null where nothing is trained",
    )
    recipes: dict[Name, Recipe] = Field(
        default_factory=lambda: dict(STANDARD),
        description="what students are trained with, beside the standard recipes; `baseline` is the starting point and "
        "needs no entry",
    )
    runs: list[Runs] = Field(min_length=1, description="the students that the tables are made of")
    baseline_seeds: list[Seed] = Field(
        default=[0],
        min_length=1,
        description="seeds of the baseline; a run's seed starts from the baseline of that seed",
    )
    tuning: Tuning | None = Field(
        default=None,
        description="trials of recipes' constants on the development split, for `snakemake tune`; null: none",
    )
    evaluation: Evaluation = Field(description="which questions are asked, and how")
    bench: Bench = Field(default=Bench(), description="the kernel and decoding benchmarks")
    resources: dict[Job, Resources] = Field(
        default_factory=dict, description="per kind of job: what it asks of the machine or the cluster"
    )

    @field_validator("recipes")
    @classmethod
    def _with_standard(cls, recipes: dict[str, Recipe]) -> dict[str, Recipe]:
        return {**recipes, **{name: recipe for name, recipe in STANDARD.items() if name not in recipes}}

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        self._check_recipes()
        self._check_runs()
        self._check_benchmarks()
        self._check_tuning()
        shape = self.student.architecture
        group = self.quantization.group_size
        for key in ("hidden_size", "intermediate_size"):
            if shape is not None and getattr(shape, key) % group:
                raise ValueError(
                    f"student.architecture.{key} {getattr(shape, key)} is no multiple of quantization.group_size "
                    f"{group}; change either"
                )
        for job, asked in self.resources.items():
            if asked.nodes > 1 and job not in TRAININGS:
                raise ValueError(
                    f"resources.{job}.nodes {asked.nodes}: such a job runs on one machine; {', '.join(TRAININGS)} "
                    "share several"
                )
        asking = self.resources.get("evaluate")
        if self.evaluation.engine == "vllm" and asking is not None and asking.gpus > 1:
            raise ValueError("resources.evaluate.gpus: evaluation.engine `vllm` takes one GPU a model; set it to 1")
        unknown = [b for b in self.evaluation.benchmarks if b not in DEMO_BENCHMARKS]
        if isinstance(self.data, DemoData) and unknown:
            raise ValueError(
                f"evaluation.benchmarks: no benchmark `{unknown[0]}` in the demo; it has {', '.join(DEMO_BENCHMARKS)}"
            )
        if isinstance(self.data, FilesData) and self.student.pretrained is None:
            raise ValueError("data.source `files` needs student.pretrained: its processor reads the images")
        made = [name for run in self.runs for name in run.recipes if not self.recipes[name].released]
        made += [] if self.teacher.pretrained else ["teacher"]
        if isinstance(self.data, FilesData) and not self.data.sources and made:
            raise ValueError(f"data.sources is empty, and `{made[0]}` is made from them; name the conversations")
        return self

    def _check_benchmarks(self) -> None:
        """Every benchmark is known, to the harness too, and asked under a protocol that has it."""
        for name in self.evaluation.benchmarks if self.data.source != "demo" else ():
            try:
                task_id(name, self.evaluation.harness)
                self.evaluation.protocols(name)
            except GraceError as error:
                raise ValueError(str(error)) from error

    def _check_recipes(self) -> None:
        if "baseline" in self.recipes:
            raise ValueError("recipes.baseline is reserved for the starting point; choose another name")
        for name, recipe in self.recipes.items():
            self._check_start(name)
            try:
                if self.cache.format == "sampled" and recipe.kd not in SAMPLED:
                    raise ValueError(
                        f"recipes.{name}.kd `{recipe.kd}` needs the teacher's full logits, which a `sampled` cache "
                        "lacks; set cache.format to hidden or hidden-int8"
                    )
                self.recipe_method(recipe)
                if self.finetune is not None:
                    self.recipe_optimisation(recipe)
            except ValidationError as error:
                raise ValueError(f"recipes.{name}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None

    def _check_start(self, name: str) -> None:
        """A recipe starts from the baseline, or by way of trained recipes that end there."""
        seen = [name]
        while start := self.recipes[seen[-1]].start:
            before = start.split("/")[0]
            trained = [other for other, recipe in self.recipes.items() if recipe.trains]
            if before not in trained:
                raise ValueError(
                    f"recipes.{seen[-1]}.start `{start}`: no trained recipe `{before}`; there are {', '.join(trained)}"
                )
            if before in seen:
                raise ValueError(f"recipes.{name}.start leads back to `{before}`; start one of them from the baseline")
            seen.append(before)

    def _check_runs(self) -> None:
        for index, run in enumerate(self.runs):
            for name in run.recipes:
                if name not in self.recipes:
                    raise ValueError(
                        f"runs[{index}].recipes names `{name}`, which `recipes` lacks; it has {', '.join(self.recipes)}"
                    )
                recipe = self.recipes[name]
                lacking = [p for p in run.precisions if recipe.released and p not in recipe.released]
                if lacking:
                    raise ValueError(
                        f"runs[{index}]: recipes.{name}.released has no {lacking[0]}; it has "
                        f"{', '.join(recipe.released)}"
                    )
                if self.finetune is None and recipe.trains:
                    raise ValueError(f"finetune: is not set, and runs[{index}] trains `{name}`; set it")
                if recipe.post_training and any(p.startswith("bf16") for p in run.precisions):
                    raise ValueError(f"runs[{index}]: `{name}` rounds weights, so bf16 is not a precision for it")
            missing = sorted(set(run.seeds) - set(self.baseline_seeds))
            if missing and self.student.pretrained is None:
                raise ValueError(f"runs[{index}].seeds has {missing}, which baseline_seeds lacks; add them there")
        if not self.timed():
            raise ValueError(
                f"bench: no run has recipe `{self.bench.recipe}` at {' or '.join(self.bench.precisions)}; "
                "set bench.recipe and bench.precisions to integer students of `runs`"
            )

    def _check_tuning(self) -> None:
        """Trials are of recipes that are trained here, as many and as long for each,
        on data with a development split.
        """
        if self.tuning is None:
            return
        if not isinstance(self.data, DemoData):
            raise ValueError("tuning: data.source `files` has no development split to choose on; leave it out")
        missing = sorted(set(self.tuning.seeds) - set(self.baseline_seeds))
        if missing and self.student.pretrained is None:
            raise ValueError(f"tuning.seeds has {missing}, which baseline_seeds lacks; add them there")
        counts, budgets = {}, {}
        for name, trials in self.tuning.trials.items():
            where = f"tuning.trials.{name}"
            recipe = self.recipes.get(name)
            if recipe is None or not recipe.trains or self.finetune is None:
                raise ValueError(f"{where}: no recipe of that name is trained here; correct the name, or leave it out")
            counts[name] = len(trials)
            for index in range(len(trials)):
                try:
                    tried = self.tried(name, index)
                    tried.recipe_method(tried.recipes[name])
                    length = tried.recipe_optimisation(tried.recipes[name])
                except ValidationError as error:
                    said = error.errors()[0]["msg"].removeprefix("Value error, ")
                    raise ValueError(f"{where}[{index}]: {said}") from None
                budgets[f"{where}[{index}]"] = (length.steps, length.epochs, length.batch)
        for named, what in ((counts, "trials"), (budgets, "(steps, epochs, batch)")):
            (first, budget), *others = named.items()
            if odd := next((one for one in others if one[1] != budget), None):
                raise ValueError(
                    f"tuning: `{first}` has {budget} {what} and `{odd[0]}` {odd[1]}; recipes compare only with equal "
                    "budgets"
                )

    def tried(self, recipe: str, index: int) -> "Experiment":
        """The experiment with a recipe as its trial `index` changes it; a ValidationError where that is no recipe."""
        assert self.tuning is not None, "trials are of `tuning`"
        before, trial = self.recipes[recipe].model_dump(), self.tuning.trials[recipe][index].model_dump()
        changed = Recipe.model_validate({**before, **{part: {**before[part], **trial[part]} for part in PARTS}})
        return self.model_copy(update={"recipes": {**self.recipes, recipe: changed}})

    def recipe_method(self, recipe: Recipe) -> Method:
        """The method's constants as this recipe changes them."""
        return Method(**{**self.method.model_dump(), **recipe.method.model_dump()})

    def recipe_optimisation(self, recipe: Recipe) -> Optimisation:
        """`finetune` as this recipe changes it; a `ValueError` where nothing is trained."""
        if self.finetune is None:
            raise ValueError("finetune: is not set")
        changes = recipe.train.model_dump()
        length = {"steps", "epochs"}
        kept = self.finetune.model_dump(exclude=length if length & changes.keys() else None)
        return Optimisation(**{**kept, **changes})

    def release(self, recipe: str, precision: str) -> Release | None:
        """Where a released student is fetched from; None for one that is made here."""
        chosen = self.recipes.get(recipe)  # the baseline is none
        return chosen.released.get(precision) if chosen else None

    def students(self) -> list[tuple[str, str, int]]:
        """Every (recipe, precision, seed) of the experiment, baselines first, each once, in the config's order."""
        listed = [("baseline", "bf16", seed) for seed in self.baseline_seeds]
        listed += [(r, p, s) for run in self.runs for p in run.precisions for r in run.recipes for s in run.seeds]
        return list(dict.fromkeys(listed))

    def timed(self) -> list[tuple[str, str, int]]:
        """The packed students that the benchmarks time: the first seed at each of `bench.precisions`."""
        first: dict[str, tuple[str, str, int]] = {}
        for recipe, precision, seed in self.students():
            if recipe == self.bench.recipe and precision.startswith("int") and precision in self.bench.precisions:
                first.setdefault(precision, (recipe, precision, seed))
        return list(first.values())
