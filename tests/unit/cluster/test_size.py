"""Predictions are held against what was measured, and counts against models and data that are there."""

import json

import pytest
import torch
import yaml
from many_examples import write_many
from tiny_models import make_llava
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2VLConfig

from grace.cluster import size as size_module
from grace.cluster.counts import DataSize, model_size, prepared_size, sampled_size
from grace.cluster.predict import GPUS, cache_bytes, mfu, training, training_memory
from grace.config.sections import FilesData, Optimisation
from grace.errors import GraceError
from grace.models import freeze_vision


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """The shapes of `tests/gpu/bench_step.py`, as folders with a config.json and no weights."""
    folder = tmp_path_factory.mktemp("shapes")
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32_064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=False).save_pretrained(folder / "llava")
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = dict(vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                num_attention_heads=12, num_key_value_heads=2, rope_parameters=rope)  # fmt: skip
    tower = dict(depth=32, embed_dim=1280, hidden_size=1536, num_heads=16, mlp_ratio=4, patch_size=14)
    Qwen2VLConfig(text_config=text, vision_config=tower, tie_word_embeddings=True).save_pretrained(folder / "qwen")
    return {name: model_size(folder / name) for name in ("llava", "qwen")}


def steps(**change):
    return Optimisation(**{**dict(steps=1, batch=32, micro_batch=2, learning_rate=1e-5), **change})


PACKED = {"llava": dict(pass_tokens=8192), "qwen": dict(pass_tokens=16384, kept_activations=0.5, batch=64)}
HEADS = {"llava": 32_064 * 5120, "qwen": 151_936 * 3584}


