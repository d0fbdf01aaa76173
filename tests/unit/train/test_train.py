"""One loop for every recipe: same loss however the batch is cut, same bits however often the run is killed."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import GRACE, STEPS, log, make_home, optimisation, run_file, student, weights

from grace.config.schema import Method, Quantization
from grace.data import collate, load_prepared, plan_batches, prepare_examples
from grace.errors import GraceError
from grace.files import check_manifest, read_json, write_json
from grace.models import decoder_linears, load_model, load_processor
from grace.train import loop
from grace.train.commands import train
from grace.train.optimizer import MasterAdamW


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("experiment"))


RECIPES = {
    "bf16": {},
    "qat": dict(bits=4),
    "kd": dict(kd="plain", bits=2),
    "gdkd": dict(kd="gated"),
    "rcka": dict(rcka=True),
    "ib": dict(kd="plain", controller=True),
    "grace": GRACE,
    "reverse_kl": dict(kd="reverse_kl", bits=4),
    "jensen_shannon": dict(kd="jensen_shannon", constants=dict(mixture=0.3)),
    "dist": dict(kd="dist", rcka=True, controller=True),
}


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


def test_a_killed_run_ends_with_the_same_bits(home, tmp_path):
    steps = optimisation(steps=60, checkpoint_every=3)
    whole = student(home, tmp_path, "whole", **GRACE, optimisation=steps)
    run = run_file(tmp_path, "killed", **GRACE, optimisation=steps)
    command = [
        sys.executable,
        "-m",
        "grace.cli",
        "train",
        "--run",
        run,
        "--data",
        home / "data",
        "--out",
        tmp_path / "killed",
    ]
    command += ["--log", tmp_path / "killed.jsonl", "--checkpoints", tmp_path / ".killed", "--init", home / "baseline"]
    command += ["--cache", home / "cache"]
    job = subprocess.Popen(list(map(str, command)))
    while not list((tmp_path / ".killed").glob("step-*/checkpoint.json")):
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (tmp_path / "killed").exists()
    train(
        run,
        home / "data",
        tmp_path / "killed",
        tmp_path / "killed.jsonl",
        tmp_path / ".killed",
        home / "baseline",
        home / "cache",
    )
    before, after = weights(whole), weights(tmp_path / "killed")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [e["loss"] for e in log(tmp_path, "whole")] == [e["loss"] for e in log(tmp_path, "killed")]


@pytest.mark.parametrize("room, file", [(60_000, "step-0000002"), (2_000_000, "finished")])
def test_a_full_disk_stops_in_one_sentence_and_the_next_run_goes_on(home, tmp_path, room, file):
    """No file may grow beyond `room` bytes: first a checkpoint does not fit, then the model itself."""
    run = run_file(tmp_path, "disk", bits=4)
    paths = {name: tmp_path / end for name, end in dict(out="disk", log="disk.jsonl", checkpoints=".disk").items()}
    flags = [f"--{name}={path}" for name, path in paths.items()]
    flags += [f"--run={run}", f"--data={home / 'data'}", f"--init={home / 'baseline'}"]
    done = subprocess.run(
        [sys.executable, "-m", "grace.cli", "train", *flags], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY)),
    )  # fmt: skip
    assert done.returncode == 1
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("grace: ")]
    assert f"/{file}: could not be written" in said and "free space and run again" in said
    assert "Traceback" not in done.stderr
    assert not paths["out"].exists() and not list(tmp_path.rglob("*.part"))
    train(run, home / "data", tmp_path / "disk", tmp_path / "disk.jsonl", tmp_path / ".disk", home / "baseline")
    train(run, home / "data", tmp_path / "easy", tmp_path / "easy.jsonl", tmp_path / ".easy", home / "baseline")
    disk, easy = (load_file(tmp_path / name / "model.safetensors") for name in ("disk", "easy"))
    assert all(torch.equal(disk[name], easy[name]) for name in easy)


def test_a_non_finite_loss_stops_the_run_and_names_the_conversations(home, tmp_path):
    run = run_file(tmp_path, "wild", optimisation=optimisation(learning_rate=1e30, clip=1e30, warmup=0.0, steps=20))
    with pytest.raises(GraceError, match="ce, loss is not finite"):
        train(run, home / "data", tmp_path / "wild", tmp_path / "wild.jsonl", tmp_path / ".wild", home / "baseline")
    saved = read_json(tmp_path / ".wild/nonfinite.json")
    assert len(saved["ids"]) == len(saved["keys"]) == 6 and saved["step"] > 1
    assert not (tmp_path / "wild").exists()


@pytest.fixture
def poisoned(monkeypatch):
    """One conversation whose image gives NaN: the model's loss of its micro-batch is then not finite."""
    ids = []

    def load(data, tower):
        examples = list(load_prepared(data, tower))
        at = next(i for i, example in enumerate(examples) if not example.caption)
        examples[at] = replace(examples[at], features=examples[at].features * torch.nan)
        ids.append(examples[at].id)
        return examples

    monkeypatch.setattr("grace.train.commands.load_prepared", load)
    return ids


