"""AWQ, GPTQ and GGUF from the same codes, read back by decoders written from the formats' own descriptions."""

import re

import gguf
import pytest
import torch
from chat_models import talking_student
from quant_models import FAMILIES, make_student
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.quantizers.quantizers_utils import should_convert_module

from grace.errors import GraceError
from grace.files import check_manifest, read_json
from grace.quant import read_quantization, save_quantization
from grace.quant.export import export
from grace.quant.names import quantised_module
from grace.quant.pack import pack


@pytest.fixture(scope="module", params=FAMILIES)
def packed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    student = make_student(folder / "student", request.param)
    pack(student, folder / "packed")
    return folder / "packed", read_quantization(student)


@pytest.fixture(scope="module", params=["llava-siglip", "qwen2_vl", "qwen3_vl"])
def talking(request, tmp_path_factory):
    """A packed folder with its tokenizer and processor, and what it holds."""
    folder = tmp_path_factory.mktemp(request.param)
    student = talking_student(folder / "student", request.param)
    pack(student, folder / "packed")
    return folder / "packed", read_quantization(student)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    pack(talking_student(folder / "student", "llava-siglip"), folder / "packed")
    return folder


def nibbles(words):
    """int32 [..., n] to int [..., n, 8], the lowest first."""
    return torch.stack([(words >> 4 * place) & 15 for place in range(8)], -1)


def linears(folder, ending):
    tensors = load_file(folder / "model.safetensors")
    names = [key.removesuffix(ending) for key in tensors if key.endswith(ending)]
    return tensors, {name: quantised_module(f"{name}.weight") for name in names}


