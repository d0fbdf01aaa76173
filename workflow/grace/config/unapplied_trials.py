"""Whether the recipes are as `grace tune` chose them: the record of an experiment's trials against its
configuration.
"""

from pathlib import Path
from typing import Any

from grace.config.schema import Experiment
from grace.errors import GraceError
from grace.files import read_json

RECORD = "tuning/trials.json"  # below results/{experiment}


def unapplied(experiment: Experiment, results: Path = Path("results")) -> list[str]:
    """A sentence for each constant that is not what its trials chose; one that says so where the record is damaged."""
    path = results / experiment.experiment / RECORD
    if not path.is_file():
        return []
    try:
        chosen = {name: entry["chosen"]["changes"] for name, entry in read_json(path)["recipes"].items()}
        said = []
        for name, changes in chosen.items():
            if name in experiment.recipes:
                mine = _present(experiment, name, changes)
                other = [key for key, value in changes.items() if mine[key] != value]
                said += [
                    f"{path}: the best trial of `{name}` has {key} {changes[key]}, and the configuration {mine[key]}; "
                    f"set recipes.{name}.{key}, or tune again"
                    for key in other
                ]
        return said
    except GraceError as error:
        return [str(error)]
    except (KeyError, TypeError, AttributeError, ValueError):
        return [f"{path}: not a record of trials; take it from git again, or delete it and tune again"]


def _present(experiment: Experiment, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What the recipe has now at each of the places of `changes`."""
    recipe = experiment.recipes[name]
    parts = {
        "method": experiment.recipe_method(recipe).model_dump(),
        "train": experiment.recipe_optimisation(recipe).model_dump() if experiment.finetune else {},
        "constants": recipe.constants,
    }
    return {key: parts[part].get(inner) for key in changes for part, _, inner in [key.partition(".")]}
