"""AdamW on fp32 masters, with quantisation once per optimiser step.

The model holds what its ordinary layers multiply with: weights on bf16's grid, dequantised where the recipe
quantises. The optimiser holds the fp32 masters and the scales' theta. Each micro-batch's gradient of the dequantised
weights is added to an fp32 sum as soon as it is made; once a step the LSQ rule is applied to the sum. The rule is
linear in that gradient, so this equals quantising in every micro-batch at a fraction of the cost.
"""

import math
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from grace.config.schema import Optimisation, Quantization
from grace.distributed import local, whole_rows
from grace.models import decoder_linears
from grace.quant import LearnedStepSize, lsq_gradients
from grace.train.checkpoint import Part
from grace.world import World


class MasterAdamW:
    """The optimiser of every recipe.

    Args:
        model: its trainable parameters are driven; any floating dtype, whole or sharded by rows.
        optimisation: learning rate, decay, clipping and schedule.
        bits: width of the decoder's linears; None leaves them in bf16.
        quantization: group size and the learning rate of the scales.
        world: the processes that share the work.

    Raises:
        GraceError: a group does not divide a layer's input (the message names the layer).
    """

    def __init__(
        self, model: nn.Module, optimisation: Optimisation, bits: int | None, quantization: Quantization, world: World
    ) -> None:
        self.optimisation, self.bits, self.world = optimisation, bits, world
        self.group_size = quantization.group_size
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: local(p).detach().float().clone() for name, p in self.parameters.items()}
        self.hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._accumulate, self.masters[name]))
            for name, parameter in self.parameters.items()
        ]
        self.step_sizes: dict[str, LearnedStepSize] = {}
        if bits is not None:
            for name in decoder_linears(model):
                master = self.masters[f"{name}.weight"]
                self.step_sizes[f"{name}.weight"] = LearnedStepSize.from_weight(master, bits, self.group_size, name)
        matrices = [m for m in self.masters.values() if m.ndim > 1]
        vectors = [m for m in self.masters.values() if m.ndim <= 1]
        thetas = [size.theta for size in self.step_sizes.values()]
        rate = optimisation.learning_rate
        groups = [
            {"params": matrices, "weight_decay": optimisation.weight_decay, "peak": rate},
            {"params": vectors, "weight_decay": 0.0, "peak": rate},
            {"params": thetas, "weight_decay": 0.0, "peak": rate * quantization.scale_lr_factor},
        ]
        betas = (0.9, optimisation.adam_beta2)
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=betas, fused=True)
        self.write_back()

    @torch.no_grad()
    def write_back(self) -> None:
        """Put the masters, rounded to bf16 or fake-quantised, into the model."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            size = self.step_sizes.get(name)
            held = local(parameter)
            if size is not None:
                size.write(master, held)
            else:
                held.copy_(master if held.dtype == torch.bfloat16 else master.to(torch.bfloat16))

    def remove_hooks(self) -> None:
        """Leave the model's gradients to another optimiser."""
        for hook in self.hooks:
            hook.remove()

    @staticmethod
    def _accumulate(master: torch.Tensor, parameter: nn.Parameter) -> None:
        """Add a micro-batch's gradient, in whatever dtype, to the master's in fp32; autograd keeps nothing."""
        assert parameter.grad is not None, "called once the gradient is accumulated"
        gradient = local(parameter.grad)
        master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    def learning_rate(self, step: int) -> float:
        """Share of the peak learning rate at `step` (from 0): linear warm-up, then a cosine to zero."""
        warmup = max(1, round(self.optimisation.warmup * self.optimisation.total))
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, self.optimisation.total - warmup)
        return 0.5 * (1 + math.cos(math.pi * done))

    def _take_gradients(self) -> torch.Tensor:
        """Make the summed gradients those of masters and thetas; return their global norm."""
        whole, parts = [], []  # gradients that every process has in full, and those of which each has its rows
        for name, parameter in self.parameters.items():
            master, size = self.masters[name], self.step_sizes.get(name)
            sharded = isinstance(parameter, DTensor)
            gradient = torch.zeros_like(master) if master.grad is None else master.grad
            mine = parts if sharded else whole
            if size is not None:
                gradient, size.theta.grad = lsq_gradients(
                    master, size.theta, gradient, size.bits, self.group_size, overwrite=True
                )
                mine.append(size.theta.grad)
            master.grad = gradient
            if self.world.size > 1 and not sharded:
                dist.all_reduce(master.grad)
            mine.append(master.grad)
        squares = nn.utils.get_total_norm(parts).square() if parts else torch.zeros((), device=self.world.device)
        if self.world.size > 1:
            dist.all_reduce(squares)
        return (squares + nn.utils.get_total_norm(whole).square()).double().sqrt().float()

    @torch.no_grad()
    def step(self, step: int) -> float:
        """Apply the accumulated gradients as optimiser step `step`; return their norm before clipping.

        Where the norm is not finite nothing is applied, and the gradients are dropped.
        """
        norm = self._take_gradients()
        if math.isfinite(norm):
            trained = [p for group in self.adam.param_groups for p in group["params"]]
            nn.utils.clip_grads_with_norm_(trained, self.optimisation.clip, norm)
            share = self.learning_rate(step)
            for group in self.adam.param_groups:
                group["lr"] = group["peak"] * share
            self.adam.step()
            self.write_back()
        self.adam.zero_grad()
        return float(norm)

    def drop_gradients(self) -> None:
        """Forget what the micro-batches have accumulated."""
        for name, parameter in self.parameters.items():
            parameter.grad = self.masters[name].grad = None

    def quantised(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Codes (int8) and scales (bf16) of every quantised linear, by module name, as they ship."""
        layers = {}
        for name, size in self.step_sizes.items():
            parts = size.codes(self.masters[name]), size.scales
            codes, scales = (whole_rows(part, self.parameters[name]).cpu() for part in parts)
            layers[name.removesuffix(".weight")] = (codes, scales)
        return layers

    @property
    def applied(self) -> int:
        """Steps that Adam has taken."""
        return max((int(state["step"]) for state in self.adam.state.values()), default=0)

    def parts(self) -> dict[str, Part]:
        """Masters, thetas and Adam's moments of this process: with `applied`, all that a resumed run needs."""
        parts = {}
        for name, parameter in self.parameters.items():
            rows = len(parameter) if isinstance(parameter, DTensor) else None
            trained = {f"master.{name}": self.masters[name]}
            if name in self.step_sizes:
                trained[f"theta.{name}"] = self.step_sizes[name].theta
            for key, tensor in trained.items():
                state = self.adam.state[tensor]
                if not state:  # as Adam makes it in its first step
                    state["step"] = torch.zeros((), device=tensor.device)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
                parts[key] = Part(tensor.detach(), rows)
                parts |= {f"{moment}.{key}": Part(state[moment], rows) for moment in ("exp_avg", "exp_avg_sq")}
        return parts

    @torch.no_grad()
    def resume(self, applied: int) -> None:
        """Go on from values that were put into `parts()`, after so many steps of Adam; the model's weights follow."""
        for state in self.adam.state.values():
            state["step"].fill_(applied)
        self.write_back()
