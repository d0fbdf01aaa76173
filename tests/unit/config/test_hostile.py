"""Configurations that are hostile or merely odd: one sentence soon, which names the line or the key."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from stub_tree import CONFIG, ROOT

from grace.config.constraints import Constraints
from grace.config.load import RENAMED, load_experiment
from grace.config.plan import Plan
from grace.config.schema import Experiment
from grace.errors import GraceError

sys.path.insert(0, str(ROOT / "tests/fuzz"))
import config as fuzz


def refused(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(GraceError) as error:
        load_experiment(path)
    return str(error.value).removeprefix(str(path))


def _bomb(key: str) -> str:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join(["l0: &l0 [1, 2, 3]", *levels, f"{key}: *l11"]) + "\n"


BEYOND_YAML = {
    "aliases of aliases": (_bomb("x"), "aliases stand for more than 100,000 values"),
    "aliases under a known key": (CONFIG.replace("baseline", "b") + _bomb("baseline_seeds"), "aliases stand for more"),
    "a list that holds itself": (f"{CONFIG}x: &x [*x]\n", "aliases stand for more than"),
    "a known key that holds itself": (f"{CONFIG}baseline_seeds: &x [*x]\n", "aliases stand for more than"),
    "deep flow nesting": (f"{CONFIG}x: {'[' * 5000}\n", "nested too deeply"),
    "nesting that Python can follow": (f"{CONFIG}x: {'[' * 40}{']' * 40}\n", "nested too deeply"),
    "a list as a key": (f"{CONFIG}? [a, b]\n: 1\n", "the key a list is not text"),
    "a number as a key": (f"{CONFIG}5: 6\n", "the key '5' is not text; put it in quotes"),
    "no date": (f"{CONFIG}x: 2020-13-45\n", "'2020-13-45' is no valid timestamp"),
    "a tag that lies": (f"{CONFIG}x: !!int x\n", "'x' is no valid int"),
    "no base64": (f"{CONFIG}x: !!binary 'a'\n", "failed to decode base64"),
    "a number of 5000 digits": (f"{CONFIG}x: {'9' * 5000}\n", "is no valid int"),
    "a number of 30 digits": (f"{CONFIG}x: {'9' * 30}\n", "is larger than any number here may be"),
    "a merge of a list": (f"{CONFIG}x: {{<<: [1, 2]}}\n", "not valid YAML"),
    "code": (f"{CONFIG}x: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
    "two documents": (f"{CONFIG}---\n{CONFIG}", "but found another document"),
    "a NUL": (f"{CONFIG}x: \0\n", "not valid YAML"),
    "UTF-16": (CONFIG.encode("utf-16"), "not valid YAML"),
    "a file of 2 MB": (f"{CONFIG}#{'x' * 2_000_000}\n", "is larger than 1 MiB"),
}


@pytest.mark.parametrize("name", BEYOND_YAML)
def test_what_a_configuration_never_holds_is_one_sentence(tmp_path: Path, name: str) -> None:
    text, wanted = BEYOND_YAML[name]
    said = refused(tmp_path, text)
    assert wanted in said and "\n" not in said and len(said) < 400


def test_merge_keys_and_aliases_of_a_usual_size_are_read(tmp_path: Path) -> None:
    values = yaml.safe_load(CONFIG)
    train = "{steps: 20, learning_rate: 0.001}"
    del values["student"], values["teacher"], values["finetune"]
    shape = "{hidden_size: 64, intermediate_size: 128, layers: 2, heads: 4}"
    text = (
        f"{yaml.safe_dump(values)}finetune: &train {train}\n"
        f"student: {{train: *train, architecture: &shape {shape}}}\n"
        "teacher: {train: {<<: *train, steps: 30}, architecture: *shape}\n"
    )
    path = tmp_path / "config.yaml"
    path.write_text(text)
    experiment = load_experiment(path)
    assert (experiment.teacher.train.steps, experiment.student.train.steps) == (30, 20)


def _edited(path: str, value: Any) -> dict[str, Any]:
    values = yaml.safe_load(CONFIG)
    *sections, last = path.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return values


WRONG_VALUES = {
    "not a number": ("method.tau", float("nan"), "`method.tau` is nan: input should be a finite number"),
    "not a number, as text": ("method.tau", "nan", "`method.tau` is 'nan': input should be a finite number"),
    "infinite": ("finetune.learning_rate", float("inf"), "`finetune.learning_rate` is inf: input should be a finite"),
    "a recipe's": ("recipes.grace.method", {"tau": float("nan")}, "`recipes.grace.method.tau` is nan: input should be"),
    "a billion terabytes": ("resources.prepare", {"mem_mb": 1e30}, "`resources.prepare.mem_mb` is 1e+30"),
    "a command in a partition": (
        "resources.prepare",
        {"partition": "x'; touch y; '"},
        "`resources.prepare.partition` is",
    ),
    "an option as an account": (
        "resources.prepare",
        {"account": "--wrap=id"},
        "`resources.prepare.account` is '--wrap",
    ),
    "a path": ("experiment", "../../x", "`experiment` is '../../x': string should match pattern"),
    "a command": ("experiment", "a;touch x", "`experiment` is 'a;touch x': string should match"),
    "a line break": ("experiment", "demo\n", "`experiment` is 'demo\\n': string should match"),
    "a name no folder can have": ("experiment", "a" * 300, "`experiment` is 'aaa"),
    "an objective of thousands of letters": ("recipes.grace.kd", "gat" + "9" * 5000, "no objective `gat999"),
    "an objective that clears the screen": ("recipes.grace.kd", "\x1b[2J", "no objective `\\x1b[2J`"),
    "a label of two lines": (
        "recipes.grace.label",
        "GRACE\n| a",
        "`recipes.grace.label`: a label is one line of letters",
    ),
    "a label that clears the screen": ("recipes.grace.label", "\x1b[2J", "`recipes.grace.label`: a label is one line"),
    "a label of nothing": ("recipes.grace.label", "", "`recipes.grace.label` is '': string should have at least 1"),
    "more parts than names": ("cache.shards", 10**5, "`cache.shards` is 100000: input should be less than or equal to"),
    "a recipe no folder can be named after": ("recipes." + "a" * 300, {}, "string should have at most 64 characters"),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_wrong_value_is_named_with_its_key(name: str) -> None:
    path, value, wanted = WRONG_VALUES[name]
    with pytest.raises(GraceError) as error:
        load_experiment(_edited(path, value), "config.yaml")
    said = str(error.value)
    assert wanted in said and len(said) < 400 and "\n" not in said


@pytest.mark.parametrize(
    "section, value, key",
    [
        ("teacher", {"pretrained": "models/{seed}"}, "teacher.pretrained"),
        ("student", {"pretrained": "s", "revision": "{seed}"}, "student.revision"),
        ("recipes.x", {"released": {"int4": {"pretrained": "{x}"}}}, "recipes.x.released.int4.pretrained"),
        ("data", {"source": "files", "sources": [{"path": "a {b}.json"}]}, "data.sources[0].path"),
        ("data", {"source": "files", "benchmarks": "bench-{experiment}"}, "data.benchmarks"),
        ("evaluation.language", ["{x}.yaml"], "evaluation.language[0]"),
    ],
)
def test_a_path_with_a_wildcard_is_refused(section: str, value: Any, key: str) -> None:
    """Snakemake would read another folder in its place, or stop in words of its own."""
    with pytest.raises(GraceError) as error:
        load_experiment(_edited(section, value), "config.yaml")
    assert f"`{key}`: " in str(error.value) and "Snakemake takes braces for wildcards; rename it" in str(error.value)


def test_a_device_is_no_configuration() -> None:
    """It has no size that could be looked at first, and no end."""
    with pytest.raises(GraceError, match="/dev/zero: is larger than 1 MiB"):
        load_experiment("/dev/zero")


@pytest.mark.parametrize("old", RENAMED)
def test_keys_of_older_configurations_are_refused_with_their_present_name(old: str) -> None:
    values = (
        _edited("data", {"source": "files", "sources": [{"path": "a.json"}]}) if "sources" in RENAMED[old] else None
    )
    values = values or yaml.safe_load(CONFIG)
    values["data"][old.removeprefix("data.")] = 3
    with pytest.raises(GraceError) as error:
        load_experiment(values, "config.yaml")
    assert f"`{old}` is called `{RENAMED[old]}` now; rename it" in str(error.value)


def test_the_old_kind_of_data_is_refused_with_its_present_name() -> None:
    with pytest.raises(
        GraceError, match=r"`data\.source` must be `demo`, or `files` .*; `llava` is called `files` now"
    ):
        load_experiment(_edited("data", {"source": "llava", "conversations": "a.json", "images": "b"}))


def test_new_names_exist() -> None:
    """A renamed key leads to one that the configuration has."""
    for new in RENAMED.values():
        schema: Any = Experiment.model_json_schema()["$defs"]
        sections = {"data": [schema["DemoData"], schema["FilesData"]], "data.sources[0]": [schema["Source"]]}
        section, _, key = new.rpartition(".")
        assert any(key in found["properties"] for found in sections[section]), new


def test_names_with_marks_of_patterns_are_planned_as_they_are() -> None:
    """`a+b` and `a.b` mean themselves in Snakemake's patterns, and `a-b` and `a_b` stay two recipes."""
    values = yaml.safe_load(CONFIG)
    values["experiment"] = "a+b"
    values["recipes"] |= {name: {"kd": "plain"} for name in ("x+y", "x.y", "x-y", "x_y")}
    values["runs"][0]["recipes"] += ["x+y", "x.y", "x-y", "x_y"]
    plan = Plan(load_experiment(values))
    only = Constraints(plan.experiment)
    assert only.where(True) == r"a\+b" and r"x\+y" in only.distilled and r"x\.y" in only.asked
    assert len(set(plan.predictions)) == len(plan.predictions) == 1 + 1 + 3 + 4


def test_broken_files_are_read_or_refused_in_sentences(tmp_path: Path) -> None:
    """A short form of `python tests/fuzz/config.py --seconds 3600`."""
    random_ = random.Random(7)
    for number in range(150):
        data = fuzz.broken(random_)
        assert fuzz.failure(data, tmp_path) is None, (number, data)
