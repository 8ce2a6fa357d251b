"""Parameter groups and optimizers: SGD, SGD whose weight decay is decoupled from the learning rate, and LAMB."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recipe.config.schema import OptimizationConfig, OptimizerKind
from recipe.errors import UserError
from recipe.model import NORMS
from recipe.records import ParameterGroup, Setting

NO_SETTINGS = ("params", "name", "lr", "initial_lr", "step")  # the learning rate is left to the schedule


def parameters_by_kind(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(weights, norms and biases), told apart by the type of their module: names such as `downsample.1` mislead."""
    weights: list[nn.Parameter] = []
    norms_and_biases: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_exempt = isinstance(module, NORMS) or name.endswith("bias")
            (norms_and_biases if is_exempt else weights).append(parameter)
    return weights, norms_and_biases


def build_optimizer(config: OptimizationConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer; weight decay leaves norms and biases out unless asked otherwise."""
    weights, norms_and_biases = parameters_by_kind(model)
    exempt_decay = config.weight_decay if config.decay_norms_and_biases else 0.0
    named = [("weights", weights, config.weight_decay), ("norms and biases", norms_and_biases, exempt_decay)]
    decay_key = "decoupled_weight_decay" if config.optimizer is OptimizerKind.sgd_decoupled else "weight_decay"
    groups = [{"name": name, "params": found, decay_key: decay} for name, found, decay in named if found]
    if config.optimizer is OptimizerKind.lamb:
        return _lamb(groups, config)
    if config.optimizer is OptimizerKind.sgd_decoupled:
        return DecoupledSGD(groups, config.learning_rate, config.momentum, config.nesterov)
    return torch.optim.SGD(
        groups,
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=device.type == "cuda",
    )


class DecoupledSGD(torch.optim.SGD):
    """SGD that shrinks each weight by decay x rate / full rate before its step, as Mosaic's DecoupledSGDW.

    The decay is then a number of its own: it follows the schedule, but not the size of the learning rate (Loshchilov
    and Hutter, arXiv 1711.05101). Never fused: the gradient scaler leaves it to a fused SGD to skip an overflow,
    and the decay would have happened by then.
    """

    def __init__(self, groups: list[dict[str, Any]], learning_rate: float, momentum: float, nesterov: bool) -> None:
        groups = [group | {"full_learning_rate": learning_rate} for group in groups]
        super().__init__(groups, lr=learning_rate, momentum=momentum, nesterov=nesterov, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Decay, then SGD's own step."""
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            kept = 1 - group["decoupled_weight_decay"] * group["lr"] / group["full_learning_rate"]
            if moved and kept != 1:
                torch._foreach_mul_(moved, kept)
        return super().step(closure)


def _lamb(groups: list[dict[str, Any]], config: OptimizationConfig) -> torch.optim.Optimizer:
    """timm's, which trained ResNet strikes back: it clips the whole gradient to norm 1 inside its step."""
    try:
        from timm.optim.lamb import Lamb  # here: an optional dependency
    except ImportError as error:
        raise UserError(
            "optimization.optimizer=lamb needs a package that is not installed: "
            "`.venv/bin/python -m pip install --constraint constraints.txt --editable '.[lamb]'`, or use sgd"
        ) from error
    optimizer: torch.optim.Optimizer = Lamb(
        groups, lr=config.learning_rate, betas=(config.momentum, 0.999), eps=1e-6, max_grad_norm=1.0
    )
    return optimizer


def optimizer_facts(optimizer: torch.optim.Optimizer) -> list[ParameterGroup]:
    """The live parameter groups."""
    return [
        ParameterGroup(
            name=group["name"],
            tensors=len(group["params"]),
            parameters=sum(parameter.numel() for parameter in group["params"]),
            settings=_settings(group),
        )
        for group in optimizer.param_groups
    ]


def _settings(group: dict[str, Any]) -> dict[str, Setting]:
    """A group without its tensors, its name and what moves from step to step, as JSON has it."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in group.items()
        if key not in NO_SETTINGS
    }
