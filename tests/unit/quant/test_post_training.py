"""RTN, AWQ, GPTQ and the outlier transform on tiny models, against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_models import FAMILIES, llava_batch, tiny
from safetensors.torch import save_file

from grace.errors import GraceError
from grace.quant import add_outliers, awq, dequantize, gptq, quantize
from grace.quant.calibration import INPUTS, Moments, layers_with_moments, round_model
from grace.quant.grid import best_scales, largest_scales
from grace.quant.names import decoder_part, quantised_module
from grace.quant.outliers import outlier_channels
from grace.quant.rtn import SCALES, round_checkpoint
from grace.quant.student import read_quantization


def logits(model, seed=5):
    with torch.no_grad():
        return model(**llava_batch(seed)).logits


def correlated(tokens, width, seed):
    """Activations with a few strong common directions and channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width // 4, width, generator=generator)
    inputs = torch.randn(tokens, width // 4, generator=generator) @ mix + 0.1 * torch.randn(
        tokens, width, generator=generator
    )
    return inputs * torch.logspace(-1, 1, width)[torch.randperm(width, generator=generator)]


def moments_of(inputs):
    moments = Moments.empty(inputs.shape[1])
    moments.add(inputs)
    return moments


def layer_error(weight, codes, scales, inputs):
    return float(((dequantize(codes, scales).float() - weight) @ inputs.T).square().sum())


def test_rtn_clips_nothing():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    scales = largest_scales(weight, 4, 32)
    expected = (weight.view(8, 2, 32).abs().amax(-1) / 7).bfloat16()
    assert torch.equal(scales, expected)
    error = (dequantize(quantize(weight, scales, 4), scales).float() - weight).view(8, 2, 32).abs()
    assert (error <= 0.56 * scales.float()[..., None]).all()  # half a step, and bf16's own rounding


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_convention_of_rtns_scale(tmp_path, bits):
    """As a packed folder has it: over Qp, over half the code range as compressed-tensors computes it, best of 20."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.mlp.down_proj.weight"
    (tmp_path / "init").mkdir()
    save_file({name: weight}, tmp_path / "init" / "model.safetensors")
    (tmp_path / "init" / "config.json").write_text("{}")
    grouped, error = weight.view(8, 2, 32), {}
    for scale in SCALES:
        folder = tmp_path / scale
        folder.mkdir()
        round_checkpoint(tmp_path / "init", folder, bits, 32, scale=scale)
        codes, scales = read_quantization(folder)["model.language_model.layers.0.mlp.down_proj"]
        error[scale] = float((dequantize(codes, scales).float() - weight).square().sum())
        if scale == "format":
            args = QuantizationArgs(num_bits=bits, symmetric=True)
            theirs, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
            assert torch.allclose(scales.float(), theirs.float(), rtol=2**-8)
    assert error["best"] <= min(error.values()) and len(set(error.values())) == 3


def brute_force_gptq(weight, second, bits, group_size):
    """The optimal brain surgeon column by column, inverting what is left of H anew each time."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    left, hessian = weight.double().clone(), second.double().clone()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), weight.shape[1] // group_size, dtype=torch.bfloat16)
    for column in range(weight.shape[1]):
        group = column // group_size
        if column % group_size == 0:
            block = left[:, column : column + group_size].float()
            scales[:, group] = best_scales(block, bits, group_size)[:, 0]
        step = scales[:, group].double()
        code = (left[:, column] / step).clamp(low, high).round()
        codes[:, column] = code.to(torch.int8)
        inverse = torch.linalg.inv(hessian[column:, column:])
        left[:, column:] -= torch.outer((left[:, column] - code * step) / inverse[0, 0], inverse[0])
    return codes, scales


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([2, 3, 4]), st.sampled_from([8, 16]), st.integers(0, 10_000))
def test_gptq_is_the_brute_force(bits, group_size, seed):
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(seed))
    inputs = correlated(200, 32, seed)
    ours = gptq.gptq(weight, moments_of(inputs).second, bits, group_size)
    expected = brute_force_gptq(weight, moments_of(inputs).second, bits, group_size)
    # A value on a rounding boundary may fall to either side in fp32 and changes what follows in its row.
    same = (ours[0] == expected[0]).all(1)
    assert same.float().mean() >= 0.6
    assert torch.equal(ours[1][same], expected[1][same])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_beats_rounding_on_correlated_inputs(bits):
    """In nearly every layer, by much on average: it is greedy, and one may come out a little worse."""
    shares = []
    for seed in range(20):
        weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
        inputs = correlated(400, 64, seed)
        scales = best_scales(weight, bits, 32)
        rtn = layer_error(weight, quantize(weight, scales, bits), scales, inputs)
        shares.append(layer_error(weight, *gptq.gptq(weight, moments_of(inputs).second, bits, 32), inputs) / rtn)
    assert sum(share < 1 for share in shares) >= 18 and sum(shares) / len(shares) < 0.8


