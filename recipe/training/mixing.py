"""Mixup, cutmix and random erasing: drawn beside the loader, applied to whole batches on the device.

Images are paired inside fixed groups of the *global* batch, and a group's draw is a function of (seed, epoch, batch,
group), so the same images are mixed in the same way on any number of processes. Inside a group each image meets its
predecessor, as in torchvision's `MixUp` and `CutMix`; erasing is torchvision's `RandomErasing`, keyed to the sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipe.config.schema import ErasingConfig, MixingConfig
from recipe.data.loading import DeviceDraws
from recipe.errors import UserError
from recipe.run.records import Setting

MIXING_STREAM, ERASING_STREAM = 6, 7  # keep these draws apart from those of the order and the view
ATTEMPTS = 10  # to find a rectangle that fits, as torchvision
NOWHERE = (0, 0, 0, 0)


class Rectangle(NamedTuple):
    """Rows top..bottom and columns left..right of an image, the ends left out."""

    top: int
    left: int
    bottom: int
    right: int


class BatchPlace(NamedTuple):
    """Which forward pass: of which global batch of which epoch, from which position on, in which size."""

    epoch: int
    batch: int
    first: int
    pixels: int


class GroupDraw(NamedTuple):
    """How the images of a group are mixed with their predecessors."""

    lam: float  # weight of an image's own pixels outside the rectangle
    rectangle: Rectangle  # that comes from the predecessor
    weight: float  # of an image's own label


@dataclass(frozen=True)
class Erasing:
    """Sets a random rectangle of some images to the mean colour."""

    seed: int = 0
    probability: float = 0.0
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)

    def draw(self, epoch: int, index: int, copy: int, pixels: int) -> Rectangle:
        """The rectangle of one sample; empty where nothing is erased."""
        generator = np.random.default_rng((ERASING_STREAM, self.seed, epoch, index, copy))
        if generator.random() >= self.probability:
            return Rectangle(*NOWHERE)
        log_ratio = (math.log(self.ratio[0]), math.log(self.ratio[1]))
        for _ in range(ATTEMPTS):
            area = pixels * pixels * generator.uniform(*self.scale)
            ratio = math.exp(generator.uniform(*log_ratio))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height < pixels and width < pixels:
                top = int(generator.integers(0, pixels - height + 1))
                left = int(generator.integers(0, pixels - width + 1))
                return Rectangle(top, left, top + height, left + width)
        return Rectangle(*NOWHERE)

    def facts(self) -> dict[str, Setting]:
        """The live settings, for the record."""
        if not self.probability:
            return {}
        return {
            "erasing_probability": self.probability,
            "erasing_scale": list(self.scale),
            "erasing_ratio": list(self.ratio),
        }


@dataclass(frozen=True)
class Mixing:
    """Mixup, cutmix or neither, drawn for every group of a global batch."""

    seed: int = 0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    cutmix_share: float = 0.5
    probability: float = 1.0
    group_images: int = 8

    @property
    def is_on(self) -> bool:
        return self.probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def draw(self, epoch: int, batch: int, group: int, pixels: int) -> GroupDraw:
        """The draw of one group of global batch `batch`, for square images of `pixels`."""
        generator = np.random.default_rng((MIXING_STREAM, self.seed, epoch, batch, group))
        if generator.random() >= self.probability:
            return GroupDraw(1.0, Rectangle(*NOWHERE), 1.0)
        is_cutmix = self.cutmix_alpha > 0 and (not self.mixup_alpha or generator.random() < self.cutmix_share)
        alpha = self.cutmix_alpha if is_cutmix else self.mixup_alpha
        lam = float(generator.beta(alpha, alpha))
        if not is_cutmix:
            return GroupDraw(lam, Rectangle(*NOWHERE), lam)
        rectangle = cut(generator, lam, pixels)
        area = (rectangle.bottom - rectangle.top) * (rectangle.right - rectangle.left)
        return GroupDraw(1.0, rectangle, 1.0 - area / (pixels * pixels))

    def facts(self) -> dict[str, Setting]:
        """The live settings, for the record."""
        if not self.is_on:
            return {}
        return {
            "mixup_alpha": self.mixup_alpha,
            "cutmix_alpha": self.cutmix_alpha,
            "cutmix_share": self.cutmix_share,
            "mixing_probability": self.probability,
            "mixing_group_images": self.group_images,
        }


def cut(generator: np.random.Generator, lam: float, pixels: int) -> Rectangle:
    """A rectangle around a random point that covers 1 - `lam` of a square image, less the part outside of it."""
    row, column = (int(generator.integers(pixels)) for _ in range(2))
    half = int(0.5 * math.sqrt(1.0 - lam) * pixels)
    return Rectangle(max(row - half, 0), max(column - half, 0), min(row + half, pixels), min(column + half, pixels))


def build_erasing(config: ErasingConfig, seed: int) -> Erasing:
    return Erasing(seed, config.probability, (config.scale_min, config.scale_max), (config.ratio_min, config.ratio_max))


def build_mixing(config: MixingConfig, seed: int) -> Mixing:
    return Mixing(
        seed, config.mixup_alpha, config.cutmix_alpha, config.cutmix_share, config.probability, config.group_images
    )


# ---- from draws to tensors, beside the loader ---------------------------------------------------------


def device_draws(
    mixing: Mixing, erasing: Erasing, place: BatchPlace, indices: NDArray[np.int64], copies: NDArray[np.int64]
) -> DeviceDraws | None:
    """The parameters of erasing and mixing for the images of one forward pass; None where both are off."""
    if not (mixing.is_on or erasing.probability):
        return None
    samples = zip(indices.tolist(), copies.tolist(), strict=True) if erasing.probability else []
    erased = [erasing.draw(place.epoch, index, copy, place.pixels) for index, copy in samples]
    groups = _groups(mixing, place, len(indices)) if mixing.is_on else []
    drawn = [group for group in groups for _ in range(mixing.group_images)]  # for each image
    return DeviceDraws(
        erased=torch.tensor(erased, dtype=torch.int64).view(-1, 4),
        share=torch.tensor([draw.lam for draw in drawn], dtype=torch.float32),
        rectangle=torch.tensor([draw.rectangle for draw in drawn], dtype=torch.int64).view(-1, 4),
        weight=torch.tensor([draw.weight for draw in drawn], dtype=torch.float32),
        partner=predecessors(len(drawn), mixing.group_images),
    )


def _groups(mixing: Mixing, place: BatchPlace, images: int) -> list[GroupDraw]:
    size = mixing.group_images
    if images % size or place.first % size:
        raise UserError(
            f"augmentation.mixing.group_images={size} does not divide the {images} images of one forward pass; "
            "give a divisor of it, or another trainer.max_images_per_process"
        )
    first = place.first // size
    return [mixing.draw(place.epoch, place.batch, first + k, place.pixels) for k in range(images // size)]


def predecessors(images: int, group: int) -> Tensor:
    """For each image the one before it in its group; the first meets the last."""
    places = torch.arange(images)
    return places // group * group + (places - 1) % group


# ---- on the device ------------------------------------------------------------------------------------


def mix(images: Tensor, draws: DeviceDraws | None) -> Tensor:
    """Erase, then mix: float [N, C, H, W] -> the same; the layout in memory stays."""
    if draws is None:
        return images
    if len(draws.erased):
        images = torch.where(inside(draws.erased, images), images.new_zeros(()), images)
    if len(draws.partner):
        partners = images[draws.partner]  # index_select and masked_fill would lose the layout
        lam = draws.share.view(-1, 1, 1, 1).to(images.dtype)
        images = torch.where(inside(draws.rectangle, images), partners, lam * images + (1 - lam) * partners)
    return images


def inside(rectangles: Tensor, images: Tensor) -> Tensor:
    """bool [N, 1, H, W]: the pixels of each image's rectangle."""
    top, left, bottom, right = (edge.view(-1, 1, 1, 1) for edge in rectangles.unbind(1))
    rows = torch.arange(images.shape[2], device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(images.shape[3], device=images.device).view(1, 1, 1, -1)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def soft_targets(labels: Tensor, draws: DeviceDraws | None, classes: int) -> Tensor:
    """Labels [N] as they are, or mixed as the images were: float [N, classes] whose rows sum to 1."""
    if draws is None or not len(draws.partner):
        return labels
    every_class = torch.arange(classes, device=labels.device)  # one_hot reads its labels back on some devices
    own, others = (classes_of[:, None] == every_class for classes_of in (labels, labels[draws.partner]))
    weight = draws.weight.view(-1, 1)
    return weight * own + (1 - weight) * others


def dominant_labels(labels: Tensor, draws: DeviceDraws | None) -> Tensor:
    """The class with the larger weight in each image, which training accuracy is counted against."""
    if draws is None or not len(draws.partner):
        return labels
    return torch.where(draws.weight >= 0.5, labels, labels[draws.partner])
