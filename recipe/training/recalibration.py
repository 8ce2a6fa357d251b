"""Batch-norm statistics of averaged weights, estimated anew on training images before every validation.

The average of running statistics is not what the averaged weights produce (Izmailov et al., arXiv 1803.05407, whose
`update_bn` torch has). The images are a choice of (seed) alone, seen as the evaluation sees its own, and the first
process goes through them by itself: the statistics are the same on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from recipe.alterations import BranchEnd
from recipe.data.loading import Batch, Decoding, evaluation_orders
from recipe.data.transforms import EvaluationTransform
from recipe.errors import UserError
from recipe.evaluation import Predict

RECALIBRATION_STREAM = 8  # keeps this choice of images apart from other draws


@dataclass(frozen=True)
class RecalibrationBatches:
    """`images` training images in batches of one size, an incomplete last one left out."""

    threads: Decoding
    transform: EvaluationTransform
    batch_size: int
    images: int
    seed: int

    def __iter__(self) -> Iterator[Batch]:
        yield from self.threads.batches(evaluation_orders(self.parts(), self.transform))

    def parts(self) -> list[NDArray[np.int64]]:
        """The indices of each batch."""
        generator = np.random.default_rng((RECALIBRATION_STREAM, self.seed))
        chosen = generator.permutation(len(self.threads.split))[: self.images]
        size = min(self.batch_size, len(chosen))
        return list(chosen[: len(chosen) // size * size].reshape(-1, size))


def recalibrate(model: nn.Module, predict: Predict, batches: Iterable[Batch]) -> None:
    """Replace all running statistics by the mean of those of the batches, each batch counted alike.

    `predict` runs `model`, which is in evaluation mode and stays there: no dropout, no stochastic depth.
    """
    with _estimating(batch_norms(model)):
        for batch in batches:
            predict(batch.images)


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The norms that can be recalibrated; raises `UserError` where there is none."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise UserError("optimization.averaging.recalibrate_images must be 0 for a network without batch norm")
    return norms


@contextmanager
def _estimating(norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Norms forget their statistics and take the plain mean of what they see (torch's momentum of None)."""
    before = [(norm.momentum, getattr(norm, "drop_probability", 0.0)) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
        if isinstance(norm, BranchEnd):
            norm.drop_probability = 0.0
    try:
        yield
    finally:
        for norm, (momentum, drop_probability) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.eval()
            if isinstance(norm, BranchEnd):
                norm.drop_probability = drop_probability