def assert_only_decoder_linears_are_converted(folder, quantised, skipped):
    """By transformers' own rule, over every linear of the model that it builds from the folder's config."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        del config.quantization_config
        model = AutoModelForImageTextToText.from_config(config)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name in linears if should_convert_module(name, skipped)} == quantised


def test_awq_gemm(packed, tmp_path):
    """As AutoAWQ's kernel reads it: nibble i of a word is output ORDER[i] of its eight; w = (q - z) s."""
    folder, stored = packed
    export(folder, "awq", tmp_path / "awq")
    tensors, names = linears(tmp_path / "awq", ".qweight")
    assert set(names.values()) == set(stored.layers)
    for name, module in names.items():
        codes, scales = stored[module]
        rows, columns = codes.shape
        q = torch.empty(columns, rows, dtype=torch.int32)
        z = torch.empty(columns // 32, rows, dtype=torch.int32)
        for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            q[:, output::8] = nibbles(tensors[f"{name}.qweight"])[..., place]
            z[:, output::8] = nibbles(tensors[f"{name}.qzeros"])[..., place]
        assert (z == 8).all()
        assert torch.equal((q - z.repeat_interleave(32, 0)).T, codes.int())
        half = tensors[f"{name}.scales"]
        assert half.dtype == torch.float16 and torch.equal(half.T.float(), scales.float())
        assert f"{name}.weight" not in tensors and f"{name}.weight_packed" not in tensors
    config = read_json(tmp_path / "awq" / "config.json")["quantization_config"]
    assert_only_decoder_linears_are_converted(folder, set(stored.layers), config["modules_to_not_convert"])
    assert (config["quant_method"], config["version"], config["zero_point"]) == ("awq", "gemm", True)
    assert check_manifest(tmp_path / "awq")["format"] == "awq" and (tmp_path / "awq" / "chat_template.jinja").exists()


def test_gptq(packed, tmp_path):
    """As AutoGPTQ's kernel reads it: eight inputs a word; zero points are stored less one; g_idx gives the group."""
    folder, stored = packed
    export(folder, "gptq", tmp_path / "gptq")
    tensors, names = linears(tmp_path / "gptq", ".qweight")
    assert set(names.values()) == set(stored.layers)
    for name, module in names.items():
        codes, scales = stored[module]
        q = nibbles(tensors[f"{name}.qweight"]).transpose(1, 2).flatten(0, 1)
        z = nibbles(tensors[f"{name}.qzeros"]).flatten(1) + 1
        group = tensors[f"{name}.g_idx"].long()
        assert torch.equal(group, torch.arange(codes.shape[1]) // 32)
        assert torch.equal((q - z[group]).T, codes.int())
        assert torch.equal(tensors[f"{name}.scales"][group].T.float(), scales.float().repeat_interleave(32, 1))
    config = read_json(tmp_path / "gptq" / "config.json")["quantization_config"]
    assert (config["quant_method"], config["sym"], config["desc_act"]) == ("gptq", True, False)


def test_decoder_linears_in_16_bits_are_named(tmp_path):
    """Readers look for packed weights in every linear that the config does not name."""
    student = make_student(tmp_path / "student")
    stored, left = read_quantization(student), "model.language_model.layers.1.mlp.down_proj"
    save_quantization(student, {n: stored[n] for n in stored.layers if n != left}, 4, 32, "lsq")
    pack(student, tmp_path / "packed")
    for format in ("awq", "gptq"):
        export(tmp_path / "packed", format, tmp_path / format)
        assert f"{left}.weight" in {
            key.replace("language_model.model.", "model.language_model.")
            for key in load_file(tmp_path / format / "model.safetensors")
        }
    awq, gptq = (read_json(tmp_path / f / "config.json")["quantization_config"] for f in ("awq", "gptq"))
    assert [name for name in awq["modules_to_not_convert"] if name in left] == ["layers.1.mlp.down_proj"]
    named = [rule.removeprefix("-:") for rule in gptq["dynamic"]]
    assert any(re.match(rule, left) for rule in named)
    assert not any(re.match(rule, left.replace("down", "up")) for rule in named)


def test_gguf_is_read_back_by_the_gguf_package(talking, tmp_path):
    folder, stored = talking
    export(folder, "gguf", tmp_path / "gguf")
    reader = gguf.GGUFReader(tmp_path / "gguf" / "model-Q4_0.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    parts = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q": "self_attn.q_proj",
             "attn_k": "self_attn.k_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj"}  # fmt: skip
    for layer in range(2):
        for short, part in parts.items():
            tensor = tensors[f"blk.{layer}.{short}.weight"]
            assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0
            codes, scales = stored[f"model.language_model.layers.{layer}.{part}"]
            expected = codes.float() * scales.float().repeat_interleave(32, 1)
            if folder.parent.name.startswith("llava") and short in ("attn_q", "attn_k"):
                # Llama's rotary pairs are neighbours in GGUF: rows 0, 16, 1, 17, ... of each head of 32
                expected = expected.view(-1, 2, 16, 64).transpose(1, 2).reshape(expected.shape)
            read = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
            assert torch.equal(read, expected)
    assert reader.get_field("general.architecture").contents() in ("llama", "qwen2vl", "qwen3vl")
    assert "output.weight" in tensors and "token_embd.weight" in tensors


def test_gguf_llama_is_read_back_by_transformers(llava, tmp_path):
    """Its decoder computes what the packed one does, but for the bf16 rounding that Q4_0 does not have."""
    export(llava / "packed", "gguf", tmp_path / "gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model-Q4_0.gguf", dtype=torch.float32)
    stored = read_quantization(llava / "student")
    for name in stored.layers:
        codes, scales = stored[name]
        plain = name.replace("model.language_model.", "model.")
        expected = codes.float() * scales.float().repeat_interleave(32, 1)
        assert torch.equal(model.get_submodule(plain).weight.data, expected)
    ours = AutoModelForImageTextToText.from_pretrained(llava / "student", dtype=torch.float32)
    ids = torch.randint(4, 160, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, got = ours(input_ids=ids).logits, model(input_ids=ids).logits
    assert (wanted - got).abs().max() < 0.02 * wanted.abs().max()


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths(bits, tmp_path):
    student = make_student(tmp_path / "student", bits=bits)
    pack(student, tmp_path / "packed")
    stored = read_quantization(student)
    export(tmp_path / "packed", "gptq", tmp_path / "gptq")
    tensors, names = linears(tmp_path / "gptq", ".qweight")
    for name, module in names.items():
        column = tensors[f"{name}.qweight"][:, 5]
        stream = sum((int(word) & 0xFFFFFFFF) << 32 * place for place, word in enumerate(column))
        codes = stored[module][0][5]
        assert [(stream >> bits * i) % 2**bits - 2 ** (bits - 1) for i in range(len(codes))] == codes.tolist()
    for format in ("awq", "gguf"):
        with pytest.raises(GraceError, match=f"holds {bits}-bit codes"):
            export(tmp_path / "packed", format, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_exported_is_refused(llava, tmp_path):
    with pytest.raises(GraceError, match="--format onnx"):
        export(llava / "packed", "onnx", tmp_path / "x")
    with pytest.raises(GraceError, match="not a packed model"):
        export(llava / "student", "awq", tmp_path / "x")
    with pytest.raises(GraceError, match="not a model folder"):
        export(tmp_path, "awq", tmp_path / "x")
    pack(make_student(tmp_path / "narrow", group_size=16), tmp_path / "narrow_packed")
    with pytest.raises(GraceError, match="groups of 16 cannot be cut into Q4_0's blocks of 32"):
        export(tmp_path / "narrow_packed", "gguf", tmp_path / "x")


@pytest.mark.parametrize("format", ["awq", "gptq", "gguf"])
def test_a_scale_that_fp16_cannot_hold_is_refused(format, tmp_path):
    pack(talking_student(tmp_path / "student", "llava-siglip"), tmp_path / "packed")
    tensors = {name: t.clone() for name, t in load_file(tmp_path / "packed" / "model.safetensors").items()}
    key = "language_model.model.layers.0.self_attn.v_proj.weight_scale"
    tensors[key][3, 1] = 1.1e-7
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    with pytest.raises(GraceError, match=r"v_proj.*1\.1e-07 is not exact in fp16"):
        export(tmp_path / "packed", format, tmp_path / "x")
