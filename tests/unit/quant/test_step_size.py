"""Learned step sizes against LSQ's formulas, written out again in float64."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grace.errors import GraceError
from grace.quant import LearnedStepSize, dequantize, lsq_gradients, quantize

widths = st.sampled_from([2, 3, 4, 8])
cases = st.tuples(widths, st.sampled_from([1, 4, 16, 24]), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**31))


def random_weight(rows, columns, seed, scale=0.02):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def bf16(values):
    return torch.from_numpy(np.asarray(values)).bfloat16().double().numpy()


def reference_start(weight, bits, group_size):
    """The best of 20 scales per group, by a plain loop in float64."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    groups = weight.double().numpy().reshape(len(weight), -1, group_size)
    best = np.empty(groups.shape[:2])
    for index in np.ndindex(*best.shape):
        group = groups[index]
        candidates = bf16(np.linspace(0.3, 1.2, 20) * np.abs(group).max() / high)
        errors = [((np.round(np.clip(group / s, low, high)) * s - group) ** 2).sum() for s in candidates]
        best[index] = candidates[int(np.argmin(errors))]
    return best


def reference_gradients(weight, theta, grad, bits, group_size, gradient_scale):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    w, g = (t.double().numpy().reshape(len(weight), -1, group_size) for t in (weight, grad))
    # The quotient is fp32's, as in training: on which side of a rounding boundary it falls is a matter of definition.
    step = torch.from_numpy(bf16(np.exp(theta.double().numpy()))).float()
    u = (weight.view(w.shape) / step[..., None]).double().numpy()
    inside = (u > low) & (u < high)
    slope = np.where(inside, np.round(u) - u, np.where(u <= low, low, high))
    to_theta = (g * slope).sum(-1) * np.exp(theta.double().numpy())
    if gradient_scale:
        to_theta /= np.sqrt(group_size * high)
    return (g * inside).reshape(weight.shape), to_theta


@settings(max_examples=40, deadline=None)
@given(cases)
def test_start_is_the_best_of_twenty(case):
    bits, group_size, groups, rows, seed = case
    weight = random_weight(rows, groups * group_size, seed)
    sizes = LearnedStepSize.from_weight(weight, bits=bits, group_size=group_size)
    expected = reference_start(weight, bits, group_size)
    if group_size == 1:  # several scales reproduce a lone weight equally well
        return
    agree = np.isclose(sizes.scales.double().numpy(), expected, rtol=0)
    assert agree.mean() > 0.9  # near-ties may fall either way in fp32
    assert sizes.theta.dtype == torch.float32 and sizes.scales.dtype == torch.bfloat16


@settings(max_examples=60, deadline=None)
@given(cases, st.booleans())
def test_gradients_follow_lsq(case, gradient_scale):
    bits, group_size, groups, rows, seed = case
    weight = random_weight(rows, groups * group_size, seed)
    sizes = LearnedStepSize.from_weight(weight, bits, group_size, gradient_scale=gradient_scale)
    theta = sizes.theta.detach() - 0.3  # smaller steps, so that some weights are clipped
    grad = random_weight(rows, groups * group_size, seed + 1, 1.0)
    ours = lsq_gradients(weight, theta, grad, bits, group_size, gradient_scale)
    expected = reference_gradients(weight, theta, grad, bits, group_size, gradient_scale)
    assert np.array_equal(ours[0].double().numpy(), expected[0])
    np.testing.assert_allclose(ours[1].numpy(), expected[1], rtol=1e-5, atol=1e-6 * group_size)


def test_clipping_comes_before_rounding():
    """7 < u <= 7.5 and -8.5 <= u <= -8 round into the range, but lie outside it: no gradient to the weight."""
    weight = torch.tensor([[6.9, 7.0, 7.4, -7.9, -8.0, -8.4, 0.2, 9.0]])
    theta = torch.zeros(1, 1)
    to_weight, to_theta = lsq_gradients(weight, theta, torch.ones_like(weight), bits=4, group_size=8)
    assert to_weight.tolist() == [[1, 0, 0, 1, 0, 0, 1, 0]]
    expected = (7 - 6.9) + 7 + 7 + (-8 + 7.9) - 8 - 8 - 0.2 + 7
    assert to_theta.item() == pytest.approx(expected, abs=1e-5)


