"""Packed folders held against what vLLM's compressed-tensors reader expects; `vllm_load.py` runs that reader itself.

The rules below restate it (v0.11 and main of 2026): a linear is left unquantised where `ignore` names it or a
`re:` pattern matches from its start; joined linears (qkv, gate-up) must agree on that; the rest match the target
`Linear`, whose weights must be a static symmetric group of 4 or 8 bits without activations (its WNA16 scheme); and that
scheme registers weight_packed int32 [out, in * bits / 32], weight_scale [out, in / group] in the model's dtype and
weight_shape int64 [2]. vLLM names modules as the checkpoint does for LLaVA, and moves prefixes for the Qwen families.
"""

import re

import pytest
import torch
from chat_models import byte_level, sentencepiece
from compressed_tensors.quantization import QuantizationArgs
from jinja2 import nodes
from quant_models import make_student
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

from grace.demo.processor import TEMPLATE
from grace.families import FAMILIES
from grace.files import read_json
from grace.quant.chat_template import write_bos
from grace.quant.pack import pack

JOINED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# family -> (decoder's prefix in vLLM, its prefix on disk, other linears of vLLM's model, {prefix moved in `ignore`})
NAMES = {
    "llava": (
        "language_model.model.layers",
        "language_model.model.layers",
        ["vision_tower.vision_model.encoder.layers.0.self_attn.qkv_proj", "multi_modal_projector.linear_1"],
        {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head"},
    ),
    "qwen2_vl": (
        "language_model.model.layers",
        "model.layers",
        ["visual.blocks.0.attn.qkv", "visual.merger.mlp.0"],
        {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head"},
    ),
    "qwen3_vl": (
        "language_model.model.layers",
        "model.language_model.layers",
        ["visual.blocks.0.attn.qkv", "visual.merger.linear_fc1", "visual.deepstack_merger_list.0.linear_fc1"],
        {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head"},
    ),
}


def ignored(name: str, ignore: list[str]) -> bool:
    stem, _, last = name.rpartition(".")
    shards = [f"{stem}.{part}" for part in JOINED.get(last, [last])]
    found = {
        any(re.match(rule[3:], shard) if rule.startswith("re:") else rule == shard for rule in ignore)
        for shard in shards
    }
    assert len(found) == 1, f"the parts of {name} disagree"
    return found.pop()


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_linear_is_read_as_it_was_written(family, bits, tmp_path):
    pack(make_student(tmp_path / "student", family, bits), tmp_path / "packed")
    config = read_json(tmp_path / "packed" / "config.json")
    about = config["quantization_config"]
    assert about["quant_method"] == "compressed-tensors" and about["format"] == "pack-quantized"
    (group,) = about["config_groups"].values()
    assert group["targets"] == ["Linear"] and group["input_activations"] is None
    assert about["kv_cache_scheme"] is None
    weights = QuantizationArgs.model_validate(group["weights"])
    assert weights.strategy == "group" and weights.symmetric and weights.type == "int" and not weights.dynamic
    assert weights.num_bits == bits and weights.actorder is None

    decoder, on_disk, others, moved = NAMES[family]
    ignore = list(about["ignore"])
    for old, new in moved.items():
        ignore = [new + rule.removeprefix(old) if rule.startswith(old) else rule for rule in ignore]
    linears = [
        f"{decoder}.{layer}.{part}" for layer in range(2)
        for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]  # fmt: skip
    assert not any(ignored(name, ignore) for name in linears)
    assert all(ignored(name, ignore) for name in [*others, "language_model.lm_head"])

    tensors, text = load_file(tmp_path / "packed" / "model.safetensors"), config["text_config"]
    heads = text["num_attention_heads"] * text.get("head_dim", text["hidden_size"] // text["num_attention_heads"])
    shared = heads // text["num_attention_heads"] * text["num_key_value_heads"]
    width, inner = text["hidden_size"], text["intermediate_size"]
    shapes = {
        "self_attn.q_proj": (heads, width), "self_attn.k_proj": (shared, width), "self_attn.v_proj": (shared, width),
        "self_attn.o_proj": (width, heads), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }  # fmt: skip
    for layer in range(2):
        for part, (out, inputs) in shapes.items():
            name = f"{on_disk}.{layer}.{part}"
            packed, scale, shape = (tensors.pop(f"{name}.weight_{kind}") for kind in ("packed", "scale", "shape"))
            assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (out, inputs * bits // 32))
            assert (scale.dtype, tuple(scale.shape)) == (torch.bfloat16, (out, inputs // weights.group_size))
            assert (shape.dtype, shape.tolist()) == (torch.int64, [out, inputs])
    towers = [name for name in tensors if name.startswith("vision_tower.")]
    assert bool(towers) == (family == "llava") and all(".vision_model." in name for name in towers)
    assert config["dtype"] == "bfloat16"
    assert not [name for name in tensors if "_packed" in name or "_scale" in name or "_shape" in name]


@pytest.mark.parametrize("template", [family.template for family in FAMILIES.values()] + [TEMPLATE])
def test_templates_show_that_content_is_a_list(template):
    """vLLM hands a template lists with images only where a loop goes over the content of a loop's message itself."""
    tree = _compile_jinja_template(template).environment.parse(template)
    loops = list(tree.find_all(nodes.For))
    messages = {
        loop.target.name for loop in loops if isinstance(loop.iter, nodes.Name) and loop.iter.name == "messages"
    }
    contents = [
        loop for loop in loops
        if isinstance(loop.iter, nodes.Getattr) and loop.iter.attr == "content" and loop.iter.node.name in messages
    ]  # fmt: skip
    assert contents and all(loop in contents or loop.target.name in messages for loop in loops)


@pytest.mark.parametrize("everywhere", [True, False])
def test_the_template_that_ships_begins_a_text_as_the_tokenizer_does(everywhere, tmp_path):
    """SentencePiece's leading space stands behind control tokens in old tokenizers, at the text's beginning in new."""
    tokenizer = sentencepiece()
    if not everywhere:
        tokenizer.backend_tokenizer.normalizer = None
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    write_bos(tmp_path)
    write_bos(tmp_path)  # again changes nothing
    shipped = AutoTokenizer.from_pretrained(tmp_path)
    written = shipped.apply_chat_template([{"role": "user", "content": "what is"}], tokenize=False)
    assert written == ("<s>what is" if everywhere else "<s> what is")
    assert shipped(written, add_special_tokens=False).input_ids == tokenizer("what is").input_ids


def test_a_template_without_need_is_left_alone(tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    write_bos(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"
