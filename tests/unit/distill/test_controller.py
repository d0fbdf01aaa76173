"""The information-bottleneck controller against a trace worked out by hand."""

import json

import pytest
import torch

from grace.distill import InformationBottleneckController
from grace.errors import GraceError


def controller(**changes):
    arguments = dict(tau=3.0, eta=0.1, beta_init=0.5, beta_min=0.1, beta_max=1.0, ema_decay=0.9)
    return InformationBottleneckController(**{**arguments, **changes})


def test_trace_by_hand():
    control = controller()
    assert control.beta == 0.5
    assert control.update(5.0) == pytest.approx(0.7)  # EMA 5: 0.5 + 0.1 (5 - 3)
    assert control.update(3.0) == pytest.approx(0.88)  # EMA 4.8: 0.7 + 0.18
    assert control.update(torch.tensor(1.0)) == pytest.approx(1.0)  # EMA 4.42: 1.022, clipped
    assert control.ema == pytest.approx(4.42)
    assert control.update(-60.0) == pytest.approx(0.4978)  # EMA -2.022: 1 - 0.5022


def test_bounds_hold_and_release():
    control = controller(ema_decay=0.0)
    assert [control.update(100.0) for _ in range(3)] == [1.0] * 3
    assert control.update(0.0) == pytest.approx(0.7)  # from the bound itself: nothing wound up while clipped
    assert [control.update(-100.0) for _ in range(2)] == [0.1] * 2
    assert control.update(4.0) == pytest.approx(0.2)


def test_default_decay():
    control = InformationBottleneckController(0.0, 1e-3, 0.5, 0.0, 1.0)
    control.update(1.0)
    control.update(2.0)
    assert control.ema == pytest.approx(1.01)


def test_resuming_continues_the_trace():
    losses = [4.0, 2.5, 3.5, 1.0, 6.0]
    whole, first, second = controller(), controller(), controller()
    trace = [whole.update(loss) for loss in losses]
    head = [first.update(loss) for loss in losses[:2]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + [second.update(loss) for loss in losses[2:]] == trace
    fresh = controller()
    fresh.load_state_dict(controller().state_dict())
    assert fresh.update(5.0) == pytest.approx(0.7)


def test_bad_inputs():
    for changes in ({"beta_init": 2.0}, {"beta_min": 0.6}, {"eta": 0.0}, {"ema_decay": 1.0}, {"tau": float("nan")}):
        with pytest.raises(GraceError):
            controller(**changes)
    control = controller()
    control.update(5.0)
    with pytest.raises(GraceError, match="a loss of nan"):
        control.update(float("nan"))
    assert control.state_dict() == {"beta": pytest.approx(0.7), "ema": 5.0}
    with pytest.raises(GraceError, match="keys beta and ema"):
        control.load_state_dict({"beta": 0.5})
    with pytest.raises(GraceError, match="lies outside"):
        control.load_state_dict({"beta": 5.0, "ema": None})
