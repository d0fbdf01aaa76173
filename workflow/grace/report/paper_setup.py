"""What printed numbers were made from, as far as their source says it, and in what an experiment differs from that.

A number of the paper stands beside one of ours only where both are about the same models, asked the same questions, and
trained or rounded by what the source states: weights by their hub ids, the conversation files, epochs, the method's
constants, the scales' learning rate and group. What no source states (the optimiser's other values) may differ.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from grace.config.schema import Experiment, FilesData, Method, Recipe


@dataclass(frozen=True)
class Setup:
    """The models of a family whose numbers are printed, and how its students were made.

    Attributes:
        name: of the model in paper_tables.csv.
        teacher, student: hub ids of the same weights.
        epochs: of a student's training.
        scale_lr_factor: learning rate of the scales over that of the weights.
    """

    name: str
    teacher: tuple[str, ...]
    student: tuple[str, ...]
    epochs: float
    scale_lr_factor: float


SETUPS = {
    "llava": Setup(
        "LLaVA-1.5",
        ("llava-hf/llava-1.5-13b-hf", "liuhaotian/llava-v1.5-13b"),
        ("llava-hf/llava-1.5-7b-hf", "liuhaotian/llava-v1.5-7b"),
        epochs=3,
        scale_lr_factor=10,
    ),
    "qwen2_vl": Setup(
        "Qwen2-VL", ("Qwen/Qwen2-VL-7B-Instruct",), ("Qwen/Qwen2-VL-2B-Instruct",), epochs=3, scale_lr_factor=10
    ),
    "qwen3_vl": Setup(
        "Qwen3-VL", ("Qwen/Qwen3-VL-8B-Instruct",), ("Qwen/Qwen3-VL-2B-Instruct",), epochs=1, scale_lr_factor=20
    ),
}
"""By `family`; the last is the authors' released run."""
FILES = {
    "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
    "sharegpt4v_instruct_gpt4-vision_cap100k.json",
}
"""The conversations that the authors' code names; the paper's text names none."""
GROUP_SIZE = 128
AUTHORS = ("ForeverBlue/", "FoeverBLUE/")  # the hub names that their pages give, newer and older
METHOD = Method()  # its defaults are the sources' values
UNSTATED = {"omega_warmup", "logits_dtype"}


def hub_id(model: str) -> str:
    """`owner/name` of a snapshot in the hub's cache; of anything else what it is called."""
    found = re.search(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+/?$", model)
    return f"{found[1]}/{found[2]}" if found else model


def setup_of(experiment: Experiment) -> Setup | None:
    """Where an experiment's teacher and student are the very models that numbers are printed for: their setup."""
    setup = SETUPS.get(experiment.family)
    models = [experiment.teacher.pretrained, experiment.student.pretrained]
    if setup is None or None in models:
        return None
    names = [hub_id(str(model)) for model in models]
    return setup if names[0] in setup.teacher and names[1] in setup.student else None


def asked_otherwise(experiment: Experiment) -> list[str]:
    """What makes the questions others than those of a protocol, beside the protocol itself."""
    evaluation = experiment.evaluation
    found = [f"evaluation.limit is {evaluation.limit}"] if evaluation.limit is not None else []
    return found + (["evaluation.max_new_tokens is set"] if evaluation.max_new_tokens else [])


def made_otherwise(experiment: Experiment, recipe: Recipe, quantised: bool) -> list[str]:
    """In what a student of this recipe differs from what the source of the printed numbers states."""
    found = []
    setup, quantization = SETUPS[experiment.family], experiment.quantization
    if quantised and quantization.group_size != GROUP_SIZE:
        found.append(f"quantization.group_size is {quantization.group_size} (there {GROUP_SIZE})")
    if recipe.post_training:
        return found
    if recipe.released:
        models = [hub_id(release.pretrained) for release in recipe.released.values()]
        return [f"{name} is no hub id of the authors'" for name in models if not name.startswith(AUTHORS)]
    data = experiment.data
    if not isinstance(data, FilesData) or not {Path(source.path).name for source in data.sources} <= FILES:
        found.append("data.sources are other files")
    elif any(source.limit is not None or source.weight != 1 for source in data.sources):
        found.append("data.sources are taken in part")
    optimisation = experiment.recipe_optimisation(recipe)
    if optimisation.epochs != setup.epochs:
        found.append(f"the training is {optimisation.duration} (there {setup.epochs:g} epochs)")
    if quantised and quantization.scale_lr_factor != setup.scale_lr_factor:
        found.append(
            f"quantization.scale_lr_factor is {quantization.scale_lr_factor:g} (there {setup.scale_lr_factor:g})"
        )
    if recipe.distils:
        ours, theirs = (each.model_dump(exclude=UNSTATED) for each in (experiment.recipe_method(recipe), METHOD))
        found += [
            f"method.{name} is {ours[name]:g} (there {theirs[name]:g})" for name in ours if ours[name] != theirs[name]
        ]
    return found
