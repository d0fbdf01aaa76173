"""Packed folders: what stock transformers makes of them, and what is refused."""

import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from quant_models import FAMILIES, llava_batch, make_student, tiny
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig, LlavaForConditionalGeneration

from grace.errors import GraceError
from grace.files import check_manifest, read_json, whole_folder, write_json
from grace.quant import read_quantization, save_quantization
from grace.quant.checkpoint import Checkpoint, TensorSpec, write_checkpoint, write_tensors
from grace.quant.commands import quantize
from grace.quant.pack import pack, pack_student
from grace.quant.rtn import round_checkpoint


def load(folder, **more):
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **more)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model


@torch.no_grad()
def logits(model, family):
    batch = llava_batch(7)
    return model(**batch).logits if family == "llava" else model(input_ids=batch["input_ids"][:, 10:]).logits


EVERY_WIDTH = [("llava", bits) for bits in (2, 3, 4, 8)]
OTHER_FAMILIES = [(family, bits) for family in FAMILIES for bits in (3, 4) if family != "llava"]


@pytest.mark.parametrize(("family", "bits"), EVERY_WIDTH + OTHER_FAMILIES)
def test_transformers_reproduces_the_logits_exactly(family, bits, tmp_path):
    student = make_student(tmp_path / "student", family, bits, group_size=16 if bits == 3 else 32)
    pack(student, tmp_path / "packed")
    expected = logits(load(student), family)
    assert expected.dtype == torch.bfloat16
    for settings in (None, CompressedTensorsConfig(dequantize=True)):
        packed = load(tmp_path / "packed", **({"quantization_config": settings} if settings else {}))
        assert torch.equal(logits(packed, family), expected)


def test_plain_llava_class_loads_it_and_the_format_is_the_design_s(student, tmp_path):
    pack(student, tmp_path / "packed")
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path / "packed").dtype == torch.bfloat16
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    name = "language_model.model.layers.0.mlp.down_proj"
    codes, scales = read_quantization(student)["model.language_model.layers.0.mlp.down_proj"]
    packed = tensors[f"{name}.weight_packed"]
    assert packed.dtype == torch.int32 and packed.shape == (64, 96 // 8)
    for place in range(8):
        assert torch.equal((packed >> 4 * place) & 15, codes[:, place::8].int() + 8)
    assert torch.equal(tensors[f"{name}.weight_scale"], scales) and scales.dtype == torch.bfloat16
    assert tensors[f"{name}.weight_shape"].tolist() == [64, 96] and f"{name}.weight" not in tensors
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in tensors
    config = read_json(tmp_path / "packed" / "config.json")["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False,
    }  # fmt: skip
    assert {"lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"} <= set(config["ignore"])


def test_companions_card_and_manifest(student, tmp_path):
    packed = tmp_path / "packed"
    pack(student, packed)
    assert (packed / "chat_template.jinja").read_text() == "{{ messages }}"
    assert {"generation_config.json", "preprocessor_config.json"} <= {path.name for path in packed.iterdir()}
    assert not (packed / "quantization.safetensors").exists()
    card = (packed / "README.md").read_text()
    source = read_json(student / "manifest.json")
    for text in (
        "| run.method.tau | 3 |",
        source["files"]["quantization.safetensors"]["sha256"],
    ):
        assert text in card
    assert check_manifest(packed)["format"] == "pack-quantized"


def test_packing_again_gives_the_same_bytes(student, tmp_path):
    pack(student, tmp_path / "one")
    pack(student, tmp_path / "two")
    assert read_json(tmp_path / "one" / "manifest.json") == read_json(tmp_path / "two" / "manifest.json")


def test_a_student_of_another_commit_packs_to_the_same_files(student, tmp_path):
    """Equal students pack to equal folders, manifests included."""
    pack(student, tmp_path / "one")
    shutil.copytree(student, tmp_path / "student")
    made_with = read_json(student / "environment.json")
    made_with |= {"code": {"revision": "0" * 40, "modified": False, "sha256": "1" * 64}, "threads": "7"}
    write_json(tmp_path / "student/environment.json", made_with)
    pack(tmp_path / "student", tmp_path / "two")
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "two/manifest.json").read_bytes()


