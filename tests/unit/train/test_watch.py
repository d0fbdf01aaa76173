"""Watchers are told of steps and change none; the loss on the development split is that of the model itself."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import GRACE, log, make_home, optimisation, student, weights

from grace.config.schema import DemoData
from grace.data.development import development_examples
from grace.demo.prepare import prepare
from grace.errors import GraceError
from grace.models import load_model, load_processor
from grace.train.watch import check_watchers


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = make_home(tmp_path_factory.mktemp("experiment"))
    other = tmp_path_factory.mktemp("asked") / "data"
    prepare(DemoData(images=1, development_questions=120, benchmark_questions=1), ["colour"], other)
    shutil.copytree(other / "development", home / "data/development")
    return home


@pytest.fixture
def told(monkeypatch, tmp_path):
    """What stand-ins for TensorBoard and Weights & Biases were told."""
    found = {"board": [], "run": [], "init": []}

    class Writer:
        def __init__(self, folder, purge_step):
            found["init"].append(("board", folder, purge_step))

        def add_scalar(self, name, value, step):
            found["board"].append((name, value, step))

        def close(self):
            found["init"].append("closed")

    run = SimpleNamespace(log=lambda numbers, step: found["run"].append((numbers, step)), finish=lambda: None)
    wandb = SimpleNamespace(init=lambda **about: found["init"].append(about) or run, __spec__=object())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace(__spec__=object()))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("GRACE_TENSORBOARD", str(tmp_path / "board"))
    monkeypatch.setenv("GRACE_WANDB", "paper")
    monkeypatch.setenv("GRACE_PROFILE", "1")
    return found


def test_watchers_are_told_what_the_log_says_and_change_no_bit(home, tmp_path, told, monkeypatch):
    watched = student(home, tmp_path, "watched", **GRACE, optimisation=optimisation(validate_every=3))
    for variable in ("GRACE_TENSORBOARD", "GRACE_WANDB", "GRACE_PROFILE"):
        monkeypatch.delenv(variable)
    alone = student(home, tmp_path, "alone", **GRACE)
    before, after = weights(alone), weights(watched)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    entries = log(tmp_path, "watched")
    assert [step for _, step in told["run"]] == [entry["step"] for entry in entries] == list(range(1, 7))
    losses = [value for name, value, _ in told["board"] if name == "train/loss"]
    assert losses == [entry["loss"] for entry in entries]
    board, about, closed = told["init"]
    assert board == ("board", str(tmp_path / "board/.watched"), 1) and closed == "closed"
    assert (about["project"], about["mode"], about["config"]["bits"]) == ("paper", "offline", 4)
    events = json.loads((tmp_path / ".watched/profile-0.json").read_text())["traceEvents"]
    assert any("aten::mm" in event["name"] or "aten::addmm" in event["name"] for event in events)


@pytest.mark.parametrize("change", [{}, {"pass_tokens": 300}, {"micro_batch": 2}])
def test_the_loss_on_the_development_split_is_the_shipped_model_s(home, tmp_path, change):
    folder = student(home, tmp_path, "run", optimisation=optimisation(validate_every=2, **change))
    logged = [entry.get("development_ce") for entry in log(tmp_path, "run")]
    assert logged[0] is logged[2] is logged[4] is None and all(logged[1::2])
    processor = load_processor(home / "data/processor")
    model, total, count = load_model(folder, torch.float32), 0.0, 0
    examples = development_examples(home / "data", processor)
    assert len(examples) > 100
    for example in examples:
        with torch.no_grad():
            pixels = processor.image_processor(images=[example.images[0].open()], return_tensors="pt")
            logits = model(input_ids=example.input_ids[None], **pixels).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits[:-1], example.labels[1:], reduction="sum"))
        count += example.supervised_tokens()
    assert logged[-1] == pytest.approx(total / count, rel=1e-3)


def test_what_cannot_be_watched_is_said_first(home, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    with pytest.raises(GraceError, match="has no development split; set validate_every to null"):
        development_examples(tmp_path / "data", None)
    monkeypatch.setenv("GRACE_WANDB", "paper")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GraceError, match="GRACE_WANDB is set and wandb is not installed; `pip install wandb`"):
        check_watchers()
    monkeypatch.delenv("GRACE_WANDB")
    monkeypatch.setenv("GRACE_PROFILE", "yes")
    with pytest.raises(GraceError, match="GRACE_PROFILE is yes; give a number of steps"):
        check_watchers()
