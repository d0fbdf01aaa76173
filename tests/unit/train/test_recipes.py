"""One loop for every recipe: each logs its parts, and however the batch is cut the loss is the same."""

import subprocess
import sys

import pytest
import started
import torch
from safetensors.torch import load_file
from tiny_runs import GRACE, RECIPES, STEPS, log, optimisation, run_file, student, weights

from grace.config.schema import Method
from grace.data import collate, plan_batches
from grace.files import check_manifest
from grace.models import decoder_linears, load_model
from grace.train import loop
from grace.train.commands import train


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_and_logs_its_parts(home, tmp_path, name):
    change = RECIPES[name]
    folder = student(home, tmp_path, name, **change)
    check_manifest(folder)
    entries = log(tmp_path, name)
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    expected = {"ce"} | ({"kd"} if "kd" in change else set()) | ({"rcka"} if change.get("rcka") else set())
    assert {"ce", "kd", "rcka"} & set(entries[0]) == expected
    for entry in entries:
        weighted = (
            entry["ce"] + entry.get("beta", 0) * entry.get("kd", 0) + entry.get("omega", 0) * entry.get("rcka", 0)
        )
        assert entry["loss"] == pytest.approx(weighted, rel=1e-4)
    if change.get("controller"):
        method = Method(tau=0.1)
        average, beta = None, method.beta_init
        for entry in entries:
            assert entry["beta"] == pytest.approx(beta, abs=2e-6)
            average = (
                entry["kd"] if average is None else method.ema_decay * average + (1 - method.ema_decay) * entry["kd"]
            )
            beta = min(max(beta + method.eta * (average - method.tau), method.beta_min), method.beta_max)
        assert entries[-1]["beta"] != entries[0]["beta"]
    assert not list((tmp_path / f".{name}").glob("step-*"))


def test_what_trains_is_what_ships(home, tmp_path):
    folder = student(home, tmp_path, "grace", **GRACE)
    model = load_model(folder)
    shipped = load_file(folder / "quantization.safetensors")
    linears = decoder_linears(model)
    names = {name.removesuffix(".codes") for name in shipped if name.endswith(".codes")}
    assert len(names) == len(linears)
    for name, linear in linears.items():
        (mine,) = [n for n in names if n.split("layers.")[-1] == name.split("layers.")[-1]]
        codes, scales = shipped[f"{mine}.codes"], shipped[f"{mine}.scales"]
        weight = codes.float().unflatten(1, (-1, 32)) * scales.float().unsqueeze(2)
        assert torch.equal(linear.weight, weight.flatten(1).to(torch.bfloat16))
        assert codes.min() >= -8 and codes.max() <= 7


@pytest.mark.parametrize("name", ["bf16", "grace"])
def test_micro_batches_do_not_change_the_run(home, tmp_path, name):
    whole = log(tmp_path, student(home, tmp_path, "whole", **RECIPES[name]).name)
    cut = student(home, tmp_path, "cut", **RECIPES[name], optimisation=optimisation(micro_batch=2))
    for a, b in zip(whole, log(tmp_path, cut.name), strict=True):
        for part in ("loss", "ce", "kd", "rcka", "grad_norm"):
            if part in a:
                assert a[part] == pytest.approx(b[part], rel=2e-3), part


@pytest.mark.parametrize("name", ["bf16", "grace"])
def test_packed_rows_do_not_change_the_run(home, tmp_path, monkeypatch, name):
    """One row a step, and several: conversations laid end to end see each other no more than padded ones do."""
    monkeypatch.setattr(loop, "plan_batches", lambda *plan, alike: plan_batches(*plan))  # the same steps for both
    padded = log(tmp_path, student(home, tmp_path, "padded", **RECIPES[name]).name)
    for tokens in (4096, 100):
        packed = student(home, tmp_path, f"p{tokens}", **RECIPES[name], optimisation=optimisation(pass_tokens=tokens))
        for a, b in zip(padded, log(tmp_path, packed.name), strict=True):
            for part in ("loss", "ce", "kd", "rcka", "grad_norm"):
                if part in a:
                    assert a[part] == pytest.approx(b[part], rel=2e-3), part


def test_captions_come_first_and_never_again(home, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(loop, "collate", lambda part, processor: read.append(part) or collate(part, processor))
    run = run_file(tmp_path, "two", optimisation=optimisation(caption_steps=2))
    train(run, home / "data", tmp_path / "two", tmp_path / "two.jsonl", tmp_path / ".two", home / "baseline")
    assert [{example.caption for example in part} for part in read] == [{True}] * 2 + [{False}] * (STEPS - 2)


def test_two_processes_equal_one(home, tmp_path):
    steps = optimisation(micro_batch=2, batch=6)
    one = student(home, tmp_path, "one", **GRACE, optimisation=steps)
    words = ["--processes", 2, "--run", tmp_path / "one.json", "--data", home / "data", "--out", tmp_path / "two"]
    words += ["--log", tmp_path / "two.jsonl", "--checkpoints", tmp_path / ".two"]
    words += ["--init", home / "baseline", "--cache", home / "cache"]
    done = subprocess.run(started.grace("train", *words), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_manifest(tmp_path / "two")
    for a, b in zip(log(tmp_path, "one"), log(tmp_path, "two"), strict=True):
        for part in ("loss", "ce", "kd", "rcka", "beta", "grad_norm"):
            assert a[part] == pytest.approx(b[part], rel=2e-3), part
    before, after = weights(one), weights(tmp_path / "two")
    for name in before:
        if name.endswith(".codes"):
            assert (before[name] != after[name]).float().mean() < 0.01, name


def test_a_training_imports_nothing_that_it_does_not_use(home, tmp_path):
    words = ["train", "--run", run_file(tmp_path, "grace", **GRACE), "--data", home / "data"]
    words += ["--init", home / "baseline", "--cache", home / "cache"]
    words += ["--out", tmp_path / "model", "--log", tmp_path / "log.jsonl"]
    words = list(map(str, [*words, "--checkpoints", tmp_path / "checkpoints"]))
    code = f"from grace.cli import app; app({words}, standalone_mode=False)"
    code += "\nimport sys; print({'pandas', 'datasets', 'scipy.stats', 'sklearn', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