@pytest.mark.parametrize("name", ["bf16", "grace"])
def test_the_micro_batch_that_is_not_finite_is_named(home, tmp_path, poisoned, name):
    with pytest.raises(GraceError, match="not finite; the conversations at fault are listed in"):
        student(home, tmp_path, "run", **RECIPES[name], optimisation=optimisation(micro_batch=2, steps=20))
    saved = read_json(tmp_path / ".run/nonfinite.json")
    assert poisoned[0] in saved["ids"] and len(saved["ids"]) == len(saved["keys"]) == 2
    assert {"ce", "loss"} <= set(saved["nonfinite"])


def test_steps_that_are_not_finite_are_skipped_and_counted(home, tmp_path, poisoned):
    steps = optimisation(micro_batch=2, steps=20, nonfinite="skip", checkpoint_every=3)
    folder = student(home, tmp_path, "run", **GRACE, optimisation=steps)
    entries = log(tmp_path, "run")
    assert [entry["step"] for entry in entries] == list(range(1, 21))
    skipped = [entry for entry in entries if "skipped" in entry]
    assert [entry["skipped"] for entry in skipped] == list(range(1, len(skipped) + 1)) and skipped
    assert all(poisoned[0] in entry["ids"] and "loss" not in entry for entry in skipped)
    assert all(torch.isfinite(weight).all() for weight in load_file(folder / "model.safetensors").values())
    # the controller stands still where nothing was applied
    betas = [entry.get("beta") for entry in entries]
    average, beta, method = None, Method().beta_init, Method(tau=0.1)
    for entry, seen in zip(entries, betas, strict=True):
        if seen is None:
            continue
        assert seen == pytest.approx(beta, abs=2e-6)
        average = entry["kd"] if average is None else method.ema_decay * average + (1 - method.ema_decay) * entry["kd"]
        beta = min(max(beta + method.eta * (average - method.tau), method.beta_min), method.beta_max)


KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
import grace.train.commands as commands
from grace.data import load_prepared
from grace.train.loop import Trainer

def load(data, tower):
    examples = list(load_prepared(data, tower))
    at = next(i for i, example in enumerate(examples) if not example.caption)
    examples[at] = replace(examples[at], features=examples[at].features * torch.nan)
    return examples