def test_gptq_survives_channels_that_never_fire():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    inputs = correlated(50, 32, 0)
    inputs[:, :7] = 0
    codes, scales = gptq.gptq(weight, moments_of(inputs).second, 4, 16)
    assert torch.isfinite(dequantize(codes, scales)).all()
    assert torch.isfinite(dequantize(*gptq.gptq(weight, torch.zeros(32, 32), 4, 16))).all()


def test_awq_search_is_never_worse_than_no_search():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    inputs = correlated(300, 64, 1)
    moments = moments_of(inputs)
    channels = awq.search([weight], moments.magnitude / moments.tokens, moments.second, 3, 32)
    scales = best_scales(weight, 3, 32)
    plain = layer_error(weight, quantize(weight, scales, 3), scales, inputs)
    wide = best_scales(weight * channels, 3, 32)
    rounded = dequantize(quantize(weight * channels, wide, 3), wide).float() / channels
    assert float(((rounded - weight) @ inputs.T).square().sum()) < plain


def test_moments_are_sums_over_tokens():
    parts = [correlated(10, 8, seed) for seed in range(3)]
    whole, cut = moments_of(torch.cat(parts)), Moments.empty(8)
    for part in parts:
        cut.add(part[None])
    torch.testing.assert_close(cut.second, whole.second)
    torch.testing.assert_close(cut.second, torch.cat(parts).T @ torch.cat(parts))
    assert cut.tokens == 30


def test_hooks_see_what_enters_each_linear():
    model, batches = tiny(), [llava_batch(seed) for seed in range(3)]
    seen = {}
    for name, layer, moments in layers_with_moments(model, batches):
        for part in INPUTS:
            rows = []
            hook = layer.get_submodule(part).register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0]))
            for batch in batches:
                with torch.no_grad():
                    model(**batch)
            hook.remove()
            rows = torch.cat(rows, 1)[0]
            torch.testing.assert_close(moments[part].second, rows.T @ rows, rtol=1e-4, atol=1e-4)
            seen[f"{name}.{part}"] = moments[part].tokens
    assert len(seen) == 8 and set(seen.values()) == {3 * 22}


def test_awq_keeps_the_function_before_rounding():
    """Also with grouped-query attention: two query heads read each v head here."""
    model, batches = tiny(), [llava_batch(seed) for seed in range(4)]
    before, weights = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for _, layer, moments in layers_with_moments(model, batches):
            awq.widen(layer, moments, bits=3, group_size=16)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                gain = layer.get_submodule(norm).weight
                assert torch.equal(gain, gain.bfloat16().float())
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, weights[n])}
    assert any("o_proj" in n for n in changed) and any("down_proj" in n for n in changed)


@pytest.mark.parametrize("method", [awq, gptq])
def test_rounding_a_model_by_activations(method):
    model, batches = tiny(), [llava_batch(seed) for seed in range(4)]
    layers = round_model(model, batches, lambda layer, moments: method.round_layer(layer, moments, 4, 16))
    state = model.state_dict()
    expected = {quantised_module(key) for key in state} - {None}
    assert set(layers) == expected and len(expected) == 14
    for name, (codes, scales) in layers.items():
        assert torch.equal(state[f"{name}.weight"], dequantize(codes, scales).float())


