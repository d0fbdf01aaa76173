"""The configuration: files and models agree, and a wrong value is answered with the key and the fix."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml
from stub_tree import CONFIG, ROOT

from grace.config.frozen import Frozen
from grace.config.generate import explain_file, schema
from grace.config.job_parameters import QuantizeRun, TrainRun, student_run, teacher_run
from grace.config.load import load_experiment
from grace.config.plan import Plan
from grace.config.schema import Experiment
from grace.config.sections import DEMO_BENCHMARKS
from grace.errors import GraceError
from grace.precision import split_precision

FILES = [ROOT / "config.yaml", *sorted((ROOT / "workflow/experiments").glob("*.yaml"))]
REMOVED = object()


def test_the_default_is_explained_as_the_models_explain() -> None:
    """If this fails: `grace config default config.yaml`, and put what it prints in the file's place."""
    assert FILES[0].read_text() == explain_file(FILES[0])


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_an_explained_file_means_the_same(file: Path, tmp_path: Path) -> None:
    (tmp_path / "explained.yaml").write_text(explain_file(file))
    assert load_experiment(tmp_path / "explained.yaml") == load_experiment(file)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_shipped_files_fit_the_schema(file: Path) -> None:
    jsonschema.validate(yaml.safe_load(file.read_text()), json.loads(schema()))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_models_of_the_hub_are_pinned(file: Path) -> None:
    experiment = load_experiment(file)
    for model in (experiment.teacher, experiment.student):
        assert model.pretrained is None or re.fullmatch(r"[0-9a-f]{40}", model.revision or ""), model


def test_the_schema_file_is_generated() -> None:
    """If this fails: `grace config schema > workflow/schemas/config.schema.json`."""
    assert (ROOT / "workflow/schemas/config.schema.json").read_text() == schema()


def test_benchmarks_are_those_that_the_demo_makes_and_the_registry_knows() -> None:
    from grace.benchmarks.registry import BENCHMARKS as KNOWN
    from grace.demo.benchmarks import BENCHMARKS as MADE

    assert set(DEMO_BENCHMARKS) == set(MADE)
    for file in FILES:
        assert set(load_experiment(file).evaluation.benchmarks) <= set(KNOWN), file


