"""What cannot be trained on is refused before the first step, by its name."""

import shutil

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import GRACE, optimisation, run_file, student

from grace.config.schema import Quantization
from grace.data import load_prepared, prepare_examples
from grace.errors import GraceError
from grace.files import read_json, write_json
from grace.models import load_model, load_processor
from grace.train.commands import train


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
