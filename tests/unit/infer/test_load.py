"""Loading packed and plain folders for inference, fused or not, and what is said about folders that are neither."""

import json
import shutil

import pytest
import torch
from infer_models import save_llava, save_packed
from safetensors.torch import load_file, save_file
from torch import nn

from grace.errors import GraceError
from grace.infer.fuse import Fused, Share
from grace.infer.int4_linear import Int4Linear, choose_backend
from grace.infer.load import load_for_inference
from grace.kernels.w4a16_layout import dequantise


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    plain = save_llava(root / "plain", heads=4, key_value_heads=2)
    return plain, save_packed(plain, root / "packed")


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[1] + [3] * 9 + [4, 7, 8, 5]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 96, 96, generator=generator).bfloat16()}


@pytest.mark.parametrize("fuse", [False, True])
def test_packed_logits_are_those_of_the_dequantised_folder(folders, inputs, fuse):
    packed = folders[1]
    model = load_for_inference(packed, fuse=fuse)
    twin = load_for_inference(packed.with_name("packed-plain"), fuse=fuse)
    with torch.inference_mode():
        ours, theirs = model(**inputs).logits.float(), twin(**inputs).logits.float()
    assert (ours - theirs).norm() < 0.03 * theirs.norm()
    layers = [module for module in model.modules() if isinstance(module, Int4Linear)]
    assert {layer.backend for layer in layers} == {"torch-int4"}
    assert len(layers) == (8 if fuse else 14)


def test_packed_in_fp32_dequantises_and_equals_the_twin_exactly(folders, inputs):
    packed = folders[1]
    inputs["pixel_values"] = inputs["pixel_values"].float()
    model = load_for_inference(packed, dtype=torch.float32)
    layer = model.model.language_model.layers[0].mlp.down_proj
    assert layer.backend == "dequantise" and layer.weight.dtype == torch.int32
    twin = load_for_inference(packed.with_name("packed-plain"), dtype=torch.float32)
    with torch.inference_mode():
        ours, theirs = model(**inputs).logits, twin(**inputs).logits
    assert (ours - theirs).norm() < 0.03 * theirs.norm()  # the twin's weights were rounded to bf16 once


def test_fusing_a_plain_model_changes_nothing(folders, inputs):
    one, other = load_for_inference(folders[0], fuse=True), load_for_inference(folders[0], fuse=False)
    attention = one.model.language_model.layers[0].self_attn
    assert isinstance(attention.q_proj, Fused) and isinstance(attention.k_proj, Share)
    assert attention.q_proj.linear.out_features == 64 + 32 + 32
    with torch.inference_mode():
        torch.testing.assert_close(one(**inputs).logits, other(**inputs).logits, rtol=0.02, atol=0.02)
    assert attention.k_proj.ready is None


@pytest.mark.parametrize(("out", "inputs", "group"), [(24, 64, 32), (16, 48, 16), (16, 36, 12), (32, 128, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_int4_linear_whatever_the_backend(out, inputs, group, with_bias):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-8, 8, (out, inputs), dtype=torch.int8, generator=generator)
    scales = (torch.rand(out, inputs // group, generator=generator) + 0.1).bfloat16()
    bias = torch.randn(out, generator=generator).bfloat16() if with_bias else None
    x = torch.randn(2, 3, inputs, generator=generator).bfloat16()
    layer = Int4Linear(codes, scales, bias)
    expected = nn.functional.linear(
        x.double(), dequantise(codes, scales, torch.float64), bias.double() if with_bias else None
    )
    y = layer(x)
    assert y.shape == (2, 3, out) and y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() < 6e-3 * expected.norm()
    assert layer.backend == ("torch-int4" if (out, inputs, group) == (32, 128, 64) else "dequantise")


def test_backend_of_an_unknown_device_is_the_reference():
    assert choose_backend(64, 64, 32, torch.bfloat16, torch.device("meta")) == "dequantise"


def test_int4_linear_refuses_steps_that_do_not_fit():
    with pytest.raises(GraceError, match="do not fit codes"):
        Int4Linear(torch.zeros(16, 64, dtype=torch.int8), torch.ones(16, 3))


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(GraceError, match=r"config\.json is missing"):
        load_for_inference(tmp_path)


def test_truncated_weights_are_named(folders, tmp_path):
    folder = shutil.copytree(folders[1], tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(GraceError, match=r"model\.safetensors: damaged or cut short"):
        load_for_inference(folder)


@pytest.mark.parametrize("wrong", [16, 48])
def test_a_wrong_group_size_is_named_with_the_right_one(folders, tmp_path, wrong):
    folder = tmp_path / "packed"
    shutil.copytree(folders[1], folder)
    config = json.loads((folder / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    right, weights["group_size"] = weights["group_size"], wrong
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraceError, match=rf"config\.json: group_size {wrong} does not fit .*; set it to {right}"):
        load_for_inference(folder)


@pytest.mark.parametrize("which", ["packed", "packed-plain"])
def test_missing_and_unknown_weights_are_named(folders, tmp_path, which):
    source = folders[1].with_name(which)
    folder = shutil.copytree(source, tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    norm = next(name for name in tensors if name.endswith("layers.1.input_layernorm.weight"))
    tensors["extra.weight"] = tensors.pop(norm)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(GraceError, match=r"lacks \S*layers\.1\.input_layernorm\.weight; has unknown extra\.weight"):
        load_for_inference(folder)


def test_other_quantisations_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders[1], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraceError, match="pack the model with `grace pack`"):
        load_for_inference(folder)


def test_a_missing_or_old_card_is_said(folders, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GraceError, match="no CUDA device here; use the CPU"):
        load_for_inference(folders[0], device="cuda")
    for wrong in ("tpu", "cuda:x", "gpu"):
        with pytest.raises(GraceError, match=f"--device {wrong}: not a device"):
            load_for_inference(folders[0], device=wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(GraceError, match="has 1 CUDA devices"):
        load_for_inference(folders[0], device="cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(GraceError, match=r"Tesla T4 is older than compute capability 8\.0"):
        load_for_inference(folders[0], device="cuda")
