"""The paper's names for what a recipe is, and the paper's numbers (paper_tables.csv)."""

from functools import cache
from pathlib import Path

import pandas as pd

from grace.benchmarks.registry import BENCHMARKS
from grace.config.schema import Experiment, Recipe
from grace.report.paper_setup import asked_otherwise, made_otherwise, setup_of
from grace.results.read import BASELINE, TEACHER, Row

GRACE = "grace"
AVERAGE = "average"
PARTS = ("gdkd", "rcka", "ib")
ARXIV = "arXiv 2601.22709"
DEMO = "demo models, not LLaVA-1.5"
_LABELS = {"teacher": "Teacher", "baseline": "Baseline", "rtn": "RTN", "awq": "AWQ", "gptq": "GPTQ", GRACE: "GRACE"}
_CANONICAL = {
    "sqa": "ScienceQA",
    "scienceqaimg": "ScienceQA",
    "mmb": "MMBench",
    "seed": "SEED-Bench",
    "seedbenchimg": "SEED-Bench",
    "hallb": "HallusionBench",
}


def role(recipe: Recipe) -> str:
    """What a recipe is in the paper: rtn, awq, gptq, none, kd, one of GRACE's parts joined by +, or grace; `variant`
    for an objective that the paper lacks.

    `none` is plain training: fine-tuning at bf16, QAT at a quantised precision. The controller alone sets the weight of
    a plain distillation loss, which is the paper's "IB" row.
    """
    if recipe.post_training:
        return recipe.post_training
    if recipe.kd not in ("none", "plain", "gated"):
        return "variant"
    parts = [part for part, on in zip(PARTS, (recipe.kd == "gated", recipe.rcka, recipe.controller), strict=True) if on]
    if len(parts) == len(PARTS):
        return GRACE
    if recipe.kd == "plain" and "ib" not in parts:
        parts = ["kd", *parts]
    return "+".join(parts) or "none"


def roles(experiment: Experiment) -> dict[str, str]:
    """Role of every recipe.

    Where two share one, it goes to the first that is run, starts from the baseline and changes no constants, and the
    others are `variant`: the paper has one GRACE, not a sweep.
    """
    run = list(dict.fromkeys(name for runs in experiment.runs for name in runs.recipes))

    def order(item: tuple[str, Recipe]) -> tuple[bool, bool, int]:
        name, recipe = item
        changes = bool(recipe.method or recipe.train or recipe.constants or recipe.start or recipe.scale != "maxabs")
        return name not in run, changes, run.index(name) if name in run else len(run)

    found: dict[str, str] = {}
    for name, recipe in sorted(experiment.recipes.items(), key=order):
        meant = role(recipe)
        found[name] = "variant" if meant in found.values() else meant
    return found


def row_role(experiment: Experiment, row: Row) -> str:
    """The role of a table's row."""
    return row.recipe if row in (TEACHER, BASELINE) else roles(experiment)[row.recipe]


def label(experiment: Experiment, row: Row) -> str:
    """The name of a row in tables and figures."""
    if row in (TEACHER, BASELINE):
        return _LABELS[row.recipe]
    recipe = experiment.recipes[row.recipe]
    if recipe.label:
        return recipe.label
    name = roles(experiment)[row.recipe]
    if name == "variant":
        return row.recipe
    quantised = row.precision != "bf16"
    if name == "none":
        return "QAT" if quantised else "Fine-tuning"
    if name == "kd":
        return "QAT + KD" if quantised else "Fine-tuning + KD"
    return _LABELS.get(name) or " + ".join(part.upper() for part in name.split("+"))


def _key(benchmark: str) -> str:
    return "".join(character for character in benchmark.lower() if character.isalnum())


@cache
def canonical(benchmark: str) -> str:
    """One spelling of a benchmark's name, as paper_tables.csv has it."""
    key = _key(benchmark)
    known = {_key(name): name for name in paper_numbers()["benchmark"].unique()}
    return _CANONICAL.get(key) or known.get(key) or benchmark


@cache
def paper_numbers() -> pd.DataFrame:
    """source, table, model, row, role, precision, benchmark, value:
    the paper's tables and the authors' released run.
    """
    return pd.read_csv(Path(__file__).with_name("paper_tables.csv"), dtype={"table": str}, keep_default_na=False)


