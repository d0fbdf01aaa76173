"""When all layers of a step go in one launch, what it is told, and that it compiles; a GPU checks what it computes."""

import copy
from pathlib import Path
from types import SimpleNamespace

import gluon_on_cpu
import pytest
import torch
from apart import run_apart
from torch import nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    Qwen2VLTextConfig,
    Qwen2VLTextModel,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
)

from grace.infer import persistent_step
from grace.infer.cache import make_cache, round_to_int8
from grace.infer.fuse import fuse_dense
from grace.infer.int4_linear import Int4Linear
from grace.infer.llama_step import rotary_table
from grace.kernels import decode_layers
from grace.kernels.decode_ring import FIELDS
from grace.kernels.w4a16 import pack
from grace.kernels.w4a16_layout import dequantise
from grace.kernels.w4a16_table import GPU

H100 = GPU("an H100", 132, 227 * 1024, hopper=True)
FAMILIES = {
    "llama": (LlamaConfig, LlamaModel),
    "qwen2": (Qwen2VLTextConfig, Qwen2VLTextModel),  # biases of queries, keys and values; positions of three axes
    "qwen3": (Qwen3VLTextConfig, Qwen3VLTextModel),  # norms of queries and keys; the axes interleaved
}


def plain_decoder(family: str = "llama", group: int = 128, **changes) -> PreTrainedModel:
    """A small decoder of transformers in fp32, whose linears hold random codes times random scales."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2} | changes
    shape = {"num_key_value_heads": shape["num_attention_heads"]} | shape
    width = shape.setdefault("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    axes = [width // 8, width * 3 // 16, width * 3 // 16]
    rope = {"rope_type": "default", "rope_theta": 10000.0} | ({} if family == "llama" else {"mrope_section": axes})
    config, model = FAMILIES[family]
    decoder = model(config(vocab_size=50, rope_parameters=rope, **shape)).eval().requires_grad_(False)
    for child in decoder.layers.modules():
        if type(child) is nn.Linear:
            codes = torch.randint(-8, 8, child.weight.shape, dtype=torch.int8)
            codes[:, ::group] = -8  # so that the largest of each group tells its scale
            scales = (0.005 * torch.rand(len(codes), codes.shape[1] // group) + 0.002).bfloat16()
            child.weight.copy_(dequantise(codes, scales, torch.float32))
            if child.bias is not None:
                child.bias.copy_(torch.randn(len(codes)).bfloat16())
        elif "Norm" in type(child).__name__:
            nn.init.uniform_(child.weight, 0.5, 2)
    decoder.embed_tokens.weight.copy_(decoder.embed_tokens.weight.bfloat16())
    return decoder


def packed_decoder(plain: PreTrainedModel | None = None, group: int = 128, **changes) -> PreTrainedModel:
    """The same in bf16 with INT4 linears that say they run on a GPU, and lie as they would there."""
    decoder = copy.deepcopy(plain or plain_decoder(group=group, **changes))
    fuse_dense(decoder)
    for parent in list(decoder.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                groups = child.weight.view(child.out_features, -1, group)
                scales = groups.abs().amax(-1) / 8
                codes = (groups / scales.unsqueeze(-1)).round().to(torch.int8).view(child.weight.shape)
                packed = Int4Linear(codes, scales.bfloat16(), child.bias)
                packed.weight, packed.scales = pack(codes, scales.bfloat16())
                packed.backend = "triton"
                setattr(parent, name, packed)
    return decoder.bfloat16()


def serves(decoder: PreTrainedModel, batch: int = 1, bits: int = 16, **how: bool) -> bool:
    cache = make_cache(decoder.config, batch, 32, bits, torch.bfloat16, torch.device("cpu"))
    return persistent_step.serves(decoder, decoder.embed_tokens.weight, cache, **how)


@pytest.mark.parametrize("family", FAMILIES)
def test_takes_each_familys_layers(monkeypatch, family):
    monkeypatch.setattr(persistent_step, "gpu", lambda device: (H100, True))
    for heads in (
        {},
        {"num_key_value_heads": 2},
        {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 1},
    ):
        decoder = packed_decoder(family=family, **heads)
        assert serves(decoder) and serves(decoder, batch=8, unmeasured=True)
        assert serves(decoder, batch=2) == (family == "llama")  # a GPU has run LLaVA's alone


def test_takes_plain_layers_on_hopper_alone(monkeypatch):
    decoder = packed_decoder()
    assert not serves(decoder)  # a CPU
    monkeypatch.setattr(persistent_step, "gpu", lambda device: (H100, True))
    assert serves(decoder)
    assert serves(decoder, batch=8) and not serves(decoder, batch=9) and not serves(decoder, batch=9, unmeasured=True)
    assert not serves(decoder, bits=8) and not serves(decoder, bits=8, unmeasured=True)  # heads of 64
    wide = packed_decoder(num_attention_heads=2)
    assert serves(wide, bits=8) and serves(wide, batch=2, bits=8)
    assert serves(wide, batch=4, bits=8, unmeasured=True) and not serves(wide, batch=4, bits=8)
    small = GPU("a slice of an H100", 3, 227 * 1024, hopper=True)  # fewer multiprocessors than heads
    for refused in (GPU("an A100", 108, 163 * 1024), small):
        monkeypatch.setattr(persistent_step, "gpu", lambda device, refused=refused: (refused, True))
        assert not serves(decoder)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 18 * 64, "num_attention_heads": 18, "num_key_value_heads": 1, "intermediate_size": 128},
        {"group": 64},
        {"attention_bias": True},  # of the output product as well
        {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 32},
        {"intermediate_size": 16384 + 128},
        {"hidden_size": 4096 + 128, "num_attention_heads": 33, "intermediate_size": 128},
    ],
)
def test_refuses_layers_that_it_does_not_compute(monkeypatch, changes):
    monkeypatch.setattr(persistent_step, "gpu", lambda device: (H100, True))
    monkeypatch.setattr(persistent_step, "WIDEST", (4096, 4096, 16384))  # twice that takes long to make on a CPU
    assert not serves(packed_decoder(**changes))


def test_refuses_layers_that_are_not_all_alike(monkeypatch):
    monkeypatch.setattr(persistent_step, "gpu", lambda device: (H100, True))
    for change in ("norms of heads", "bias", "dense", "epsilon", "epsilon of heads"):
        decoder = packed_decoder(family="qwen3" if change == "epsilon of heads" else "llama")
        layer = decoder.layers[1]
        if change == "norms of heads":
            layer.self_attn.q_norm = layer.self_attn.k_norm = decoder.norm
        elif change == "bias":
            layer.self_attn.q_proj.linear.bias = torch.zeros(3 * 256)
        elif change == "dense":
            layer.mlp.down_proj = nn.Linear(512, 256)
        else:
            (layer.self_attn.k_norm if "heads" in change else layer.input_layernorm).variance_epsilon = 0.1
        assert not serves(decoder), change


@pytest.mark.parametrize(
    "family, bits, absent", [("llama", 16, 5), ("qwen2", 16, 4), ("qwen3", 16, 3), ("llama", 8, 3)]
)
def test_the_table_holds_each_layers_addresses_in_the_kernels_order(monkeypatch, family, bits, absent):
    monkeypatch.setattr(persistent_step, "gpu", lambda device: (H100, True))
    decoder = packed_decoder(family=family)
    cache = make_cache(decoder.config, 1, 32, bits, torch.bfloat16, torch.device("cpu"))
    turns = torch.zeros(32, 64)
    table = persistent_step.PersistentLayers(decoder, decoder.embed_tokens.weight, cache, turns, turns).table
    assert table.shape == (2, len(FIELDS)) and table.dtype == torch.int64
    assert (table == 0).sum() == 2 * absent and len(table.unique()) == table.numel() - 2 * absent + 1
    layer, kept = decoder.layers[1], cache.layers[1]
    expected = {
        "qkv": layer.self_attn.q_proj.linear.weight, "o_steps": layer.self_attn.o_proj.scales,
        "gate_up": layer.mlp.gate_proj.linear.weight, "down_steps": layer.mlp.down_proj.scales,
        "input_norm": layer.input_layernorm.weight, "post_norm": layer.post_attention_layernorm.weight,
        "keys": kept.keys, "values": kept.values,
    }  # fmt: skip
    if family == "qwen2":
        expected["qkv_bias"] = layer.self_attn.q_proj.linear.bias
    if bits == 8:
        expected |= {"key_steps": kept.key_steps, "value_steps": kept.value_steps}
    if family == "qwen3":
        expected |= {"q_norm": layer.self_attn.q_norm.weight, "k_norm": layer.self_attn.k_norm.weight}
    for name, tensor in expected.items():
        assert table[1, FIELDS.index(name)] == tensor.data_ptr(), name


def test_a_launch_that_fails_is_told_and_done_without(monkeypatch):
    class Kernel(dict):
        def __missing__(self, grid):
            raise RuntimeError("too many blocks in cooperative launch")

    monkeypatch.setattr(persistent_step, "gpu", lambda device: (H100, True))
    module = SimpleNamespace(**{name: getattr(decode_layers, name) for name in ("WAYS", "SHARED_REST", "STAGE_BYTES")})
    module.layers_kernel = Kernel()
    monkeypatch.setattr(persistent_step, "_kernel", lambda: module)
    decoder = packed_decoder()
    cache = make_cache(decoder.config, 1, 32, 16, torch.bfloat16, torch.device("cpu"))
    places = [torch.zeros(1, dtype=torch.int64)] * 4
    with pytest.warns(UserWarning, match="a launch per kernel.*too many blocks"):
        made = persistent_step.prepare(decoder, decoder.embed_tokens.weight, cache, (places[0], places[0]), *places)
    assert made is None


@pytest.mark.parametrize("pairs, expected", [(256, 1), (128, 1), (64, 2), (96, 1), (16, 8), (6, 8)])
def test_a_batchs_heads_are_cut_where_programs_would_have_none(pairs, expected):
    assert persistent_step.parts(pairs, 132) == expected


def test_shared_memory_holds_what_a_batch_needs():
    """Sums of all units where a product takes more inputs than are placed at a time."""
    for hidden, inner, heads, group, units in (
        (4096, 11008, 32, 1, 2),
        (5120, 13824, 40, 1, 14),
        (1536, 8960, 2, 6, 1),
    ):
        told = persistent_step.constants(hidden, inner, heads, group, 128, H100.shared, H100.multiprocessors, 8)
        assert told["UNITS"] == units and told["STAGES"] >= 4


@pytest.mark.parametrize(
    "hidden, inner, heads, group",
    [
        (4096, 11008, 32, 1), (5120, 13824, 40, 1), (512, 1024, 4, 1),
        # Qwen2-VL-2B, Qwen3-VL-2B, 4B, 8B
        (1536, 8960, 2, 6), (2048, 6144, 8, 2), (2560, 9728, 8, 4), (4096, 12288, 8, 4),
    ],
)  # fmt: skip
def test_every_program_has_its_share(hidden, inner, heads, group):
    """No more parts of attention than programs, and room for all of a product's inputs."""
    told = persistent_step.constants(hidden, inner, heads, group, 128, H100.shared, H100.multiprocessors, biased=True)
    wide = heads * group * 128
    assert heads * told["SPLIT"] <= told["P"] and told["STAGES"] >= 4
    assert [outputs for outputs, *_ in told["SHAPES"]] == [wide + 2 * heads * 128, hidden, 2 * inner, hidden]
    assert [flags for _, _, *flags in told["SHAPES"]] == [[False, True], [False, False], [True, False], [False, False]]
    for inputs, pad in zip((hidden, wide, inner), told["PADS"], strict=True):
        assert inputs <= pad and pad % (told["WAYS"] * 128) == 0 and pad & (pad - 1) == 0


