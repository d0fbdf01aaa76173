"""Marks a hand-written gradient that has no derivative of its own."""

from collections.abc import Callable
from functools import wraps

import torch

from grace.errors import GraceError


def first_order(backward: Callable) -> Callable:
    """For the `backward` of an autograd function: refuses `create_graph`, where its result would count as a constant.

    torch's `once_differentiable` notices only where the incoming gradient depends on something.
    """

    @wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():
            raise GraceError("this loss has a first derivative alone; call backward or grad without create_graph")
        return backward(ctx, *gradients)

    return checked