@pytest.mark.parametrize(
    "name, grace, measured", [("llava", 0, 117.7), ("llava", 1, 118.6), ("qwen", 0, 46.7), ("qwen", 1, 48.3)]
)
def test_memory_is_within_a_twentieth_of_what_an_h200_showed(shapes, name, grace, measured):
    """docs/log/2026-11-30-training.md: plain and GRACE steps in packed rows."""
    bits, head = (4, HEADS[name]) if grace else (None, 0)
    predicted = training_memory(shapes[name], steps(**PACKED[name]), 2048, 1, bits, 128, head)
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("name, seconds, tokens", [("llava", 4.855, 43_200), ("qwen", 2.083, 65_900)])
def test_time_is_within_a_fifth_of_what_an_h200_showed(shapes, name, seconds, tokens):
    """GRACE steps; conversations are as long as the middle of their range."""
    count = PACKED[name].get("batch", 32)
    data = DataSize(1000, 1000 * tokens // count, 0, 1000, 576, 2048)
    need = training(shapes[name], steps(**PACKED[name]), data, GPUS["H200"], 1, 4, 128, HEADS[name])
    assert need.hours * 3600 == pytest.approx(seconds, rel=0.2)
    assert mfu(512) == mfu(1536) < mfu(2048) < mfu(4096) == mfu(8192)


def test_more_gpus_share_what_is_sharded(shapes):
    one, eight = (training_memory(shapes["llava"], steps(**PACKED["llava"]), 0, n, None, 128) for n in (1, 8))
    state = 18 * shapes["llava"].decoder / 2**30
    assert one - eight == pytest.approx(state * 7 / 8, rel=0.05)


def test_weights_are_counted_without_being_made(tmp_path):
    model = make_llava()
    model.config.save_pretrained(tmp_path)
    found = model_size(tmp_path)
    freeze_vision(model)
    assert found.weights == sum(p.numel() for p in model.parameters())
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (found.hidden, found.layers, found.head) == (32, 2, 64)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(GraceError, match=r"no model can be made of its config.json"):
        model_size(tmp_path)


def test_prepared_data_is_counted_and_a_cache_is_as_large_as_said(tmp_path):
    write_many(tmp_path / "data", 700)
    found = prepared_size(tmp_path / "data")
    assert (found.conversations, found.images, found.visual, found.sampled) == (700, 700, 9, None)
    assert 0 < found.supervised < found.tokens and found.longest >= found.tokens / 700
    bare = found.supervised * 132 + 700 * (9 * 8 / 2 + 40)
    assert bare < cache_bytes(found, 64, "hidden") < bare + 700 * 128


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Models and data in place, nothing run."""
    monkeypatch.chdir(tmp_path)
    for name, width in (("teacher", 64), ("student", 32)):
        make_llava(width=width, vocabulary=128).to(torch.bfloat16).save_pretrained(tmp_path / name)
    write_many(tmp_path / "results/tiny/data", 64)
    config = {
        "experiment": "tiny", "family": "llava", "teacher": {"pretrained": "teacher"},
        "student": {"pretrained": "student"}, "quantization": {"group_size": 32},
        "data": {"source": "files", "sources": [{"path": "none.json"}]},
        "finetune": {"epochs": 2, "batch": 16, "learning_rate": 1e-3, "pass_tokens": 256},
        "runs": [{"recipes": ["finetune", "grace", "rtn"], "precisions": ["int4"], "seeds": [0, 1]}],
        "evaluation": {"benchmarks": ["mmbench"], "harness": "grace", "protocol": "vlmevalkit"},
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "tiny.yaml"


def test_an_experiment_is_sized_and_what_ran_stands_beside_it(experiment, capsys):
    lines = size_module.size(experiment, "H200", 1.0)
    assert [(line.name, line.jobs) for line in lines] == [("cache", 2), ("finetune int4", 2), ("grace int4", 2)]
    tokens = prepared_size(experiment.parent / "results/tiny/data").tokens
    assert lines[0].need.tokens == tokens / 2 and lines[1].need.tokens == 2 * tokens
    said = capsys.readouterr().out
    assert "64 conversations" in said and "The cache by cache.format: hidden 0.0 GB" in said
    log = experiment.parent / "results/tiny/students/grace/int4/seed0/model/timing.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps({"memory_gib": g, "seconds": 1800}) + "\n" for g in (1.5, 77.25)))
    size_module.size(experiment, "H200", 1.0)
    said = capsys.readouterr().out
    assert "(77.2)" in said and "(1.00)" in said


def test_a_released_student_is_not_trained(experiment):
    config = yaml.safe_load(experiment.read_text())
    config["recipes"] = {"theirs": {"kd": "gated", "released": {"int4": {"pretrained": "student"}}}}
    config["runs"] = [{"recipes": ["theirs", "finetune"], "precisions": ["int4"], "seeds": [0]}]
    experiment.write_text(yaml.safe_dump(config | {"bench": {"recipe": "finetune"}}))
    assert [line.name for line in size_module.size(experiment, "H200", 1.0)] == ["finetune int4"]


def test_what_cannot_be_known_yet_is_a_sentence(experiment):
    with pytest.raises(GraceError, match="--gpu H9: not one of H200"):
        size_module.size(experiment, "H9", 1.0)
    (experiment.parent / "teacher/config.json").unlink()
    with pytest.raises(
        GraceError, match=r"the teacher is not here yet; build it first: `snakemake results/tiny/teacher"
    ):
        size_module.size(experiment, "H200", 1.0)


def test_sources_are_sampled_where_nothing_is_prepared(tmp_path):
    from own_data import llava, write_source

    from grace.demo.processor import build_processor

    build_processor().save_pretrained(tmp_path / "processor")
    write_source(tmp_path, [llava(id=f"r{n}", said=("<image>\nwhat is it", "red " * (n % 5 + 1))) for n in range(700)])
    source = {"path": str(tmp_path / "conversations.json"), "images": str(tmp_path / "images"), "weight": 2.0}
    data = FilesData.model_validate({"source": "files", "sources": [source]})
    found = sampled_size(data, tmp_path / "processor")
    assert (found.conversations, found.images, found.visual, found.sampled) == (1400, 1400, 9, 256)
    assert found.supervised == pytest.approx(1400 * 4, rel=0.1)
