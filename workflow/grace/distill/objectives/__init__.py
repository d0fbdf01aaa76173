"""Distillation objectives, one file each: `NAME.py` defines the function `NAME`, and a recipe's `kd: NAME` trains with
it.

    NAME(student_logits, teacher_logits, labels, *, ...) -> losses

    student_logits, teacher_logits   [tokens, vocab], fp32 or fp64; the teacher's carry no gradient
    labels                           int64 [tokens], in [0, vocab)
    losses                           [tokens], differentiable by autograd in the student's logits

Token i's loss depends on row i alone: training calls the function on chunks of rows and adds up, so that the result
does not depend on how a batch is cut (tests/unit/distill/test_objectives.py checks every file for it). The keyword
arguments say what else the function takes:

    temperature, alpha, beta_dkd     the config's `method` has them
    gates                            [tokens], exp(-H / log V) of the teacher; the losses' sum is then divided by the
                                     sum of gates of the global batch, otherwise by its number of tokens
    anything else with a default     a constant of the objective's own, which a recipe sets under `constants`
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from grace.config.objectives import objective_names
from grace.errors import GraceError


@dataclass(frozen=True)
class TokenLoss:
    """An objective with its constants.

    Attributes:
        name: of its file and function.
        function: as the package's docstring describes.
        constants: keyword arguments by name.
        gated: whether the function takes gates, and its sum is divided by theirs.
    """

    name: str
    function: Callable[..., Tensor]
    constants: Mapping[str, float]
    gated: bool

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, gates: Tensor | None = None
    ) -> Tensor:
        """Losses [tokens]; `gates` [tokens] are needed where `gated`."""
        extra = {"gates": gates} if self.gated else {}
        losses = self.function(student_logits, teacher_logits.detach(), labels, **self.constants, **extra)
        if losses.shape != labels.shape or not losses.requires_grad:
            raise GraceError(
                f"objective `{self.name}` must return one loss per token, [{len(labels)}], differentiable in the "
                f"student's logits; it returned {list(losses.shape)}"
                + ("" if losses.requires_grad else " without a gradient")
            )
        return losses


def load_objective(name: str, constants: Mapping[str, Any]) -> TokenLoss:
    """The objective of the file `name`, with those of `constants` that its function takes.

    Raises:
        GraceError: there is no such file, or it lacks the function, or the function needs a constant that is not given.
    """
    if name not in objective_names():
        raise GraceError(f"no objective `{name}`; there are {', '.join(objective_names())}")
    function = getattr(importlib.import_module(f"{__name__}.{name}"), name, None)
    if function is None:
        raise GraceError(f"distill/objectives/{name}.py defines no function `{name}`; name it like its file")
    keywords = {key: p for key, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    given = {key: constants[key] for key in keywords if key in constants}
    missing = [key for key, p in keywords.items() if p.default is p.empty and key not in given and key != "gates"]
    if missing:
        raise GraceError(f"objective `{name}` needs `{missing[0]}`; give it, or give the function a default")
    return TokenLoss(name, function, given, "gates" in keywords)
