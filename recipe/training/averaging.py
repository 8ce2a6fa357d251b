"""An exponential moving average of weights and buffers, which is then what validation and evaluation see.

The decay grows with the number of updates, min(decay, (1 + n) / (10 + n)), since a fixed one would keep the random
initial weights for many epochs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from recipe.config import AveragingConfig
from recipe.records import Setting


class WeightAverage:
    """Follows a model from the outside; with a decay of 0 it is the model itself."""

    def __init__(self, model: nn.Module, config: AveragingConfig) -> None:
        self.decay = config.decay
        self.every_steps = config.every_steps
        self.updates = 0
        self.is_on = config.decay > 0
        self.followed = model
        self.model = copy.deepcopy(model).requires_grad_(False) if self.is_on else model

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the model after optimizer step `step` (counted from 1), at every `every_steps`-th."""
        if not self.is_on or step % self.every_steps:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averages, currents = _tensors(self.model), _tensors(self.followed)
        floating = [pair for pair in zip(averages, currents, strict=True) if pair[0].is_floating_point()]
        torch._foreach_lerp_([average for average, _ in floating], [current for _, current in floating], 1 - decay)
        for average, current in zip(averages, currents, strict=True):
            if not average.is_floating_point():
                average.copy_(current)

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
        return {
            "kind": "exponential moving average of parameters and buffers",
            "decay": self.decay,
            "warm_up": "min(decay, (1 + n) / (10 + n)) at update n",
            "every_steps": self.every_steps,
            "updates": self.updates,
        }


def _tensors(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())