def test_shards(student, tmp_path):
    """Files of bounded size with an index, read by transformers as one model."""
    (tmp_path / "packed").mkdir()
    pack_student(student, tmp_path / "packed", shard_bytes=60_000)
    files = sorted((tmp_path / "packed").glob("model-*.safetensors"))
    sizes = [[tensor.nbytes for tensor in load_file(file).values()] for file in files]
    assert len(files) > 2 and all(sum(size) <= 60_000 or len(size) == 1 for size in sizes)
    assert set(read_json(tmp_path / "packed" / "model.safetensors.index.json")["weight_map"].values()) == {
        f.name for f in files
    }
    assert torch.equal(logits(load(tmp_path / "packed"), "llava"), logits(load(student), "llava"))


def test_a_decoder_linear_left_in_bf16_is_ignored_by_name(copied, tmp_path):
    stored = read_quantization(copied)
    kept = "model.language_model.layers.1.mlp.up_proj"
    save_quantization(copied, {n: stored[n] for n in stored.layers if n != kept}, 4, 32, "lsq")
    pack(copied, tmp_path / "packed")
    assert kept in read_json(tmp_path / "packed" / "config.json")["quantization_config"]["ignore"]
    assert torch.equal(logits(load(tmp_path / "packed"), "llava"), logits(load(copied), "llava"))


def test_streamed_files_are_safetensors(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).bfloat16(), "b": torch.arange(3), "c": torch.tensor(2.5), "d": torch.zeros(0, 4),
        "e": torch.randint(-9, 9, (7,), dtype=torch.int8), "f": torch.tensor([True, False, True]),
    }  # fmt: skip
    specs = [TensorSpec.of(name, tensor) for name, tensor in tensors.items()]
    write_tensors(tmp_path / "x.safetensors", specs, tensors.__getitem__)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    with pytest.raises(ValueError, match="planned"):
        write_tensors(tmp_path / "x.safetensors", specs, lambda name: torch.zeros(1))


def test_one_tensor_at_a_time(tmp_path):
    """When the writer asks for a tensor, it holds at most the one before."""
    made = []

    def produce(name):
        assert sum(tensor() is not None for tensor in made) <= 1
        tensor = torch.zeros(64, 64)
        made.append(weakref.ref(tensor))
        return tensor

    write_checkpoint(tmp_path, [TensorSpec(str(n), torch.float32, (64, 64)) for n in range(6)], produce)


def test_rounding_packing_and_exporting_import_no_transformers():
    code = (
        "import sys, grace.quant.rtn, grace.quant.pack, grace.quant.export, grace.quant.commands; print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded and "transformers" not in loaded


def test_rtn_verb(tmp_path):
    """Rounds any checkpoint folder, and keeps config and companions."""
    init = tmp_path / "init"
    tiny().save_pretrained(init)  # fp32
    (init / "tokenizer.json").write_text("{}")
    run = {
        "family": "llava", "post_training": "rtn", "bits": 3, "seed": 0, "outliers": True,
        "quantization": {"group_size": 16},
    }  # fmt: skip
    write_json(tmp_path / "run.json", run)
    quantize(tmp_path / "run.json", init, tmp_path, tmp_path / "student")
    assert read_json(tmp_path / "student" / "quantization.json")["method"] == "rtn"
    assert check_manifest(tmp_path / "student")["run"]["bits"] == 3
    assert (tmp_path / "student" / "tokenizer.json").exists()
    pack(tmp_path / "student", tmp_path / "packed")
    model = load(tmp_path / "student")
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(load(tmp_path / "packed"), "llava"), logits(model, "llava"))
    with (
        pytest.raises(GraceError, match=r"layers\.0\..*_proj: its input of 64 is not a multiple of group_size 48"),
        whole_folder(tmp_path / "none") as folder,
    ):
        round_checkpoint(init, folder, 4, 48)
    assert not (tmp_path / "none").exists()


def test_checkpoint_of_shards(tmp_path):
    """A sharded student is read through its index."""
    tiny().to(torch.bfloat16).save_pretrained(tmp_path / "one")
    tiny().to(torch.bfloat16).save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = Checkpoint.of_folder(tmp_path / "one"), Checkpoint.of_folder(tmp_path / "many")
    assert sorted(one) == sorted(many) and all(torch.equal(one[key], many[key]) for key in one)