def _changed(**changes: Any) -> dict[str, Any]:
    """The small experiment with `a__b` as key b of section a."""
    config = yaml.safe_load(CONFIG)
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = config
        for section in sections:
            place = place[section]
        if value is REMOVED:
            del place[last]
        else:
            place[last] = value
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetun": {}}, "`finetun` is not a key; did you mean `finetune`?"),
        ({"data__imags": 3}, "`data.imags` is not a key; did you mean `images`?"),
        ({"data__zebra": 3}, "`data.zebra` is not a key; use `source`, `images`, `finetune_images`"),
        ({"recipes__grace__rkca": True}, "`recipes.grace.rkca` is not a key; did you mean `rcka`?"),
        ({"recipes__grace__method": {"omga": 1}}, "`recipes.grace.method.omga` is not a key; did you mean `omega`?"),
        ({"recipes__grace__train": {"steps": 0}}, "`recipes.grace.train.steps` is 0: input should be greater than 0"),
        ({"recipes__grace__kd": "gatd"}, "`recipes.grace.kd`: no objective `gatd`; there are none, dist, gated,"),
        ({"recipes__grace__constants": {"mixture": 1}}, "`recipes.grace`: `mixture` is no constant of `gated`'s own"),
        ({"recipes__grace__constants": {"alpha": 1}}, "no constant of `gated`'s own; set it under `method`"),
        ({"recipes__new": {"kd": "dist", "constants": {"x": 1}}}, "`x` is no constant of `dist`'s own; it has none"),
        (
            {"cache": {"format": "sampled"}, "recipes__new": {"kd": "reverse_kl"}},
            "recipes.new.kd `reverse_kl` needs the teacher's full logits, which a `sampled` cache lacks",
        ),
        ({"finetune__steps": "many"}, "`finetune.steps` is 'many': input should be a valid integer"),
        ({"finetune__warmup": 3}, "`finetune.warmup` is 3: input should be less than or equal to 1"),
        ({"finetune": REMOVED}, "finetune: is not set, and runs[0] trains `finetune`; set it"),
        ({"teacher__train__steps": REMOVED}, "`teacher.train`: give either `steps` or `epochs`"),
        ({"teacher__pretrained": "x"}, "`teacher`: give either `pretrained`, or both `architecture` and `train`"),
        ({"data__source": "dmo"}, "`data.source` must be `demo`, or `files`"),
        ({"data": {"source": "files", "sources": [{"path": "a", "images": "b"}]}}, "needs student.pretrained"),
        ({"data": {"source": "llava"}}, "`llava` is called `files` now"),
        (
            {"data": {"source": "files", "sources": []}, "student": {"pretrained": "a"}},
            "data.sources is empty, and `finetune`",
        ),
        ({"data": {"source": "files", "sources": [{"path": "a", "wieght": 2}]}}, "did you mean `weight`?"),
        ({"data": {"source": "files", "sources": [{"path": "a", "weight": float("inf")}]}}, "`data.sources[0].weight`"),
        ({"data": {"source": "files", "sources": [{"path": "a"}], "min_pixels": 9, "max_pixels": 8}}, "change either"),
        ({"recipes__baseline": {}}, "recipes.baseline is reserved"),
        ({"recipes__rtn__rcka": True}, "`recipes.rtn`: a post-training recipe takes no training keys"),
        ({"recipes__finetune": {"controller": True}}, "`recipes.finetune`: `controller` sets the weight"),
        ({"recipes__grace__method": {"beta_max": 0.2}}, "recipes.grace: beta_min <= beta_init <= beta_max"),
        ({"method": {"beta_min": 2}}, "`method`: beta_min <= beta_init <= beta_max does not hold"),
        ({"runs": []}, "`runs` is []: list should have at least 1 item"),
        ({"runs": [{"recipes": ["grase"], "precisions": ["int4"], "seeds": [0]}]}, "`grase`, which `recipes` lacks"),
        ({"runs": [{"recipes": ["rtn"], "precisions": ["bf16"], "seeds": [0]}]}, "bf16 is not a precision for it"),
        ({"runs": [{"recipes": ["grace"], "precisions": ["int5"], "seeds": [0]}]}, "`runs[0].precisions[0]` is 'int5'"),
        ({"runs": [{"recipes": ["grace"], "precisions": ["int4"], "seeds": [7]}]}, "which baseline_seeds lacks"),
        ({"runs": [{"recipes": ["rtn"], "precisions": ["int4"], "seeds": [0]}]}, "set bench.recipe"),
        ({"evaluation__benchmarks": ["color"]}, "no benchmark `color` in the demo; it has colour"),
        ({"quantization__group_size": 48}, "`quantization.group_size` is 48: input should be 16, 32, 64, 128 or 256"),
        ({"quantization__group_size": 128}, "student.architecture.hidden_size 32 is no multiple"),
        ({"student__architecture__heads": 3}, "hidden_size 32 is no multiple of twice 3 heads"),
        ({"finetune__micro_batch": 5}, "batch 16 is no multiple of micro_batch 5"),
        ({"teacher__train__caption_steps": 99}, "caption_steps 99 is more than all 20 steps"),
        ({"resources": {"trian": {}}}, "`resources.trian` is 'trian': input should be 'fetch', 'prepare'"),
        ({"resources": {"distil": {"gpu": 1}}}, "`resources.distil.gpu` is not a key; did you mean `gpus`?"),
        ({"experiment": "../up"}, "`experiment` is '../up': string should match pattern"),
    ],
)
def test_a_wrong_value_is_named_with_its_fix(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GraceError) as caught:
        load_experiment(_changed(**changes), "my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert message in str(caught.value)


def test_every_wrong_key_is_named_at_once() -> None:
    with pytest.raises(GraceError) as caught:
        load_experiment(_changed(finetun={}, data__images=-1), "my.yaml")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "line 1: not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", "line 3: not valid YAML (the key `a` is given twice; drop one)"),
        ("- 1\n", "holds no keys"),
        ("", "holds no keys"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(GraceError) as caught:
        load_experiment(file)
    assert str(caught.value).startswith(f"{file}")
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraceError, match="cannot be read"):
        load_experiment(tmp_path / "none.yaml")


def test_students_come_once_and_baselines_first() -> None:
    twice = {"recipes": ["grace", "rtn"], "precisions": ["int4"], "seeds": [0]}
    experiment = load_experiment(_changed(runs=[twice, twice]))
    assert experiment.students() == [("baseline", "bf16", 0), ("grace", "int4", 0), ("rtn", "int4", 0)]


def test_frozen_parameters_hold_what_a_job_depends_on_and_no_more() -> None:
    before, after = load_experiment(_changed()), load_experiment(_changed(method={"omega": 1.0}))
    assert student_run(before, "finetune", "int4", 0) == student_run(after, "finetune", "int4", 0)
    assert student_run(before, "rtn", "int4", 0) == student_run(after, "rtn", "int4", 0)
    assert student_run(before, "grace", "int4", 0) != student_run(after, "grace", "int4", 0)
    assert student_run(after, "grace", "int4", 0).method.omega == 1.0


