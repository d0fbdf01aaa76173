"""The information-bottleneck controller: a dual variable that holds the distillation loss to a budget."""

import math
from typing import Any

from grace.errors import GraceError


class InformationBottleneckController:
    """Weight `beta` of the distillation loss, driven once per optimiser step by projected dual ascent:

        EMA  <- loss at the first update, then decay EMA + (1 - decay) loss
        beta <- clip(beta + eta (EMA - tau), beta_min, beta_max)

    A loss above the budget tau raises beta, one below lowers it. The EMA starts at the first loss rather than at 0:
    from 0 it would read as far below the budget for about 1 / (1 - decay) steps and push beta to its floor.

    Args:
        tau: budget of the distillation loss, in the loss's own units
        eta: scale, > 0
        beta_init, beta_min, beta_max: start and bounds of beta
        ema_decay: share of the old average that is kept, in [0, 1)

    Raises:
        GraceError: the bounds are not ordered or an argument is out of its range.
    """

    def __init__(
        self, tau: float, eta: float, beta_init: float, beta_min: float, beta_max: float, ema_decay: float = 0.99
    ) -> None:
        if not beta_min <= beta_init <= beta_max:
            raise GraceError(f"beta_min <= beta_init <= beta_max does not hold for {beta_min}, {beta_init}, {beta_max}")
        if not (eta > 0 and 0 <= ema_decay < 1 and math.isfinite(tau)):
            raise GraceError(f"need eta > 0, 0 <= ema_decay < 1 and a finite tau, not {eta}, {ema_decay}, {tau}")
        self.tau, self.eta, self.ema_decay = tau, eta, ema_decay
        self.beta_min, self.beta_max = beta_min, beta_max
        self.beta = float(beta_init)
        self.ema: float | None = None

    def update(self, loss: float) -> float:
        """Take the global batch's mean loss (a number or a scalar tensor) and return the next step's beta.

        Raises:
            GraceError: the loss is not finite; the state is then as it was.
        """
        loss = float(loss)
        if not math.isfinite(loss):
            raise GraceError(f"the controller was given a loss of {loss}; skip the update or lower the learning rate")
        self.ema = loss if self.ema is None else self.ema_decay * self.ema + (1 - self.ema_decay) * loss
        self.beta = min(max(self.beta + self.eta * (self.ema - self.tau), self.beta_min), self.beta_max)
        return self.beta

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on: beta and the average (None before the first update)."""
        return {"beta": self.beta, "ema": self.ema}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            GraceError: the state is not one of this controller's, or its beta lies outside the bounds.
        """
        if set(state) != {"beta", "ema"}:
            raise GraceError(f"a controller's state has the keys beta and ema, not {sorted(state)}")
        if not self.beta_min <= state["beta"] <= self.beta_max:
            raise GraceError(
                f"the checkpoint's beta {state['beta']} lies outside [{self.beta_min}, {self.beta_max}]; resume with "
                "the bounds that it was trained with"
            )
        self.beta, self.ema = state["beta"], state["ema"]