@cache
def _values() -> dict[tuple[str, ...], float]:
    keys = paper_numbers()[["model", "table", "role", "precision", "benchmark"]].itertuples(index=False, name=None)
    return dict(zip(keys, paper_numbers()["value"].tolist(), strict=True))


def paper_family(experiment: Experiment) -> str | None:
    """The model of the paper (or of the authors' release) that this experiment is about, by its hub ids.

    None for models made here, and for any others of the same family: numbers of a model stand beside that model's
    alone.
    """
    setup = setup_of(experiment)
    return setup.name if setup else None


def paper_beside(experiment: Experiment, table: str, role: str, precision: str, benchmark: str) -> float | None:
    """The paper's number for one cell where it is about what this experiment's is about, else None.

    That is: the same models, all of the protocol's questions, and a student made by what the source states
    (`grace.report.paper_setup`). The teacher and the baseline of Table 2 are those of Table 1. Where the protocol of a
    number is known and not ours, it is left out.
    """
    family = paper_family(experiment)
    if not family or not role or unlike(experiment, role, precision):
        return None
    if table != "deployment" and asked_otherwise(experiment):
        return None
    if (made_with(experiment, benchmark) or (None, ""))[0] is False:
        return None
    tables = ("1", "2") if table in ("1", "2") and role in ("teacher", "baseline") else (table,)
    numbers = (_values().get((family, each, role, precision, benchmark)) for each in tables)
    return next((number for number in numbers if number is not None), None)


def unlike(experiment: Experiment, role: str, precision: str) -> list[str]:
    """In what this experiment's student of a role is made otherwise than the paper's; none for published models."""
    recipe = next((name for name, meant in roles(experiment).items() if meant == role), None)
    if role in ("teacher", "baseline") or recipe is None:
        return []
    return made_otherwise(experiment, experiment.recipes[recipe], precision != "bf16")


def made_with(experiment: Experiment, benchmark: str) -> tuple[bool | None, str] | None:
    """Whether the paper's number on a benchmark (its title) was made with our protocol, and which ours is.

    The first is None where the paper's protocol is not known; the whole is None for anything else than a benchmark of
    the paper that this experiment asks (an imitation, an average, a speed).
    """
    printed = "release" if experiment.family == "qwen3_vl" else "paper"
    for name in experiment.evaluation.benchmarks:
        entry = BENCHMARKS.get(name)
        if entry is not None and not entry.mirrors and canonical(entry.title) == benchmark:
            ours = experiment.evaluation.protocols(name)[0]
            known = entry.paper.get(printed)
            return (None if known is None else known == ours), ours
    return None


def paper_average(experiment: Experiment, table: str) -> list[str]:
    """The benchmarks that the paper's average is made of; empty where the table has none. MME is not among them."""
    numbers = paper_numbers()
    part = numbers[(numbers["model"] == paper_family(experiment)) & (numbers["table"] == table)]
    names = list(part["benchmark"].unique())
    return [name for name in names if name not in (AVERAGE, "MME")] if AVERAGE in names else []


def what_was_run(experiment: Experiment, seeds: tuple[int, ...] = ()) -> str:
    """The column that keeps a reader from taking one model, or its data, for another;
    seeds only where some are given.
    """
    if experiment.data.source == "demo":
        what = f"{DEMO}, on demo images"
    else:
        names = [model.pretrained for model in (experiment.teacher, experiment.student) if model.pretrained]
        what = " to ".join(name.rstrip("/").split("/")[-1] for name in names) or experiment.family
        on = " + ".join(Path(source.path).stem for source in experiment.data.sources)
        what += f", on {on}" if on else ", nothing trained"
    return f"{what}; {seed_range(seeds)}" if seeds else what


def seed_range(seeds: tuple[int, ...]) -> str:
    """`seed 0`, `seeds 0-2` or `seeds 0, 3`."""
    ordered = sorted(seeds)
    if len(ordered) == 1:
        return f"seed {ordered[0]}"
    if ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"seeds {ordered[0]}-{ordered[-1]}"
    return "seeds " + ", ".join(map(str, ordered))