def test_a_recipes_changes_reach_its_own_run() -> None:
    experiment = load_experiment(_changed(recipes__grace__method={"tau": 1.5}, recipes__grace__train={"steps": 7}))
    run = student_run(experiment, "grace", "int4-outliers", 0)
    assert (run.method.tau, run.optimisation.steps, run.bits, run.outliers) == (1.5, 7, 4, True)
    assert run.method.omega == experiment.method.omega
    assert run.optimisation.learning_rate == experiment.finetune.learning_rate


def test_frozen_json_reads_back_as_it_was() -> None:
    experiment = load_experiment(_changed(recipes__grace__train={"steps": 7}, teacher__seed=3))
    frozen = Frozen(Plan(experiment))
    assert Experiment.model_validate_json(frozen.job("experiment")) == experiment
    assert TrainRun.model_validate_json(frozen.job("teacher")) == teacher_run(experiment)
    assert teacher_run(experiment).seed == 3 and student_run(experiment, "grace", "int4", 0).seed == 0
    rounded = student_run(experiment, "rtn", "int4", 0)
    assert QuantizeRun.model_validate_json(rounded.model_dump_json()) == rounded


@pytest.mark.parametrize(
    ("name", "meant"), [("bf16", (None, False)), ("int2", (2, False)), ("int4-outliers", (4, True))]
)
def test_precisions_are_read(name: str, meant: tuple[int | None, bool]) -> None:
    assert split_precision(name) == meant


def test_epochs_are_counted_in_steps_of_what_was_prepared() -> None:
    from grace.train.loop import counted

    config = _changed(finetune__steps=REMOVED, finetune__epochs=1.5, finetune__batch=16)
    finetune = load_experiment(config).finetune
    assert counted(finetune, 100).total == 11  # 7 steps an epoch, the last one of 4 conversations
    assert counted(finetune, 3).total == 2
    config["recipes"]["grace"] = {"kd": "gated", "train": {"steps": 7}}
    experiment = load_experiment(config)
    assert counted(experiment.recipe_optimisation(experiment.recipes["grace"]), 100).total == 7


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ({"later": {"start": "grace/int4"}}, "`recipes.later.start` is 'grace/int4': string should match pattern"),
        ({"later": {"start": "grave/bf16"}}, "recipes.later.start `grave/bf16`: no trained recipe `grave`; there are"),
        ({"later": {"start": "rtn/bf16"}}, "recipes.later.start `rtn/bf16`: no trained recipe `rtn`; there are"),
        ({"later": {"start": "later/bf16"}}, "recipes.later.start leads back to `later`"),
        ({"a": {"start": "b/bf16"}, "b": {"start": "a/bf16"}}, "recipes.a.start leads back to `a`"),
    ],
)
def test_a_start_is_a_trained_recipe_that_ends_at_the_baseline(recipes: dict[str, Any], message: str) -> None:
    config = _changed()
    config["recipes"] |= recipes
    with pytest.raises(GraceError) as caught:
        load_experiment(config)
    assert message in str(caught.value)


def test_a_student_starts_from_its_own_seed_of_another_recipe() -> None:
    config = _changed()
    config["recipes"]["released"] = {"kd": "gated", "start": "grace/bf16"}
    plan = Plan(load_experiment(config))
    asked = SimpleNamespace(recipe="released", precision="int4", seed="0")
    assert plan.start(asked) == "results/demo/students/grace/bf16/seed0/model/manifest.json"
    asked.recipe = "grace"
    assert plan.start(asked) == "results/demo/students/baseline/bf16/seed0/model/manifest.json"


def test_the_small_experiment_rounds_in_every_way_at_every_width() -> None:
    """RTN at each convention of scale, all three roundings of the baseline and of the fine-tuned student."""
    experiment = load_experiment(ROOT / "workflow/experiments/small.yaml")
    made: dict[tuple[str, str, str | None], set[str]] = {}
    for name, precision, seed in experiment.students():
        recipe = experiment.recipes.get(name)
        if recipe is not None and recipe.post_training and seed == 0:
            made.setdefault((recipe.post_training, recipe.scale, recipe.start), set()).add(precision)
    ways = [("rtn", scale, None) for scale in ("maxabs", "format", "best")]
    ways += [(method, "maxabs", start) for method in ("rtn", "awq", "gptq") for start in (None, "finetune/bf16")]
    assert all({"int4", "int3", "int2"} <= made[way] for way in ways)


def test_every_experiment_has_the_standard_recipes_unless_it_changes_them() -> None:
    config = _changed(recipes={"grace": {"kd": "plain"}})
    experiment = load_experiment(config)
    assert experiment.recipes["grace"].kd == "plain" and experiment.recipes["gptq"].post_training == "gptq"
