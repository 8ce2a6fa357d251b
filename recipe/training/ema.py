"""The exponential moving average (EMA) of weights and buffers, used by validation and evaluation.

The decay warms up with the number of updates, min(decay, (1 + n) / (10 + n)). A fixed decay would keep the random
initial weights for many epochs. The form of torchvision copies the weights during the warm-up of the learning rate
instead.

Precise BN: averaged batch-norm statistics are not those that the averaged weights produce (Izmailov et al., arXiv
1803.05407, `update_bn` in torch). So they can be estimated on training images before every validation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recipe.config.schema import EmaConfig, EmaForm, OptimizationConfig
from recipe.data.batches import Batch, EvaluationRequest, Loader
from recipe.data.transforms import EvaluationTransform
from recipe.errors import UserError
from recipe.evaluation import Predict
from recipe.models.layers import DropPathBatchNorm2d
from recipe.run.records import Setting

PRECISE_BN_STREAM = 8  # keeps this choice of images apart from other draws


class ModelEma:
    """The EMA of a model. With a decay of 0 it is the model itself."""

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self.decay = config.decay
        self.every_steps = config.every_steps
        self.precise_bn_images = config.precise_bn_images
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
        return step % self.every_steps == 0

    def decay_now(self) -> float:
        """The weight of the old average in the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint. None if the EMA is off."""
        return {"updates": self.updates, "model": self.model.state_dict()} if self.is_on else None

    def restore(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.updates = state["updates"]
            self.model.load_state_dict(state["model"])

    def facts(self) -> dict[str, Setting]:
        if not self.is_on:
            return {"kind": "none"}
        facts: dict[str, Setting] = {
            "kind": "exponential moving average of parameters and buffers",
            "decay": self.decay,
            "warm_up": "min(decay, (1 + n) / (10 + n)) at update n",
            "every_steps": self.every_steps,
            "updates": self.updates,
        }
        if self.precise_bn_images:
            facts["batch_norm_recalibrated_on_training_images"] = self.precise_bn_images
        return facts


class TorchvisionEma(ModelEma):
    """The EMA of torchvision's references/classification, used to train `IMAGENET1K_V2`.

    The weight of the new model, 1 - decay, is multiplied by batch size x every_steps / epochs. Updates come after the
    first step of an epoch and every `every_steps` from there. During the warm-up, and at the first update after it, the
    average is a copy.
    """

    def __init__(self, model: nn.Module, config: OptimizationConfig, steps_per_epoch: int) -> None:
        super().__init__(model, config.ema)
        new_weight = (1 - self.decay) * config.batch_size * self.every_steps / config.epochs
        self.asked_decay, self.decay = self.decay, 1 - min(1.0, new_weight)
        self.steps_per_epoch, self.warmup_epochs = steps_per_epoch, config.warmup_epochs

    def update(self, step: int) -> None:
        """Move the average, or copy the weights while the learning rate warms up."""
        super().update(step)
        if (step - 1) // self.steps_per_epoch < self.warmup_epochs:
            self.updates = 0

    def is_due(self, step: int) -> bool:
        """Counted within the epoch, from its first step."""
        return (step - 1) % self.steps_per_epoch % self.every_steps == 0

    def decay_now(self) -> float:
        """The first update is a copy."""
        return self.decay if self.updates else 0.0

    def facts(self) -> dict[str, Setting]:
        if not self.is_on:
            return super().facts()
        start = f"copies while epoch < {self.warmup_epochs:g}, counted from 0, and at the first update after that"
        return super().facts() | {"warm_up": start, "decay_before_rescaling": self.asked_decay}


def build_ema(model: nn.Module, config: OptimizationConfig, steps_per_epoch: int) -> ModelEma:
    if config.ema.form is EmaForm.torchvision:
        return TorchvisionEma(model, config, steps_per_epoch)
    return ModelEma(model, config.ema)


def _tensors(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


# ---- precise BN --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreciseBnBatches:
    """`images` training images in the view of the evaluation, in batches of one size. Drops an incomplete batch.

    The choice of images depends on the seed alone, and only rank 0 reads them. The statistics are the same on any
    number of processes.
    """

    loader: Loader
    transform: EvaluationTransform
    batch_size: int
    images: int
    seed: int

    def __iter__(self) -> Iterator[Batch]:
        yield from self.loader.load(EvaluationRequest(indices, self.transform) for indices in self.parts())

    def parts(self) -> list[NDArray[np.int64]]:
        """The indices of each batch."""
        generator = np.random.default_rng((PRECISE_BN_STREAM, self.seed))
        chosen = generator.permutation(len(self.loader.split))[: self.images]
        size = min(self.batch_size, len(chosen))
        return list(chosen[: len(chosen) // size * size].reshape(-1, size))


def precise_bn(model: nn.Module, predict: Predict, batches: Iterable[Batch]) -> None:
    """Replace all running statistics by the mean of those of the batches, each batch with the same weight.

    `predict` runs `model` in evaluation mode: no dropout, no stochastic depth.
    """
    with _estimating(batch_norms(model)):
        for batch in batches:
            predict(batch.images)


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """All batch norms. Raises `UserError` for a network without one."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise UserError("optimization.ema.precise_bn_images must be 0 for a network without batch norm")
    return norms


@contextmanager
def _estimating(norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Norms drop their statistics and take the plain mean of the batches (torch's momentum of None)."""
    before = [(norm.momentum, getattr(norm, "drop_probability", 0.0)) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
        if isinstance(norm, DropPathBatchNorm2d):
            norm.drop_probability = 0.0
    try:
        yield
    finally:
        for norm, (momentum, drop_probability) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.eval()
            if isinstance(norm, DropPathBatchNorm2d):
                norm.drop_probability = drop_probability
