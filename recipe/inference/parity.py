"""The gate: an exported file gets its name only after it was compared with the eager model on real images.

The exporter has been wrong for exactly this network within the year (pytorch#169178, #168224), and most "accuracy
drops" of exported models are wrong pixels. So each side makes its own pixels of every validation image: the eager model
by the run's configuration, the file by its own metadata. Both run on the CPU, the eager one in fp32: the reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from recipe.config.schema import SerializationConfig, Variant
from recipe.data.batches import Batch
from recipe.errors import UserError
from recipe.evaluation import Predict, Predictions, check_finite, concatenate, predictions_of
from recipe.run.progress import ProgressPrinter
from recipe.run.records import FLIPS_MAX, Flip

NAMED_MAX = 5  # images in an error message
TRIED_BATCHES = (1, 2, 7)


class ParityError(UserError):
    """An exported model does not agree with the eager one (EX_SOFTWARE)."""

    exit_code = 70


@dataclass
class Side:
    """One model's predictions so far, and the largest difference of its logits from the eager ones."""

    predict: Predict
    parts: list[Predictions] = field(default_factory=list)
    largest_error: float = 0.0
    largest_logit: float = 0.0
    largest_error_index: int = 0  # the image
    seconds: float = 0.0  # of predicting

    def take(self, batch: Batch, eager: Tensor | None) -> Tensor:
        """Predict one batch. With `eager` logits, note the largest difference. NaN counts as infinitely far."""
        started = time.perf_counter()
        logits = self.predict(batch.images)
        self.seconds += time.perf_counter() - started
        self.parts.append(predictions_of(logits, batch))
        self.largest_logit = max(self.largest_logit, float(logits.abs().max()))
        if eager is not None:
            errors = (logits - eager).abs().amax(dim=1).nan_to_num(nan=float("inf"))
            if float(errors.max()) >= self.largest_error:
                self.largest_error = float(errors.max())
                self.largest_error_index = int(batch.indices[int(errors.argmax())])
        return logits

    @property
    def images_per_second(self) -> float:
        """Without decoding."""
        return sum(part.images for part in self.parts) / self.seconds


@dataclass(frozen=True)
class Comparison:
    """One exported model beside the eager one, over all images."""

    eager: Predictions
    exported: Predictions
    largest_logit: float  # of the eager model, absolute
    relative_logit_error: float
    furthest_image: int
    eager_images_per_second: float
    exported_images_per_second: float

    @property
    def flips(self) -> list[int]:
        """Positions of the images with another best class, the clearest first."""
        different = np.flatnonzero(self.eager.top[:, 0] != self.exported.top[:, 0])
        order = np.argsort(-self.eager.margins[different], kind="stable")
        return [int(index) for index in different[order]]

    @property
    def top1_change(self) -> float:
        return self.exported.accuracy(1) - self.eager.accuracy(1)

    def flip_examples(self, key_of: Callable[[int], str]) -> list[Flip]:
        """The flips with the largest margins: those that rounding explains least."""
        return [
            Flip(
                key=key_of(index),
                label=int(self.eager.labels[index]),
                eager_class=int(self.eager.top[index, 0]),
                exported_class=int(self.exported.top[index, 0]),
                eager_margin=float(self.eager.margins[index]),
            )
            for index in self.flips[:FLIPS_MAX]
        ]


def compare(
    eager: Predict,
    exported: Mapping[Variant, Predict],
    eager_batches: Iterable[Batch],
    exported_batches: Iterable[Batch],
    images: int,
) -> dict[Variant, Comparison]:
    """One pass over the validation set. Both sides' batches contain the same images, each with its own pixels."""
    reference = Side(eager)
    sides = {variant: Side(predict) for variant, predict in exported.items()}
    with ProgressPrinter("comparing", images, "images") as progress:
        for ours, theirs in zip(eager_batches, exported_batches, strict=True):
            assert torch.equal(ours.indices, theirs.indices), "the two sides see the same images"
            logits = reference.take(ours, None)
            for side in sides.values():
                side.take(theirs, logits)
            progress.add(len(ours.indices))
    predictions = concatenate(reference.parts)
    assert np.array_equal(predictions.indices, np.arange(images)), "every image once"
    check_finite(predictions, "the evaluated checkpoint")
    scale = max(reference.largest_logit, 1e-30)
    return {
        variant: Comparison(
            eager=predictions,
            exported=concatenate(side.parts),
            largest_logit=reference.largest_logit,
            relative_logit_error=side.largest_error / scale,
            furthest_image=side.largest_error_index,
            eager_images_per_second=reference.images_per_second,
            exported_images_per_second=side.images_per_second,
        )
        for variant, side in sides.items()
    }


def limit_of(variant: Variant, config: SerializationConfig) -> str:
    if variant is Variant.fp32:
        return f"logits within {config.fp32_tolerance:g} of the largest one"
    return f"top-1 at most {accuracy_drop_max(variant, config):.2%} below the eager model's"


def accuracy_drop_max(variant: Variant, config: SerializationConfig) -> float:
    """The limit as a fraction."""
    return config.fp16_accuracy_drop_max if variant is Variant.fp16 else config.int8_accuracy_drop_max


def passes(variant: Variant, found: Comparison, config: SerializationConfig) -> bool:
    """Whether a variant is within its limit. NaN is not."""
    if variant is Variant.fp32:
        return found.relative_logit_error <= config.fp32_tolerance
    return -found.top1_change <= accuracy_drop_max(variant, config) and np.isfinite(found.relative_logit_error)


def check_parity(
    comparisons: Mapping[Variant, Comparison], config: SerializationConfig, key_of: Callable[[int], str]
) -> None:
    """Raise `ParityError` with the failures and their images, unless every variant passes."""
    failed = [
        complaint(variant, found, config, key_of)
        for variant, found in comparisons.items()
        if not passes(variant, found, config)
    ]
    if failed:
        raise ParityError(f"{'; '.join(failed)}. Nothing was exported")


def complaint(variant: Variant, found: Comparison, config: SerializationConfig, key_of: Callable[[int], str]) -> str:
    """One variant's failure: the numbers, the limit, the images."""
    flips = found.flips
    named = ", ".join(f"{key_of(index)} (margin {found.eager.margins[index]:.3g})" for index in flips[:NAMED_MAX])
    return (
        f"the {variant.value} model does not agree with the eager one: its logits are off by "
        f"{found.relative_logit_error:.2e} of the largest one (most on {key_of(found.furthest_image)}), top-1 is "
        f"{found.exported.accuracy(1):.2%} instead of {found.eager.accuracy(1):.2%}, {len(flips)} of "
        f"{found.eager.images} images change their class"
        + (f" ({named}{', ...' if len(flips) > NAMED_MAX else ''})" if flips else "")
        + f"; allowed: {limit_of(variant, config)}"
    )


def check_any_batch(predict: Predict, images: Tensor) -> None:
    """Batches of 1, 2 and 7 give the rows of one larger batch: the batch is dynamic, and rows do not mix."""
    whole = predict(images)
    scale = float(whole.abs().max())
    for size in TRIED_BATCHES:
        if not torch.allclose(predict(images[:size]), whole[:size], rtol=0, atol=1e-4 * scale):
            raise ParityError(
                f"the exported model gives other logits in a batch of {size} than in one of {len(images)}"
            )
