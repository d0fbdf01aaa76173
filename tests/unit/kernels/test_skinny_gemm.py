"""The product of a few rows with a dense 16-bit weight, in Triton's interpreter, against float64."""

import pytest
import torch
from apart import run_apart
from hypothesis import given, settings
from hypothesis import strategies as st
from infer_models import save_llava
from torch import nn

from grace.infer.decode import Session
from grace.infer.load import load_for_inference
from grace.kernels import skinny_gemm as skinny
from grace.kernels.skinny_gemm import Tile, choose, gemm, linear, serves

TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}  # a step: the interpreter cuts off where a GPU rounds


def operands(rows: int, outs: int, inputs: int, dtype: torch.dtype, seed: int):
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, inputs), (outs, inputs), (outs,)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def poisoned(real):
    return lambda *a, **k: real(*a, **k).fill_(float("nan"))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 16),
    outs=st.integers(1, 40),
    inputs=st.integers(1, 20).map(lambda n: 16 * n),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_against_float64(rows, outs, inputs, dtype, with_bias, seed):
    """Outputs and inputs that do and don't fill tiles, one step of inputs and several; outputs poisoned."""
    x, weight, bias = operands(rows, outs, inputs, dtype, seed)
    tile = Tile(4, 64, 2, 3) if rows == 1 else Tile(16, 64, 1, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        y = gemm(x, weight, bias if with_bias else None, tile)
    expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    assert y.dtype == dtype and (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize(("rows", "outs", "inputs"), [(1, 96, 1536), (1, 10, 2080), (5, 160, 192), (16, 70, 80)])
def test_the_tiles_that_are_shipped(rows, outs, inputs):
    x, weight, bias = operands(rows, outs, inputs, torch.bfloat16, 0)
    y = gemm(x, weight, bias, choose(rows, outs, inputs))
    expected = x.double() @ weight.double().T + bias.double()
    assert (y.double() - expected).norm() < 5e-3 * expected.norm()


def test_where_the_kernels_serve():
    x, weight, _ = operands(3, 40, 32, torch.bfloat16, 0)
    assert serves(x, weight) and serves(x.half(), weight.half()) and serves(x.repeat(5, 1), weight)
    assert not serves(x.repeat(6, 1), weight)  # 18 rows
    assert not serves(x[:0], weight) and not serves(x.float(), weight.float()) and not serves(x, weight.half())
    assert not serves(x[:, :24].contiguous(), weight[:, :24].contiguous())  # inputs that no copy of 16 bytes divides
    assert not serves(x[:, ::2], weight[:, :16].contiguous()) and not serves(x[:, :16].contiguous(), weight[:, :16])
    assert choose(1, 4096, 11008) and choose(16, 12288, 4096)
    assert choose(2, 4096, 11008) is None


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_other_modules_are_called(monkeypatch):
    x, weight, bias = operands(2, 40, 32, torch.bfloat16, 1)
    for kind, factor, seen in ((nn.Linear, 1, 1), (Doubling, 2, 0)):
        calls = []
        monkeypatch.setattr(skinny, "gemm", lambda *a, calls=calls: calls.append(a) or gemm(*a))
        module = kind(32, 40, dtype=torch.bfloat16)
        with torch.no_grad():
            module.weight.copy_(weight)
            module.bias.copy_(bias)
            y = linear(module, x)
            torch.testing.assert_close(y, factor * nn.functional.linear(x, weight, bias), rtol=2e-2, atol=5e-2)
        assert len(calls) == seen


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_of_a_bf16_model(tmp_path, batch, monkeypatch):
    """Four products in each of two layers, and the head; logits as with the modules' own products."""
    model = load_for_inference(save_llava(tmp_path / "plain"), dtype=torch.bfloat16)
    logits, calls = [], []
    monkeypatch.setattr("grace.kernels.decode_step.argmax", lambda given, *rest: logits.append(given))
    for choice in (choose, lambda *shape: None):
        monkeypatch.setattr(skinny, "choose", lambda *shape, choice=choice: calls.append(shape) or choice(*shape))
        session = Session(model, batch, 12, fused=True)
        session.token.copy_(torch.arange(5, 5 + batch)[:, None])
        session._step()
    assert len(calls) == 2 * (4 * 2 + 1) and all(rows == batch for rows, *_ in calls)
    assert 0 < (logits[0] - logits[1]).float().norm() < 0.03 * logits[1].float().norm()


def test_compiles_for_hopper():
    run_apart("skinny_gemm_compile.py")
