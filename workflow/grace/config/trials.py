"""The trials of `tuning`, each a student in a folder of its own that nothing else of the experiment reads."""

import os
import shlex
from typing import Any

from grace.config.plan import Plan


class Trials:
    """Which file feeds which trial."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @property
    def predictions(self) -> list[str]:
        """What every trial answered on the development split."""
        tuning = self.plan.experiment.tuning
        if tuning is None:
            return []
        return [
            f"{self.plan.folder}/.trials/{recipe}/trial{number}/seed{seed}/predictions/manifest.json"
            for recipe, trials in tuning.trials.items()
            for number in range(1, len(trials) + 1)
            for seed in tuning.seeds
        ]

    def code(self, wildcards: Any) -> str:
        """The frozen code of a trial's training, with a teacher or without."""
        if self._distils(wildcards):
            return self.plan.distil_code(wildcards)
        return self.plan.code("train").format(**dict(wildcards.items()))

    def cache(self, wildcards: Any) -> list[str]:
        """The teacher's cache, where a trial's recipe learns from it."""
        return [f"{self.plan.folder}/teacher/cache/manifest.json"] if self._distils(wildcards) else []

    def cache_flag(self, wildcards: Any) -> str:
        """The folder of that cache."""
        return " ".join(f"--cache {shlex.quote(os.path.dirname(path))}" for path in self.cache(wildcards))

    def _distils(self, wildcards: Any) -> bool:
        return self.plan.experiment.recipes[wildcards.recipe].distils