def test_one_step_equals_every_micro_batch():
    """The rule applied once to the accumulated gradient is autograd through every micro-batch."""
    weight = torch.nn.Parameter(random_weight(24, 64, 0, 0.1))
    sizes = LearnedStepSize.from_weight(weight, bits=3, group_size=32)
    with torch.no_grad():
        sizes.theta -= 0.2
    inputs = random_weight(4 * 10, 64, 1, 1.0).split(10)
    for part in inputs:  # quantise in every micro-batch
        (part @ sizes.fake_quantize(weight).float().T).square().sum().backward()
    dense = sizes.fake_quantize(weight).detach().float().requires_grad_()
    for part in inputs:  # quantise once
        (part @ dense.T).square().sum().backward()
    to_weight, to_theta = lsq_gradients(weight, sizes.theta, dense.grad, bits=3, group_size=32)
    # In autograd each micro-batch's gradient passes through the bf16 of the dequantised weight.
    torch.testing.assert_close(weight.grad, to_weight, rtol=2e-2, atol=2e-2 * float(to_weight.abs().max()))
    exact = [torch.zeros_like(weight), torch.zeros_like(sizes.theta)]
    for part in inputs:
        one = sizes.fake_quantize(weight).detach().float().requires_grad_()
        (part @ one.T).square().sum().backward()
        for total, grad in zip(exact, lsq_gradients(weight, sizes.theta, one.grad, 3, 32), strict=True):
            total += grad
    torch.testing.assert_close(exact[0], to_weight, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(exact[1], to_theta, rtol=1e-4, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(cases)
def test_value_is_codes_times_scales_in_bf16(case):
    bits, group_size, groups, rows, seed = case
    weight = random_weight(rows, groups * group_size, seed)
    sizes = LearnedStepSize.from_weight(weight, bits, group_size)
    codes, scales = sizes.codes(weight), sizes.scales
    assert codes.dtype == torch.int8
    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1
    product = codes.double().view(rows, groups, -1) * scales.double()[..., None]
    assert torch.equal(sizes.fake_quantize(weight), product.float().bfloat16().view(weight.shape))
    assert torch.equal(dequantize(codes, scales), sizes.fake_quantize(weight))
    assert torch.equal(quantize(dequantize(codes, scales), scales, bits), codes)  # rounding again changes nothing


def test_autograd_saves_only_its_inputs():
    weight = torch.nn.Parameter(random_weight(8, 32, 0))
    sizes = LearnedStepSize.from_weight(weight, bits=4, group_size=16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        sizes.fake_quantize(weight)
    assert sorted(saved) == sorted([weight.data_ptr(), sizes.theta.data_ptr()])


def test_gradient_reaches_weight_and_theta_in_their_dtypes():
    weight = torch.nn.Parameter(random_weight(8, 32, 0).bfloat16())
    sizes = LearnedStepSize.from_weight(weight, bits=4, group_size=16)
    sizes.fake_quantize(weight).sum().backward()
    assert weight.grad.dtype == torch.bfloat16 and sizes.theta.grad.dtype == torch.float32


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("magnitude", [0.0, 1e-42, 1e-30, 1e30])
def test_extreme_groups_stay_finite(bits, magnitude):
    weight = random_weight(4, 64, 0)
    weight[:, 16:32] = magnitude
    sizes = LearnedStepSize.from_weight(weight, bits, 16)
    value = sizes.fake_quantize(weight)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(sizes.theta.grad).all()
    assert (sizes.scales > 0).all()
    if magnitude == 0:
        assert (value[:, 16:32] == 0).all()
        assert (
            sizes.scales[:, 1].min() > 0.2 * sizes.scales.float().mean()
        )  # alive: a weight that grows is rounded on the scale of the others


def test_theta_that_runs_away_stays_finite():
    weight = random_weight(2, 32, 0)
    for theta in (-200.0, 200.0):
        sizes = LearnedStepSize(torch.full((2, 1), theta), bits=4, group_size=32)
        assert torch.isfinite(sizes.fake_quantize(weight)).all()


def test_bad_input_is_named():
    with pytest.raises(GraceError, match=r"layers\.3\.mlp\.down_proj.*100.*group_size 32"):
        LearnedStepSize.from_weight(torch.ones(2, 100), bits=4, group_size=32, name="layers.3.mlp.down_proj")
    with pytest.raises(GraceError, match="bits: 5"):
        LearnedStepSize.from_weight(torch.ones(2, 32), bits=5, group_size=32)
    with pytest.raises(GraceError, match=r"q_proj.*NaN"):
        LearnedStepSize.from_weight(torch.full((2, 32), torch.nan), bits=4, group_size=32, name="q_proj")

    sizes = LearnedStepSize.from_weight(torch.ones(2, 64), bits=4, group_size=32)
    for shape in ((2, 32), (1, 64), (3, 64)):
        with pytest.raises(GraceError, match=r"belong to a weight of \[2, 64\]"):
            sizes.fake_quantize(torch.ones(shape))
    with pytest.raises(GraceError, match=r"must be \[out, in\] floats"):
        LearnedStepSize.from_weight(torch.ones(64))


def test_second_derivatives_are_refused():
    weight = random_weight(2, 32, 0).requires_grad_()
    value = LearnedStepSize.from_weight(weight.detach(), group_size=32).fake_quantize(weight)
    with pytest.raises(GraceError, match="a first derivative alone"):
        torch.autograd.grad(value.float().sum(), weight, create_graph=True)


def test_what_is_written_is_the_fake_quantised_weight():
    weight = random_weight(6, 64, 0)
    sizes = LearnedStepSize.from_weight(weight, bits=4, group_size=32)
    for dtype in (torch.bfloat16, torch.float32):
        out = torch.empty(6, 64, dtype=dtype)
        sizes.write(weight, out)
        assert torch.equal(out, sizes.fake_quantize(weight).to(dtype))


def test_the_fused_kernel_takes_the_place_of_the_rule(monkeypatch):
    """On a GPU the Triton kernel computes the gradients; here it runs in Triton's interpreter."""
    weight, grad = random_weight(6, 64, 0), random_weight(6, 64, 1, 1.0)
    sizes = LearnedStepSize.from_weight(weight, bits=3, group_size=32, gradient_scale=True)
    expected = lsq_gradients(weight, sizes.theta, grad, 3, 32, gradient_scale=True)
    monkeypatch.setattr("grace.quant.step_size._fused", lambda weight: True)
    fused = lsq_gradients(weight, sizes.theta, grad, 3, 32, gradient_scale=True)
    assert torch.equal(fused[0], expected[0])
    torch.testing.assert_close(fused[1], expected[1], rtol=1e-5, atol=1e-6)
    # The interpreter cuts bf16 off where a GPU rounds: within one unit in the last place.
    torch.testing.assert_close(
        sizes.fake_quantize(weight), dequantize(sizes.codes(weight), sizes.scales), rtol=1e-2, atol=0
    )
