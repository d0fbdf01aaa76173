"""Trials: what a configuration may ask, what is chosen, and whether the configuration has it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from stub_tree import CONFIG

from grace.config.frozen import Frozen
from grace.config.job_parameters import TrainRun
from grace.config.load import load_experiment
from grace.config.plan import Plan
from grace.config.trials import Trials
from grace.config.unapplied_trials import unapplied
from grace.errors import GraceError
from grace.results.tuning import tune

TRIALS = {
    "finetune": [{"train": {"learning_rate": 1e-3}}, {"train": {"learning_rate": 2e-3}}],
    "grace": [{"method": {"omega": 1.0}}, {"method": {"omega": 2.0}, "train": {"learning_rate": 5e-4}}],
}


def experiment(trials=TRIALS, **changes):
    tuning = {"precision": "int2", "seeds": [0, 1], "trials": trials}
    return load_experiment({**yaml.safe_load(CONFIG), "baseline_seeds": [0, 1], "tuning": tuning, **changes}, "my.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": {**TRIALS, "grace": TRIALS["grace"][:1]}}, "`finetune` has 2 trials and `grace` 1"),
        ({"trials": {"finetune": [{}, {"train": {"steps": 9}}]}}, "recipes compare only with equal budgets"),
        ({"trials": {"rtn": [{}]}}, "tuning.trials.rtn: no recipe of that name is trained here"),
        ({"trials": {"grace": [{"method": {"beta_max": 0.2}}]}}, "tuning.trials.grace[0]: beta_min <= beta_init"),
        ({"trials": {"finetune": [{"constants": {"x": 1}}]}}, "tuning.trials.finetune[0]: `x` is no constant"),
        ({"baseline_seeds": [0]}, "tuning.seeds has [1], which baseline_seeds lacks"),
    ],
)
def test_what_cannot_be_tried_is_said(change, message):
    with pytest.raises(GraceError) as caught:
        experiment(**change)
    assert message in str(caught.value)


def test_a_trial_is_its_recipes_training_with_other_constants():
    plan = Plan(experiment())
    frozen, trials = Frozen(plan), Trials(plan)
    asked = SimpleNamespace(recipe="grace", trial="2", seed="1", items=lambda: [("experiment", "demo")])
    run = TrainRun.model_validate_json(frozen.trial(asked))
    assert (run.method.omega, run.optimisation.learning_rate, run.seed, run.bits) == (2.0, 5e-4, 1, 2)
    assert (run.kd, run.controller, run.optimisation.steps) == ("gated", True, 20)
    assert len(trials.predictions) == 8 and trials.cache(asked) and trials.code(asked).endswith("train+gated.json")
    asked.recipe = "finetune"
    assert not trials.cache(asked) and trials.code(asked).endswith("code/train.json")
    assert frozen.job("experiment") == Frozen(Plan(experiment(trials={"grace": [{}]}))).job("experiment")


@pytest.fixture
def tried(tmp_path: Path) -> Path:
    """Trials whose second is right more often, for both recipes and seeds."""
    (tmp_path / "run.json").write_text(Frozen(Plan(experiment())).job("tuning"))
    random = np.random.default_rng(0)
    for recipe in TRIALS:
        for number, level in ((1, 0.4), (2, 0.7)):
            for seed in (0, 1):
                for name in ("colour", "object"):
                    path = tmp_path / f"trials/{recipe}/trial{number}/seed{seed}/predictions/{name}.parquet"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    ids = [f"{name}-{i:03}" for i in range(60)]
                    scores = (random.random(60) < level).astype(float)
                    pd.DataFrame({"sample_id": ids, "image_id": ids, "score": scores}).to_parquet(path)
    return tmp_path


def test_the_best_mean_is_chosen_and_all_is_recorded(tried):
    out = tried / "results/demo/tuning/trials.json"
    tune(tried / "run.json", tried / "trials", out)
    record = json.loads(out.read_text())
    for recipe in TRIALS:
        entry = record["recipes"][recipe]
        assert entry["chosen"]["trial"] == 2
        frames = [pd.read_parquet(path) for path in (tried / f"trials/{recipe}/trial1").rglob("*.parquet")]
        first = entry["trials"][0]
        assert first["mean"] == pytest.approx(100 * np.mean([frame["score"].mean() for frame in frames]))
        assert np.mean(list(first["seeds"].values())) == pytest.approx(first["mean"])
        assert first["below_best"] == pytest.approx(entry["trials"][1]["mean"] - first["mean"])
        assert "below_best" not in entry["trials"][1]
    assert "| **2** | `method.omega: 2.0`, `train.learning_rate: 0.0005` |" in out.with_suffix(".md").read_text()


def test_a_choice_that_the_configuration_lacks_is_said(tried):
    results = tried / "results"
    assert unapplied(experiment(), results) == []
    tune(tried / "run.json", tried / "trials", results / "demo/tuning/trials.json")
    said = "\n".join(unapplied(experiment(), results))
    assert "the best trial of `finetune` has train.learning_rate 0.002, and the configuration 0.001" in said
    assert "set recipes.grace.method.omega" in said
    recipes = yaml.safe_load(CONFIG)["recipes"]
    recipes["finetune"] |= {"train": {"learning_rate": 2e-3}}
    recipes["grace"] |= {"method": {"omega": 2.0}, "train": {"learning_rate": 5e-4}}
    assert unapplied(experiment(recipes=recipes), results) == []
    (results / "demo/tuning/trials.json").write_text("[]")
    assert "not a record of trials" in unapplied(experiment(), results)[0]


def test_a_trial_that_was_asked_other_questions_is_refused(tried):
    path = next((tried / "trials/grace/trial1/seed1").rglob("colour.parquet"))
    pd.read_parquet(path).iloc[1:].to_parquet(path)
    with pytest.raises(GraceError, match="seed 1 was asked other questions of colour"):
        tune(tried / "run.json", tried / "trials", tried / "trials.json")
