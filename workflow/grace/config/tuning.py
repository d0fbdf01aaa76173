"""Trials of recipes' constants: what `grace tune` compares, the same number for every recipe."""

from typing import Any

from pydantic import Field

from grace.config.sections import MethodChanges, Name, OptimisationChanges, PrecisionName, Section, Seed

PARTS = ("method", "train", "constants")


class Trial(Section):
    """What one trial changes of its recipe."""

    method: MethodChanges = Field(default=MethodChanges(), description="constants of `method`")
    train: OptimisationChanges = Field(
        default=OptimisationChanges(), description="keys of `finetune`; not its length or batch, which are the budget"
    )
    constants: dict[str, float] = Field(default_factory=dict, description="constants of the objective's own")

    def changes(self) -> dict[str, Any]:
        """Values by their place in a recipe: `method.beta_init`."""
        return {f"{part}.{key}": value for part in PARTS for key, value in self.model_dump()[part].items()}


class Tuning(Section):
    """How recipes' constants are searched on the development split: `snakemake tune`."""

    precision: PrecisionName = Field(default="int4", description="precision of the students that are tried")
    seeds: list[Seed] = Field(default=[0, 1], min_length=1, description="each trial is trained once with each")
    trials: dict[Name, list[Trial]] = Field(
        min_length=1,
        description="by recipe what each trial changes of it (method, train, constants); every recipe has as many "
        "trials",
    )