def killed(self, number, *rest):
    if number == int(sys.argv[-1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number, *rest)

commands.load_prepared, step, Trainer._step = load, Trainer._step, killed
commands.train(*map(Path, sys.argv[1:-1]))
"""


def test_a_run_that_skips_ends_with_the_same_bits_however_often_it_is_killed(home, tmp_path, poisoned):
    steps = optimisation(micro_batch=2, steps=16, nonfinite="skip", checkpoint_every=3)
    whole = student(home, tmp_path, "whole", **GRACE, optimisation=steps)
    run = run_file(tmp_path, "killed", **GRACE, optimisation=steps)
    paths = [run, home / "data", tmp_path / "killed", tmp_path / "killed.jsonl", tmp_path / ".killed"]
    paths += [home / "baseline", home / "cache"]
    for at, status in ((4, -signal.SIGKILL), (11, -signal.SIGKILL), (-1, 0)):
        assert subprocess.run([sys.executable, "-c", KILLED, *map(str, paths), str(at)]).returncode == status
    before, after = weights(whole), weights(tmp_path / "killed")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    kept = ("step", "loss", "beta", "skipped", "ids")
    logs = [[{k: e[k] for k in kept if k in e} for e in log(tmp_path, name)] for name in ("whole", "killed")]
    assert logs[0] == logs[1] and any("skipped" in entry for entry in logs[0])


def test_a_step_that_is_skipped_leaves_no_trace(home, tmp_path, monkeypatch):
    """A gradient that overflows in step 3 is dropped: what comes before and after is a run without that step's data."""
    take = MasterAdamW._take_gradients
    calls = []

    def overflow(self):
        norm = take(self)
        calls.append(norm)
        return norm * torch.inf if len(calls) == 3 else norm

    before = student(home, tmp_path, "two", optimisation=optimisation(steps=2, warmup=0.0))
    monkeypatch.setattr(MasterAdamW, "_take_gradients", overflow)
    monkeypatch.setattr(MasterAdamW, "learning_rate", lambda self, step: 1.0)
    student(home, tmp_path, "three", optimisation=optimisation(steps=3, warmup=0.0, nonfinite="skip"))
    monkeypatch.setattr(MasterAdamW, "_take_gradients", take)
    student(home, tmp_path, "two", optimisation=optimisation(steps=2, warmup=0.0))
    assert log(tmp_path, "three")[2]["nonfinite"] == ["gradient"]
    after = load_file(tmp_path / "three/model.safetensors")
    assert all(torch.equal(weight, after[name]) for name, weight in load_file(before / "model.safetensors").items())


def test_a_run_of_which_nothing_is_finite_stops_all_the_same(home, tmp_path):
    wild = optimisation(learning_rate=1e30, clip=1e30, warmup=0.0, steps=60, nonfinite="skip")
    with pytest.raises(GraceError, match="not finite for 20 steps in a row"):
        student(home, tmp_path, "wild", optimisation=wild)


@pytest.mark.parametrize(
    "change, given, reason",
    [
        (dict(kd="gated"), dict(), "give the teacher's cache"),
        (dict(), dict(init=None), "give --init exactly when"),
        (dict(bits=4, quantization=Quantization(group_size=128)), dict(), "q_proj"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(home, tmp_path, change, given, reason):
    run = run_file(tmp_path, "bad", **change)
    with pytest.raises(GraceError, match=reason):
        train(
            run,
            home / "data",
            tmp_path / "bad",
            tmp_path / "bad.jsonl",
            tmp_path / ".bad",
            **({"init": home / "baseline"} | given),
        )
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    "pin, value, reason",
    [
        ("vocabulary", 9, "the teacher's vocabulary has 9 entries, the student's"),
        ("template", "other", "made with another chat template"),
        ("tokenizer", "other", "made with another tokenizer"),
        ("teacher", "other", "made with another teacher"),
        ("temperature", 3.0, "made with another temperature"),
    ],
)
def test_a_cache_of_something_else_is_refused_before_the_first_step(home, tmp_path, pin, value, reason):
    cache = tmp_path / "cache"
    shutil.copytree(home / "cache", cache)
    manifest = read_json(cache / "manifest.json") | {pin: value}
    if pin == "temperature":
        manifest |= {"format": "sampled", "head": 8, "tail": 8}  # the others serve every temperature
    write_json(cache / "manifest.json", manifest)
    run = run_file(tmp_path, "bad", **GRACE)
    with pytest.raises(GraceError, match=reason):
        train(run, home / "data", tmp_path / "bad", tmp_path / "bad.jsonl", tmp_path / ".bad", home / "baseline", cache,
              home / "teacher")  # fmt: skip
    assert not (tmp_path / ".bad").exists()


def test_weights_that_are_not_finite_are_refused_by_name(home, tmp_path):
    init = tmp_path / "init"
    shutil.copytree(home / "baseline", init)
    weights = load_file(init / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    weights[name][0, 0] = torch.inf
    save_file(weights, init / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GraceError, match=r"down_proj.weight holds NaN or infinite weights"):
        train(
            run_file(tmp_path, "bad"), home / "data", tmp_path / "bad", tmp_path / "bad.jsonl", tmp_path / ".bad", init
        )


@pytest.mark.parametrize(
    "fault, reason", [("label", "a label lies outside"), ("image", "it has 1 images, and visual tokens")]
)
def test_bad_conversations_are_refused_by_name(home, tmp_path, monkeypatch, fault, reason):
    def load(data, tower):
        examples = list(load_prepared(data, tower))
        example = examples[3]
        if fault == "label":
            example.labels[-1] = 10**6
        else:
            image = load_model(home / "baseline").config.image_token_id
            example.input_ids[example.input_ids == image] = 5
        return examples

    monkeypatch.setattr("grace.train.commands.load_prepared", load)
    with pytest.raises(GraceError, match=f"conversation .*{reason}"):
        student(home, tmp_path, "bad")


def test_captions_come_first_and_never_again(home, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(loop, "collate", lambda part, processor: read.append(part) or collate(part, processor))
    run = run_file(tmp_path, "two", optimisation=optimisation(caption_steps=2))
    train(run, home / "data", tmp_path / "two", tmp_path / "two.jsonl", tmp_path / ".two", home / "baseline")
    assert [{example.caption for example in part} for part in read] == [{True}] * 2 + [{False}] * (STEPS - 2)


def test_caption_steps_without_captions_are_refused(home, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(home / "data", data)
    table = pq.ParquetFile(data / "train.parquet").read()
    kept = table.filter(pc.invert(table["caption"]))
    pq.write_table(kept, data / "train.parquet")
    prepare_examples(data, load_processor(data / "processor"), data / "vision_tower")
    run = run_file(tmp_path, "none", optimisation=optimisation(caption_steps=2))
    with pytest.raises(GraceError, match="caption_steps is 2 and the data has no captions; set it to 0"):
        train(run, data, tmp_path / "none", tmp_path / "none.jsonl", tmp_path / ".none", home / "baseline")


def test_two_processes_equal_one(home, tmp_path):
    steps = optimisation(micro_batch=2, batch=6)
    one = student(home, tmp_path, "one", **GRACE, optimisation=steps)
    command = [sys.executable, "-m", "grace.cli", "train", "--processes", "2"]
    command += [
        "--run",
        tmp_path / "one.json",
        "--data",
        home / "data",
        "--out",
        tmp_path / "two",
        "--log",
        tmp_path / "two.jsonl",
    ]
    command += ["--checkpoints", tmp_path / ".two", "--init", home / "baseline", "--cache", home / "cache"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_manifest(tmp_path / "two")
    for a, b in zip(log(tmp_path, "one"), log(tmp_path, "two"), strict=True):
        for part in ("loss", "ce", "kd", "rcka", "beta", "grad_norm"):
            assert a[part] == pytest.approx(b[part], rel=2e-3), part
    before, after = weights(one), weights(tmp_path / "two")
    for name in before:
        if name.endswith(".codes"):
            assert (before[name] != after[name]).float().mean() < 0.01, name


def test_out_of_memory_cuts_smaller_parts_and_changes_no_result(home, tmp_path, monkeypatch, capsys):
    """The accelerator is played by a loss that refuses more than two conversations at once, from the third step on."""
    whole = student(home, tmp_path, "whole", **GRACE)
    asked = []

    def backward(self, batch, *rest, real=loop.Objective.backward):
        asked.append(len(batch.keys))
        if len(asked) > 2 and asked[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, *rest)

    monkeypatch.setattr(loop.Objective, "backward", backward)
    cut = student(home, tmp_path, "cut", **GRACE)
    assert asked[:2] == [6, 6] and max(asked[-6:]) == 1
    assert re.findall(r"out of memory; going on with micro_batch (\d)", capsys.readouterr().err) == ["3", "1"]
    for a, b in zip(log(tmp_path, whole.name), log(tmp_path, cut.name), strict=True):
        for part in ("loss", "ce", "kd", "rcka", "grad_norm"):
            assert a[part] == pytest.approx(b[part], rel=2e-3), part


SHORT_OF_MEMORY = """
# Read by every Python that starts: the second process plays a GPU that holds one conversation from its third pass on.
import os

if os.environ.get("RANK") == "1":
    import torch

    from grace.train.objective import Objective

    asked, real = [], Objective.backward

    def backward(self, batch, *rest):
        asked.append(len(batch.keys))
        if len(asked) > 2 and asked[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch, *rest)

    Objective.backward = backward
"""


def test_out_of_memory_on_one_of_two_processes_starts_both_again_with_smaller_parts(home, tmp_path, monkeypatch):
    one = student(home, tmp_path, "one", **GRACE, optimisation=optimisation(micro_batch=3))
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SHORT_OF_MEMORY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    flags = {
        "run": tmp_path / "one.json",
        "data": home / "data",
        "out": tmp_path / "two",
        "log": tmp_path / "two.jsonl",
    }
    flags |= {"checkpoints": tmp_path / ".two", "init": home / "baseline", "cache": home / "cache", "processes": 2}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    done = subprocess.run([sys.executable, "-m", "grace.cli", "train", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 3: out of memory with micro_batch 3 (CUDA out of memory); all 2 processes have to start" in done.stderr
    assert done.stderr.count("all processes start again") == 1
    check_manifest(tmp_path / "two")
    assert not (tmp_path / ".two/smaller.json").exists(), "nothing of it is left for another run"
    for a, b in zip(log(tmp_path, one.name), log(tmp_path, "two"), strict=True):
        for part in ("step", "loss", "ce", "kd", "rcka", "beta", "grad_norm"):
            assert a[part] == pytest.approx(b[part], rel=2e-3), part


def test_out_of_memory_with_one_conversation_is_a_sentence(home, tmp_path, monkeypatch):
    def backward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop.Objective, "backward", backward)
    with pytest.raises(GraceError, match=r"step 1: out of memory with micro_batch 1 .* lower micro_batch"):
        student(home, tmp_path, "none")