def test_activations_beat_rtn_on_the_whole_model():
    """Four bits, a model with outliers: KL to the unrounded model on held-out inputs, summed over images."""

    def divergence(method):
        model = tiny(seed=3)
        add_outliers(model)
        wanted = [logits(model, seed).log_softmax(-1) for seed in range(50, 54)]
        batches = [llava_batch(seed) for seed in range(16)]

        def rtn(layer, moments):
            rounded = {}
            for part in (part for parts in INPUTS.values() for part in parts):
                weight = layer.get_submodule(part).weight
                scales = largest_scales(weight, 4, 32)
                rounded[part] = quantize(weight, scales, 4), scales
                weight.copy_(dequantize(*rounded[part]))
            return rounded

        round_model(model, batches, rtn if method is None else lambda a, b: method.round_layer(a, b, 4, 32))
        got = [logits(model, seed).log_softmax(-1) for seed in range(50, 54)]
        return sum(float((w.exp() * (w - g)).sum()) for w, g in zip(wanted, got, strict=True))

    rtn = divergence(None)
    assert divergence(awq) < rtn and divergence(gptq) < rtn


@pytest.mark.parametrize("family", FAMILIES)
def test_outliers_keep_the_function(family):
    """In fp32 to the last bit's noise, on a model and on a state dict; the weights' extremes grow."""
    model = tiny(family)
    ids = torch.randint(4, 160, (1, 10), generator=torch.Generator().manual_seed(0))

    def run():
        with torch.no_grad():
            return (logits(model) if family == "llava" else model(input_ids=ids).logits).clone()

    before, state = run(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_outliers(model)
    torch.testing.assert_close(run(), before, rtol=1e-5, atol=1e-5)
    add_outliers(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    weight = model.model.language_model.layers[1].mlp.up_proj.weight
    channels = outlier_channels(64, 1, "post_attention_layernorm")
    assert len(channels) == 2
    rest = torch.ones(64, dtype=torch.bool).index_fill(0, channels, False)
    assert weight[:, channels].abs().mean() > 10 * weight[:, rest].abs().mean()


def test_outlier_channels_depend_on_seed_and_place_only():
    assert torch.equal(outlier_channels(128, 1, "input_layernorm"), outlier_channels(128, 1, "input_layernorm"))
    others = [outlier_channels(128, 2, "input_layernorm"), outlier_channels(128, 1, "post_attention_layernorm")]
    others.append(outlier_channels(128, 1, "input_layernorm", seed=1))
    assert all(not torch.equal(outlier_channels(128, 1, "input_layernorm"), other) for other in others)


def test_bad_calibration_is_refused():
    with pytest.raises(GraceError, match="calibration"):
        round_model(tiny(), [], lambda layer, moments: {})
    broken = tiny()
    with torch.no_grad():
        broken.model.language_model.layers[0].input_layernorm.weight[0] = torch.nan
    with pytest.raises(GraceError, match=r"layers\.0\.self_attn\.q_proj: NaN"):
        round_model(broken, [llava_batch(0)], lambda layer, moments: {})
    with pytest.raises(GraceError, match="outliers"):
        add_outliers({"encoder.weight": torch.ones(3)})


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("model.language_model.layers.3.self_attn.q_proj.weight", "model.language_model.layers.3.self_attn.q_proj"),
        ("language_model.model.layers.11.mlp.down_proj.weight", "model.language_model.layers.11.mlp.down_proj"),
        ("model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj"),
        ("model.layers.0.self_attn.q_proj.bias", None),
        ("model.layers.0.self_attn.q_norm.weight", None),
        ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", None),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", None),
        ("model.visual.blocks.0.attn.qkv.weight", None),
        ("language_model.lm_head.weight", None),
    ],
)
def test_names_of_every_family(key, module):
    assert quantised_module(key) == module


def test_norms_are_parts_of_the_decoder():
    assert decoder_part("language_model.model.layers.2.input_layernorm.weight").part == "input_layernorm"
    assert decoder_part("model.layers.2.post_attention_layernorm.weight").part == "post_attention_layernorm"
