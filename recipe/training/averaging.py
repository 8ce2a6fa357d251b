"""An exponential moving average of weights and buffers, which is then what validation and evaluation see.

The decay grows with the number of updates, min(decay, (1 + n) / (10 + n)), since a fixed one would keep the random
initial weights for many epochs. torchvision's form copies the weights during the warm-up of the learning rate instead.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from recipe.config.schema import AveragingConfig, AveragingForm, OptimizationConfig
from recipe.records import Setting


class WeightAverage:
    """Follows a model from the outside; with a decay of 0 it is the model itself."""

    def __init__(self, model: nn.Module, config: AveragingConfig) -> None:
        self.decay = config.decay
        self.every_steps = config.every_steps
        self.recalibrate_images = config.recalibrate_images
        self.updates = 0
        self.is_on = config.decay > 0
        self.followed = model
        self.model = copy.deepcopy(model).requires_grad_(False) if self.is_on else model

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the model after optimizer step `step` (counted from 1), at every `every_steps`-th."""
        if not self.is_on or not self.is_due(step):
            return
        decay = self.decay_now()
        self.updates += 1
        averages, currents = _tensors(self.model), _tensors(self.followed)
        floating = [pair for pair in zip(averages, currents, strict=True) if pair[0].is_floating_point()]
        torch._foreach_lerp_([average for average, _ in floating], [current for _, current in floating], 1 - decay)
        for average, current in zip(averages, currents, strict=True):
            if not average.is_floating_point():
                average.copy_(current)

    def is_due(self, step: int) -> bool:
        """Whether the average moves after this step."""
        return step % self.every_steps == 0

    def decay_now(self) -> float:
        """What the next update keeps of the average."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    def state(self) -> dict[str, Any] | None:
        """What a continuation needs, or None when off."""
        return {"updates": self.updates, "model": self.model.state_dict()} if self.is_on else None

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from `state()`."""
        if state is not None:
            self.updates = state["updates"]
            self.model.load_state_dict(state["model"])

    def facts(self) -> dict[str, Setting]:
        """What this object does, for the record."""
        if not self.is_on:
            return {"kind": "none"}
        facts: dict[str, Setting] = {
            "kind": "exponential moving average of parameters and buffers",
            "decay": self.decay,
            "warm_up": "min(decay, (1 + n) / (10 + n)) at update n",
            "every_steps": self.every_steps,
            "updates": self.updates,
        }
        if self.recalibrate_images:
            facts["batch_norm_recalibrated_on_training_images"] = self.recalibrate_images
        return facts


class TorchvisionAverage(WeightAverage):
    """As references/classification of torchvision has it, which trained `IMAGENET1K_V2`.

    What is taken of the new weights, 1 - decay, is multiplied by batch size x every_steps / epochs; updates come after
    the first step of an epoch and every `every_steps` from there; during the warm-up, and at the first update behind
    it, the average is a copy.
    """

    def __init__(self, model: nn.Module, config: OptimizationConfig, steps_per_epoch: int) -> None:
        super().__init__(model, config.averaging)
        taken = (1 - self.decay) * config.batch_size * self.every_steps / config.epochs
        self.asked_decay, self.decay = self.decay, 1 - min(1.0, taken)
        self.steps_per_epoch, self.warmup_epochs = steps_per_epoch, config.warmup_epochs

    def update(self, step: int) -> None:
        """Move, and begin anew with a copy as long as the learning rate warms up."""
        super().update(step)
        if (step - 1) // self.steps_per_epoch < self.warmup_epochs:
            self.updates = 0

    def is_due(self, step: int) -> bool:
        """Counted within the epoch, from its first step."""
        return (step - 1) % self.steps_per_epoch % self.every_steps == 0

    def decay_now(self) -> float:
        """Nothing is kept at the first update."""
        return self.decay if self.updates else 0.0

    def facts(self) -> dict[str, Setting]:
        """With the decay that is applied and the one that was asked for."""
        if not self.is_on:
            return super().facts()
        start = f"copies while epoch < {self.warmup_epochs:g}, counted from 0, and at the first update behind it"
        return super().facts() | {"warm_up": start, "decay_before_rescaling": self.asked_decay}


def build_average(model: nn.Module, config: OptimizationConfig, steps_per_epoch: int) -> WeightAverage:
    """The average that the configuration asks for, which may be the model itself."""
    if config.averaging.form is AveragingForm.torchvision:
        return TorchvisionAverage(model, config, steps_per_epoch)
    return WeightAverage(model, config.averaging)


def _tensors(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())
