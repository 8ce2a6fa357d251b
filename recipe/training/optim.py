"""Losses, optimizers and the learning rate.

Losses: cross entropy, or binary cross entropy for each class. Both take labels [N] or soft targets [N, classes] (mixed
images), and smooth either kind here and nowhere else: (1 - s) x target + s / classes.
Optimizers: SGD, SGD with decoupled weight decay, LAMB.
Learning rate: a pure function of the step, so there is nothing to save and nothing to forget at a restart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from recipe.config.schema import LossKind, OptimizationConfig, OptimizerKind, ScheduleKind
from recipe.errors import UserError
from recipe.models.build import NORMS
from recipe.run.records import ParameterGroup, Schedule, Setting

NO_SETTINGS = ("params", "name", "lr", "initial_lr", "step")  # the learning rate is left to the schedule
RECORDED_POINTS = 100

# ---- losses ------------------------------------------------------------------------------------------


class BinaryCrossEntropy(nn.Module):
    """Logits [N, classes] and labels [N] or targets [N, classes] -> a scalar.

    The mean over images *and* classes, as in ResNet strikes back (Wightman et al., arXiv 2110.00476). With
    `sum_classes`, as in Mosaic, the loss is `classes` times as large, and SGD needs a learning rate as many times
    smaller.
    """

    def __init__(self, label_smoothing: float, sum_classes: bool, target_threshold: float | None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.sum_classes = sum_classes
        self.target_threshold = target_threshold

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Apply the threshold before the smoothing: timm applies it after, and so undoes the smoothing."""
        classes = logits.shape[1]
        wide = logits if logits.dtype is torch.float64 else logits.float()
        wanted = functional.one_hot(targets, classes) if targets.dim() == 1 else targets
        if self.target_threshold is not None:
            wanted = wanted > self.target_threshold
        smoothed = wanted.to(wide.dtype) * (1 - self.label_smoothing) + self.label_smoothing / classes
        loss = functional.binary_cross_entropy_with_logits(wide, smoothed)
        return loss * classes if self.sum_classes else loss


Loss = nn.CrossEntropyLoss | BinaryCrossEntropy


def build_loss(config: OptimizationConfig) -> Loss:
    if config.loss is LossKind.cross_entropy:
        return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    return BinaryCrossEntropy(config.label_smoothing, config.bce.sum_classes, config.bce.target_threshold)


def loss_facts(loss: Loss) -> dict[str, Setting]:
    facts: dict[str, Setting] = {"class": type(loss).__name__, "label_smoothing": loss.label_smoothing}
    if isinstance(loss, nn.CrossEntropyLoss):
        return facts | {"reduction": loss.reduction}
    reduction = "sum over classes, mean over images" if loss.sum_classes else "mean over images and classes"
    return facts | {"reduction": reduction, "target_threshold": loss.target_threshold}


# ---- optimizers --------------------------------------------------------------------------------------


def parameters_by_kind(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(weights, norms and biases), distinguished by the type of their module: names such as `downsample.1` mislead."""
    weights: list[nn.Parameter] = []
    norms_and_biases: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_exempt = isinstance(module, NORMS) or name.endswith("bias")
            (norms_and_biases if is_exempt else weights).append(parameter)
    return weights, norms_and_biases


def build_optimizer(config: OptimizationConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Weight decay leaves norms and biases out unless `decay_norms_and_biases` is set."""
    weights, norms_and_biases = parameters_by_kind(model)
    exempt_decay = config.weight_decay if config.decay_norms_and_biases else 0.0
    named = [("weights", weights, config.weight_decay), ("norms and biases", norms_and_biases, exempt_decay)]
    decay_key = "decoupled_weight_decay" if config.optimizer is OptimizerKind.sgdw else "weight_decay"
    groups = [{"name": name, "params": params, decay_key: decay} for name, params, decay in named if params]
    if config.optimizer is OptimizerKind.lamb:
        return _lamb(groups, config)
    if config.optimizer is OptimizerKind.sgdw:
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

    The decay then follows the schedule, but not the size of the learning rate (Loshchilov and Hutter, arXiv
    1711.05101). Never fused: the gradient scaler leaves it to a fused SGD to skip an overflow, after the decay.
    """

    def __init__(self, groups: list[dict[str, Any]], learning_rate: float, momentum: float, nesterov: bool) -> None:
        groups = [group | {"full_learning_rate": learning_rate} for group in groups]
        super().__init__(groups, lr=learning_rate, momentum=momentum, nesterov=nesterov, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            kept = 1 - group["decoupled_weight_decay"] * group["lr"] / group["full_learning_rate"]
            if moved and kept != 1:
                torch._foreach_mul_(moved, kept)
        return super().step(closure)


def _lamb(groups: list[dict[str, Any]], config: OptimizationConfig) -> torch.optim.Optimizer:
    """LAMB of timm, as in ResNet strikes back. Clips the norm of the gradient of all parameters to 1."""
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
    """The live parameter groups, without values that change from step to step."""
    return [
        ParameterGroup(
            name=group["name"],
            tensors=len(group["params"]),
            parameters=sum(parameter.numel() for parameter in group["params"]),
            settings={
                key: list(value) if isinstance(value, tuple) else value  # as JSON has it
                for key, value in group.items()
                if key not in NO_SETTINGS
            },
        )
        for group in optimizer.param_groups
    ]


# ---- the learning rate -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to `peak`, then a cosine or a line to zero, or falls by `step_factor` after `step_epochs`.

    It changes at every optimizer step, the warm-up included: a rate that changes once an epoch makes a staircase of it.
    """

    peak: float
    kind: ScheduleKind
    steps: int
    steps_per_epoch: int
    warmup_steps: int
    warmup_start_factor: float
    step_epochs: tuple[int, ...]
    step_factor: float

    def __call__(self, step: int) -> float:
        """The rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            start = self.warmup_start_factor
            return self.peak * (start + (1 - start) * step / self.warmup_steps)
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.kind is ScheduleKind.cosine:
            return self.peak * 0.5 * (1 + math.cos(math.pi * progress))
        if self.kind is ScheduleKind.linear:
            return self.peak * (1 - progress)
        falls = sum(step >= epoch * self.steps_per_epoch for epoch in self.step_epochs)
        return self.peak * self.step_factor**falls

    def facts(self) -> Schedule:
        """The rate at evenly spaced steps, the first, the last, the end of the warm-up and both sides of each fall."""
        count = min(RECORDED_POINTS, self.steps)
        chosen = {round(place * (self.steps - 1) / max(1, count - 1)) for place in range(count)}
        chosen |= {step for step in (self.warmup_steps, *self._falls()) if step < self.steps}
        return Schedule(
            steps=self.steps,
            steps_per_epoch=self.steps_per_epoch,
            warmup_steps=self.warmup_steps,
            points=[(step, self(step)) for step in sorted(chosen)],
        )

    def _falls(self) -> list[int]:
        """The steps on either side of each fall."""
        if self.kind is not ScheduleKind.step:
            return []
        sides = (epoch * self.steps_per_epoch + side for epoch in self.step_epochs for side in (-1, 0))
        return [step for step in sides if step >= 0]


def build_schedule(config: OptimizationConfig, steps_per_epoch: int) -> LearningRate:
    return LearningRate(
        peak=config.learning_rate,
        kind=config.schedule,
        steps=config.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        warmup_start_factor=config.warmup_start_factor,
        step_epochs=tuple(config.step_epochs),
        step_factor=config.step_factor,
    )