def fill(kept, now: int, bits: int) -> None:
    """Random keys and values in the slots before `now`, NaN behind."""
    for cached, steps in ((kept.keys, "key_steps"), (kept.values, "value_steps")):
        states = torch.randn(cached.shape).bfloat16()
        if bits == 8:
            if steps == "value_steps":  # some zeros, and sizes that differ by slot
                states *= torch.rand(cached.shape[:3]).unsqueeze(-1) ** 8
            states[0, 0, : now // 2] = 0
            codes, scales = round_to_int8(states)
            cached.copy_(codes)
            getattr(kept, steps).copy_(scales)[:, :, now:] = torch.nan
        else:
            cached.copy_(states)[:, :, now:] = torch.nan


def stored(kept) -> list[torch.Tensor]:
    """Keys and values of a layer's cache in fp32."""
    if kept.keys.dtype != torch.int8:
        return [kept.keys.float(), kept.values.float()]
    return [kept.keys * kept.key_steps.unsqueeze(-1), kept.values * kept.value_steps.unsqueeze(-1)]


CASES = [  # programs, tokens before and padding of each sequence, positions skipped, changes of the decoder
    (9, 70, [0], 0, {}),  # two parts of each head's slots
    (5, 300, [37], 0, {"num_attention_heads": 2, "head_dim": 128}),  # rounds of several stages, padding before
    (4, 0, [0], 0, {}),  # the first token
    (7, 3, [2], 0, {"num_attention_heads": 2, "head_dim": 64, "intermediate_size": 2048 + 128}),  # empty parts
    (9, 150, [11], 0, {"num_key_value_heads": 1}),
    (9, 150, [11], 60, {"family": "qwen2", "hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 2}),
    (5, 70, [0], 31, {"family": "qwen3", "num_key_value_heads": 2, "head_dim": 128}),
    (5, 70, [0, 13], 0, {"num_attention_heads": 2, "head_dim": 128}),
    (4, 0, [0, 0], 0, {}),
    (3, 150, [0, 150, 11], 0, {"intermediate_size": 4096 + 128}),  # down in two rounds, one of a piece of a stage
    (4, 40, [3, 0, 39, 8], 60, {"family": "qwen2", "intermediate_size": 2048 * 4, "num_key_value_heads": 2}),
    (
        7, 140, [0, 1, 2, 3, 4, 5, 6, 139], 31,
        {"family": "qwen3", "num_key_value_heads": 2, "head_dim": 128, "num_hidden_layers": 1},
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    "bits, programs, now, padding, skipped, changes",
    [(bits, *case) for case in CASES for bits in (16, 8) if bits == 16 or case[-1].get("head_dim") == 128],
)
def test_a_step_is_that_of_transformers(monkeypatch, bits, programs, now, padding, skipped, changes):
    """The kernel itself, its programs and warps as threads of a CPU, against transformers' layers in fp32.

    `skipped`: how many positions fewer than tokens there are before, as Qwen counts an image's.
    """
    torch.manual_seed(now)
    monkeypatch.setattr(persistent_step, "gpu", lambda device: (GPU("threads", programs, 227 * 1024, True), True))
    names = ["gluon_names", "decode_ring", "decode_layers_attention", "decode_layers", "decode_layers_batch"]
    folder = Path(persistent_step.__file__).parents[1] / "kernels"
    module, memory = gluon_on_cpu.load(*(folder / f"{name}.py" for name in names[: 4 if len(padding) == 1 else 5]))
    monkeypatch.setattr(persistent_step, "_kernel" if len(padding) == 1 else "_batch_kernel", lambda: module)
    plain = plain_decoder(**changes)
    packed, config = packed_decoder(plain), plain.config
    length, batch = now + 9, len(padding)
    cache = make_cache(config, batch, length, bits, torch.bfloat16, torch.device("cpu"))
    before = DynamicCache(config=config)
    for index, kept in enumerate(cache.layers):
        fill(kept, now, bits)
        if now:
            before.update(*(t[:, :, :now] for t in stored(kept)), index)
    turns = rotary_table(plain.rotary_emb, length, torch.bfloat16)
    layers = persistent_step.PersistentLayers(packed, packed.embed_tokens.weight, cache, *turns)
    memory.know(t for layer in packed.layers for t in layer.state_dict().values())
    memory.know(t for kept in cache.layers for t in vars(kept).values() if isinstance(t, torch.Tensor) and t.dim() > 2)
    token, first = torch.arange(7, 7 + batch), torch.tensor(padding)
    position = (now - first - skipped).clamp(min=0)
    mask = (torch.arange(now + 1) >= first[:, None]).long()
    expected = plain(
        input_ids=token[:, None], attention_mask=mask, position_ids=position[:, None], past_key_values=before,
        use_cache=True,
    ).last_hidden_state[:, 0]  # fmt: skip
    for _ in range(2):  # the second launch finds counters and cache as the first has left them
        ours = layers(token, position, torch.tensor(now), first)
        assert ((ours.float() - expected).norm(dim=1) < 0.02 * expected.norm(dim=1)).all()
        for kept, theirs in zip(cache.layers, before.layers, strict=True):
            for own, other in zip(stored(kept), (theirs.keys, theirs.values), strict=True):
                assert (own[:, :, now] - other[:, :, now]).norm() < 0.02 * other[:, :, now].norm()
                assert own[:, :, now + 1 :].isnan().all()
        assert not layers.counter.any()


def test_compiles_for_hopper():
    run_apart("decode_layers_compile.py")
