"""Which experiment, recipes and models a rule serves, as constraints of its wildcards."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from grace.config.plan import student_folder
from grace.config.schema import Experiment, Recipe

NOTHING = "(?!)"  # a pattern that no text matches: a rule that this experiment has no use for


class Constraints:
    """Patterns for wildcards, in which every name means itself."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment

    def where(self, condition: Any) -> str:
        """Constraint of the wildcard `experiment`: this one where a rule is of use to it, else nothing."""
        return re.escape(self.experiment.experiment) if condition else NOTHING

    @property
    def trained(self) -> str:
        """Recipes that train without a teacher."""
        return self._recipes(lambda recipe: recipe.trains and not recipe.distils)

    @property
    def distilled(self) -> str:
        """Recipes that learn from the teacher's cache."""
        return self._recipes(lambda recipe: recipe.trains and recipe.distils)

    @property
    def rounded(self) -> str:
        """Recipes that round without training."""
        return self._recipes(lambda recipe: recipe.post_training)

    @property
    def released(self) -> str:
        """Recipes whose students are fetched."""
        return self._recipes(lambda recipe: recipe.released)

    @property
    def made(self) -> str:
        """Recipes whose students are made here."""
        return self._recipes(lambda recipe: not recipe.released)

    @property
    def tuned(self) -> str:
        """Recipes that have trials."""
        return _any_of(self.experiment.tuning.trials if self.experiment.tuning else ())

    @property
    def asked(self) -> str:
        """Folders of the models that are evaluated."""
        return _any_of(["teacher", *(student_folder(*student) for student in self.experiment.students())])

    def _recipes(self, wanted: Callable[[Recipe], Any]) -> str:
        return _any_of(name for name, recipe in self.experiment.recipes.items() if wanted(recipe))


def _any_of(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names)) or NOTHING
