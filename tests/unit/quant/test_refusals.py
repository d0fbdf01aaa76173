"""Student and packed folders that are damaged, incomplete or contradict themselves: one sentence each, no output."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from grace.errors import GraceError
from grace.files import read_json
from grace.quant.pack import pack, verify
from grace.quant.rtn import round_checkpoint


def edit(folder, **changes):
    about = read_json(folder / "quantization.json")
    (folder / "quantization.json").write_text(json.dumps({**about, **changes}))


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    for call in (
        lambda: pack(tmp_path / "empty", tmp_path / "x"),
        lambda: round_checkpoint(tmp_path / "empty", tmp_path, 4, 32),
    ):
        with pytest.raises(GraceError, match=r"empty: not a model folder \(config\.json is missing\)"):
            call()
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(GraceError, match=r"model\.safetensors: no such file"):
        pack(tmp_path / "empty", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_missing_and_incomplete_description(copied, tmp_path):
    edit(copied, bits="four")
    with pytest.raises(GraceError, match="`bits`: input should be a valid integer"):
        pack(copied, tmp_path / "x")
    edit(copied, bits=4, layers=[["a"]])
    with pytest.raises(GraceError, match=r"`layers\.0`: input should be a valid string"):
        pack(copied, tmp_path / "x")
    (copied / "quantization.json").unlink()
    with pytest.raises(GraceError, match=r"not a quantised student \(quantization\.json is missing\)"):
        pack(copied, tmp_path / "x")


def test_wrong_group_size_and_width(copied, tmp_path):
    edit(copied, group_size=16)
    with pytest.raises(GraceError, match=r"scales is \[.*groups of 16.*correct group_size"):
        pack(copied, tmp_path / "x")
    edit(copied, group_size=48)
    with pytest.raises(GraceError, match="not a multiple of group_size 48"):
        pack(copied, tmp_path / "x")
    edit(copied, group_size=32, bits=3)
    with pytest.raises(GraceError, match=r"codes runs from -8 to 7, outside \[-4, 3\] of 3 bits"):
        pack(copied, tmp_path / "x")
    edit(copied, bits=5)
    with pytest.raises(GraceError, match="bits: 5"):
        pack(copied, tmp_path / "x")


@pytest.mark.parametrize("name", ["model.safetensors", "quantization.safetensors"])
def test_truncated_file(copied, tmp_path, name):
    whole = (copied / name).read_bytes()
    for size in (len(whole) - 100, 40, 0):
        (copied / name).write_bytes(whole[:size])
        with pytest.raises(GraceError, match=rf"{name}: truncated or damaged"):
            pack(copied, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def change(folder, file, key, value):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    tensors[key] = value(tensors[key])
    save_file(tensors, folder / file, {"format": "pt"})


LAYER = "model.language_model.layers.1.mlp.gate_proj"


def flip(tensor):
    tensor.view(-1)[1] += 1
    return tensor


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("quantization.safetensors", f"{LAYER}.codes", lambda t: t.clone().fill_(9), r"codes runs from 9 to 9"),
        ("quantization.safetensors", f"{LAYER}.scales", lambda t: t * torch.nan, "not positive and finite"),
        ("quantization.safetensors", f"{LAYER}.scales", lambda t: t.float(), "not int8 codes"),
        ("quantization.safetensors", f"{LAYER}.codes", lambda t: t.T.contiguous(), "but its codes are"),
        ("quantization.safetensors", f"{LAYER}.scales", lambda t: t * 2, r"is not bf16\(codes \* scales\)"),
        (
            "model.safetensors",
            "language_model.model.layers.1.mlp.gate_proj.weight",
            flip,
            r"is not bf16\(codes \* scales\)",
        ),
    ],
)
def test_a_student_that_contradicts_itself_is_refused(copied, tmp_path, file, key, value, message):
    change(copied, file, key, value)
    with pytest.raises(GraceError, match=message):
        pack(copied, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_missing_layers_are_named(copied, tmp_path):
    edit(copied, layers=[LAYER, "model.language_model.layers.9.mlp.up_proj"])
    with pytest.raises(GraceError, match=r"layers\.9\.mlp\.up_proj, which the weights lack"):
        pack(copied, tmp_path / "x")
    edit(copied, layers=[LAYER])
    tensors = {name: tensor.clone() for name, tensor in load_file(copied / "quantization.safetensors").items()}
    del tensors[f"{LAYER}.scales"]
    save_file(tensors, copied / "quantization.safetensors")
    with pytest.raises(GraceError, match=r"lacks .*gate_proj\.scales"):
        pack(copied, tmp_path / "x")


def test_the_sign_of_a_zero_is_no_difference(copied, tmp_path):
    """A GPU's rounding may leave -0.0 where the codes say 0."""
    key = "language_model.model.layers.1.mlp.gate_proj.weight"
    change(copied, "model.safetensors", key, lambda weight: torch.where(weight == 0, -0.0, weight))
    pack(copied, tmp_path / "packed")


@pytest.mark.parametrize("kind", ["packed", "scale", "shape"])
def test_verification_finds_a_changed_bit(student, tmp_path, kind):
    pack(student, tmp_path / "packed")
    verify(student, tmp_path / "packed")
    key = f"language_model.model.layers.1.mlp.gate_proj.weight_{kind}"
    change(tmp_path / "packed", "model.safetensors", key, flip)
    with pytest.raises(GraceError, match="gate_proj"):
        verify(student, tmp_path / "packed")


def test_verification_finds_a_changed_bf16_tensor(student, tmp_path):
    pack(student, tmp_path / "packed")
    change(tmp_path / "packed", "model.safetensors", "language_model.lm_head.weight", flip)
    with pytest.raises(GraceError, match="lm_head"):
        verify(student, tmp_path / "packed")
