"""The method: gated decoupled distillation, relational CKA and the information-bottleneck controller."""

from grace.distill.check import check_inputs
from grace.distill.controller import InformationBottleneckController
from grace.distill.from_hidden import distillation_loss_from_hidden
from grace.distill.gated_dkd import confidence_gate, gated_dkd, gated_dkd_sum, gated_dkd_terms
from grace.distill.objectives import TokenLoss, load_objective, objective_names
from grace.distill.relational_cka import relational_cka, relational_cka_from_gram, relational_cka_sum

__all__ = [
    "InformationBottleneckController",
    "TokenLoss",
    "check_inputs",
    "confidence_gate",
    "distillation_loss_from_hidden",
    "gated_dkd",
    "gated_dkd_sum",
    "gated_dkd_terms",
    "load_objective",
    "objective_names",
    "relational_cka",
    "relational_cka_from_gram",
    "relational_cka_sum",
]
