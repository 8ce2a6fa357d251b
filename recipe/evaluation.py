"""The evaluator of training, `evaluate.py` and exported models: one prediction for every image, counted in integers.

`evaluate` takes any function from images to logits. It pads nothing and runs no collective operation. `collect` sorts
the predictions of all processes by image, so sums do not depend on the number of processes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from recipe.config.schema import Precision
from recipe.data.batches import Batch
from recipe.data.transforms import EvaluationTransform, Normalisation
from recipe.distributed import World
from recipe.errors import NonFiniteError
from recipe.run.records import ClassCounts

Predict = Callable[[Tensor], Tensor]  # uint8 [N, 3, H, W] -> float32 logits [N, classes]
AUTOCAST_TYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


@dataclass(frozen=True)
class Predictions:
    """Predictions for N images. All arrays have N rows."""

    indices: NDArray[np.int64]  # position in the split
    labels: NDArray[np.int64]
    top: NDArray[np.int64]  # [N, 5], best first (fewer columns where there are fewer classes)
    margins: NDArray[np.float32]  # best logit less the second best
    losses: NDArray[np.float64]  # cross entropy, without label smoothing

    @property
    def images(self) -> int:
        return len(self.indices)

    def correct(self, within: int) -> NDArray[np.bool_]:
        """bool [N]: the label is among the best `within` classes."""
        hits: NDArray[np.bool_] = (self.top[:, :within] == self.labels[:, None]).any(axis=1)
        return hits

    @property
    def loss(self) -> float:
        return float(self.losses.sum() / self.images)

    def accuracy(self, within: int) -> float:
        """Share of images whose label is among the best `within` classes."""
        return int(self.correct(within).sum()) / self.images


class FlipAverage:
    """The mean of the logits of an image and of its mirror image, which costs twice the time."""

    def __init__(self, predict: Predict) -> None:
        self.predict = predict

    def __call__(self, images: Tensor) -> Tensor:
        return (self.predict(images) + self.predict(images.flip(-1))) / 2


def view_name(transform: EvaluationTransform, flip: bool) -> str:
    """The part of a protocol's name for the evaluation view."""
    return transform.name + ("-flip" if flip else "")


def protocol_name(view: str, is_average: bool, checkpoint: str = "last") -> str:
    """The name of a metric's protocol: view, weights and checkpoint. The last checkpoint is not named."""
    return view + ("-average" if is_average else "") + ("" if checkpoint == "last" else f"-{checkpoint}")


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The arithmetic of a forward pass."""
    if precision is Precision.fp32:
        return nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST_TYPES[precision])


def predictor(
    model: nn.Module,
    normalisation: Normalisation,
    precision: Precision,
    device: torch.device,
    channels_last: bool,
    flip: bool = False,
) -> Predict:
    """A function from uint8 images to logits, with the model in evaluation mode. `flip` averages with mirror images."""
    model.eval()
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def predict(images: Tensor) -> Tensor:
        images = images.to(device, non_blocking=True, memory_format=layout)
        with torch.inference_mode(), autocast(precision, device):
            logits: Tensor = model(normalisation(images))
        return logits.float()

    return FlipAverage(predict) if flip else predict


def evaluate(predict: Predict, batches: Iterable[Batch]) -> Predictions:
    """Predict every batch of this process, without a collective operation."""
    return concatenate([predictions_of(predict(batch.images), batch) for batch in batches])


def predictions_of(logits: Tensor, batch: Batch) -> Predictions:
    """The predictions from the logits of one batch, [N, classes]."""
    labels = batch.labels.to(logits.device)
    values, classes = logits.topk(min(5, logits.shape[1]), dim=1)
    losses = functional.cross_entropy(logits, labels, reduction="none")
    margins = values[:, 0] - values[:, 1] if values.shape[1] > 1 else torch.zeros_like(values[:, 0])
    return Predictions(
        batch.indices.numpy(),
        batch.labels.numpy(),
        classes.cpu().numpy(),
        margins.cpu().numpy(),
        losses.double().cpu().numpy(),
    )


def concatenate(parts: list[Predictions]) -> Predictions:
    """All rows in the order of the split."""
    if not parts:
        return Predictions(
            np.empty(0, np.int64),
            np.empty(0, np.int64),
            np.empty((0, 0), np.int64),
            np.empty(0, np.float32),
            np.empty(0, np.float64),
        )
    order = np.argsort(np.concatenate([part.indices for part in parts]), kind="stable")
    return Predictions(
        *(np.concatenate([getattr(part, field.name) for part in parts])[order] for field in fields(Predictions))
    )


def collect(predictions: Predictions, world: World, images: int) -> Predictions | None:
    """The predictions of all processes on rank 0, None elsewhere. Asserts that every image occurs exactly once."""
    gathered = world.gather(predictions)
    if gathered is None:
        return None
    merged = concatenate([part for part in gathered if part.images])
    assert np.array_equal(merged.indices, np.arange(images)), "an image was left out or counted twice"
    return merged


def check_finite(predictions: Predictions, where: str) -> None:
    """Raise `NonFiniteError` if a loss or margin is not finite."""
    finite = np.isfinite(predictions.losses) & np.isfinite(predictions.margins)
    if not finite.all():
        raise NonFiniteError(
            f"{where} gives logits that are not finite for {int((~finite).sum())} of {predictions.images} images: its "
            "accuracy means nothing, and nothing was written"
        )


def class_table(predictions: Predictions, classes: list[tuple[str, str]]) -> list[ClassCounts]:
    """Counts for each class, given as (id, name)."""

    def per_class(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(rows, minlength=len(classes))

    images = per_class(predictions.labels)
    top1, top5 = (per_class(predictions.labels[predictions.correct(within)]) for within in (1, 5))
    return [
        ClassCounts(
            index=index,
            class_id=class_id,
            name=name,
            images=int(images[index]),
            correct_top1=int(top1[index]),
            correct_top5=int(top5[index]),
        )
        for index, (class_id, name) in enumerate(classes)
    ]


def predictions_file(predictions: Predictions, keys: list[str]) -> bytes:
    """The bytes of `predictions/<protocol>.npz`: image key, label, best classes and margin of every image."""
    buffer = io.BytesIO()
    np.savez(buffer, key=np.array(keys), label=predictions.labels, top5=predictions.top, margin=predictions.margins)
    return buffer.getvalue()
