"""Importing checkpoints in the formats of the authors' release, made here."""

import pytest
import torch
from chat_models import talking_student
from released_folders import GROUP, awq, dense
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from grace.cli import app
from grace.errors import GraceError
from grace.files import MANIFEST, read_json, sha256
from grace.infer.load import load_for_inference
from grace.models import load_model, load_processor
from grace.quant.import_release import MODULES, SIDECAR, import_release
from grace.quant.names import quantised_module
from grace.quant.packed import PackedModel


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model folder as published, before anything is quantised."""
    return talking_student(tmp_path_factory.mktemp("release") / "model", "qwen3_vl")


@pytest.mark.parametrize(("bits", "log_scale"), [(4, torch.bfloat16), (4, torch.float32), (8, torch.bfloat16)])
def test_a_dense_release_is_the_same_function_packed(plain, tmp_path, bits, log_scale):
    _, layers = dense(plain, tmp_path / "release", bits, log_scale)
    import_release(tmp_path / "release", tmp_path / "out")
    packed = PackedModel.open(tmp_path / "out")
    assert (packed.bits, packed.group_size, len(packed.linears)) == (bits, GROUP, len(layers))
    for name, (codes, steps) in layers.items():
        read, scales = packed[f"{name}.weight"]
        assert torch.equal(read.long(), codes)
        assert torch.equal(scales.flatten(), steps.float().exp())
    model, theirs = load_model(tmp_path / "out"), load_model(tmp_path / "release")
    for (name, ours), (_, released) in zip(
        sorted(model.state_dict().items()), sorted(theirs.state_dict().items()), strict=True
    ):
        assert torch.equal(ours, released), name
    assert "dense folder" in read_json(tmp_path / "out" / MANIFEST)["imported"]
    card = (tmp_path / "out/README.md").read_text()
    assert f"{len(layers)} linears of the language model hold signed {bits}-bit codes in groups of {GROUP}" in card
    assert "the authors of GRACE" in card and "dense folder" in card
    for name in ("model.safetensors", SIDECAR):
        assert sha256(tmp_path / "release" / name) in card
    assert not (tmp_path / "out" / SIDECAR).exists() and "qat" not in read_json(tmp_path / "out/config.json")
    load_processor(tmp_path / "out")


def test_an_awq_release_keeps_its_codes_and_its_scales(plain, tmp_path):
    layers = awq(plain, tmp_path / "release")
    done = CliRunner().invoke(app, ["import", "--released", str(tmp_path / "release"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    packed, model = PackedModel.open(tmp_path / "out"), load_for_inference(tmp_path / "out", torch.float32, fuse=False)
    for name, (codes, steps) in layers.items():
        read, scales = packed[f"{name}.weight"]
        assert torch.equal(read.long(), codes) and torch.equal(scales.flatten(), steps.exp().half())
        linear = model.get_submodule(quantised_module(f"{name}.weight"))
        product = (codes * scales.float().repeat_interleave(GROUP, 1)).float()
        assert torch.allclose(linear(torch.eye(codes.shape[1])).T, product, rtol=1e-6, atol=0), name
    assert "fp16 scales" in read_json(tmp_path / "out" / MANIFEST)["imported"]
    assert not (tmp_path / "out" / MODULES).exists()


class Spelt:
    """Something that only code can build."""


def change_sidecar(folder, change) -> None:
    held = torch.load(folder / SIDECAR, weights_only=True)
    change(held, next(key for key in held if key.endswith(".log_scale")))
    torch.save(held, folder / SIDECAR)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda f: (f / SIDECAR).unlink(), "has neither"),
        (lambda f: change_sidecar(f, lambda held, key: held[key].fill_(float("nan"))), "zero, negative or not finite"),
        (lambda f: change_sidecar(f, lambda held, key: held[key].fill_(-200)), "zero, negative or not finite"),
        (lambda f: change_sidecar(f, lambda held, key: held[key].add_(0.01)), "no code times their scale"),
        (lambda f: change_sidecar(f, lambda held, key: held.update({key: held[key][1:]})), "no scales for groups"),
        (lambda f: change_sidecar(f, lambda held, key: held.pop(key.replace("log_scale", "weight"))), "not in both"),
        (lambda f: torch.save({"code": Spelt()}, f / SIDECAR), "holds no plain tensors"),
        (lambda f: (f / SIDECAR).write_bytes((f / SIDECAR).read_bytes()[:100]), "holds no plain tensors"),
    ],
)
def test_what_is_no_dense_release_is_refused(plain, tmp_path, break_it, said):
    dense(plain, tmp_path / "release", log_scale=torch.float32)
    break_it(tmp_path / "release")
    with pytest.raises(GraceError, match=said):
        import_release(tmp_path / "release", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [("scales", 0.0, "zero, negative"), ("qzeros", 7, "other zero points"), ("qweight", None, "differ in")],
)
def test_what_is_no_awq_release_is_refused(plain, tmp_path, kind, value, said):
    awq(plain, tmp_path / "release")
    weights = load_file(tmp_path / "release/model.safetensors")
    key = next(key for key in weights if key.endswith(kind))
    if value is None:
        del weights[key]
    else:
        weights[key][0, 0] = value
    save_file(weights, tmp_path / "release/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GraceError, match=said):
        import_release(tmp_path / "release", tmp_path / "out")
