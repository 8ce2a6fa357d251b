"""Mixup, cutmix and random erasing: the loader draws their parameters, the device applies them to batches.

Images are paired inside fixed groups of the *global* batch. The parameters of a group are a function of (seed, epoch,
batch, group), so the same images are mixed in the same way on any number of processes. Inside a group each image is
mixed with its predecessor, as in torchvision's `MixUp` and `CutMix`. Erasing is torchvision's `RandomErasing`, with
parameters that are a function of (seed, epoch, image).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipe.config.schema import MixupConfig, RandomErasingConfig
from recipe.data.augment.rng import Rng
from recipe.errors import UserError
from recipe.run.records import Setting

MIXING_STREAM, ERASING_STREAM = 6, 7  # separate these random numbers from those of the order and the crop
ATTEMPTS = 10  # to find a crop or rectangle that fits, as torchvision's RandomResizedCrop and RandomErasing


class Rectangle(NamedTuple):
    """Rows top to bottom and columns left to right of an image, the ends exclusive."""

    top: int
    left: int
    bottom: int
    right: int


NO_RECTANGLE = Rectangle(0, 0, 0, 0)


class BatchPlace(NamedTuple):
    """The place of one forward pass in an epoch, and the size of its images."""

    epoch: int  # from 0
    batch: int  # global batch of the epoch
    first: int  # position of the first image in the global batch
    pixels: int  # height and width


class GroupMix(NamedTuple):
    """The parameters that mix the images of a group with their predecessors."""

    lam: float  # weight of an image's own pixels outside the rectangle
    rectangle: Rectangle  # taken from the predecessor
    weight: float  # of an image's own label


class MixParameters(NamedTuple):
    """Parameters of erasing (the first) and of mixup and cutmix (the others) for the images of a batch.

    Tensors of methods that are off have length 0.
    """

    erased: Tensor  # int64 [N, 4]: top, left, bottom, right
    lam: Tensor  # float32 [N], weight of an image's own pixels outside its rectangle
    rectangle: Tensor  # int64 [N, 4], taken from the partner
    weight: Tensor  # float32 [N], of an image's own label
    partner: Tensor  # int64 [N], position in the batch

    def to(self, device: torch.device) -> MixParameters:
        return MixParameters(*(tensor.to(device, non_blocking=True) for tensor in self))

    def pin_memory(self) -> MixParameters:
        """A copy in pinned memory, for copies to a GPU without blocking."""
        return MixParameters(*(tensor.pin_memory() for tensor in self))


@dataclass(frozen=True)
class Erasing:
    """Sets a random rectangle of some images to the mean colour."""

    seed: int = 0
    probability: float = 0.0
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)

    def draw(self, epoch: int, index: int, copy: int, pixels: int) -> Rectangle:
        """The rectangle of one sample. Empty if nothing is erased."""
        rng = Rng(ERASING_STREAM, self.seed, epoch, index, copy)
        if rng.random() >= self.probability:
            return NO_RECTANGLE
        log_ratio = (math.log(self.ratio[0]), math.log(self.ratio[1]))
        for _ in range(ATTEMPTS):
            area = pixels * pixels * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(*log_ratio))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height < pixels and width < pixels:
                top, left = rng.integer(pixels - height + 1), rng.integer(pixels - width + 1)
                return Rectangle(top, left, top + height, left + width)
        return NO_RECTANGLE

    def facts(self) -> dict[str, Setting]:
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
    switch_probability: float = 0.5
    probability: float = 1.0
    group_size: int = 8

    @property
    def is_on(self) -> bool:
        return self.probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def draw(self, epoch: int, batch: int, group: int, pixels: int) -> GroupMix:
        """The parameters of one group of global batch `batch`, for square images of `pixels`."""
        generator = np.random.default_rng((MIXING_STREAM, self.seed, epoch, batch, group))
        if generator.random() >= self.probability:
            return GroupMix(1.0, NO_RECTANGLE, 1.0)
        is_cutmix = self.cutmix_alpha > 0 and (not self.mixup_alpha or generator.random() < self.switch_probability)
        alpha = self.cutmix_alpha if is_cutmix else self.mixup_alpha
        lam = float(generator.beta(alpha, alpha))
        if not is_cutmix:
            return GroupMix(lam, NO_RECTANGLE, lam)
        rectangle = cut(generator, lam, pixels)
        area = (rectangle.bottom - rectangle.top) * (rectangle.right - rectangle.left)
        return GroupMix(1.0, rectangle, 1.0 - area / (pixels * pixels))

    def facts(self) -> dict[str, Setting]:
        if not self.is_on:
            return {}
        return {
            "mixup_alpha": self.mixup_alpha,
            "cutmix_alpha": self.cutmix_alpha,
            "switch_probability": self.switch_probability,
            "mixing_probability": self.probability,
            "mixing_group_images": self.group_size,
        }


def cut(generator: np.random.Generator, lam: float, pixels: int) -> Rectangle:
    """A rectangle around a random point with 1 - `lam` of the area of a square image, clipped to the image."""
    row, column = (int(generator.integers(pixels)) for _ in range(2))
    half = int(0.5 * math.sqrt(1.0 - lam) * pixels)
    return Rectangle(max(row - half, 0), max(column - half, 0), min(row + half, pixels), min(column + half, pixels))


def build_erasing(config: RandomErasingConfig, seed: int) -> Erasing:
    return Erasing(seed, config.probability, (config.scale_min, config.scale_max), (config.ratio_min, config.ratio_max))


def build_mixing(config: MixupConfig, seed: int) -> Mixing:
    return Mixing(
        seed, config.mixup_alpha, config.cutmix_alpha, config.switch_probability, config.probability, config.group_size
    )


# ---- tensors for a batch, made by the loader ----------------------------------------------------------


def mix_parameters(
    mixing: Mixing, erasing: Erasing, place: BatchPlace, indices: NDArray[np.int64], copies: NDArray[np.int64]
) -> MixParameters | None:
    """The parameters for the images of one forward pass. None if erasing and mixing are off.

    Raises `UserError` if `group_size` does not divide the forward pass.
    """
    if not (mixing.is_on or erasing.probability):
        return None
    samples = zip(indices.tolist(), copies.tolist(), strict=True) if erasing.probability else []
    erased = [erasing.draw(place.epoch, index, copy, place.pixels) for index, copy in samples]
    mixes: list[GroupMix] = []  # one for each image
    if mixing.is_on:
        size = mixing.group_size
        if len(indices) % size or place.first % size:
            raise UserError(
                f"augmentation.mixup.group_size={size} does not divide the {len(indices)} images of one forward "
                "pass; give a divisor of it, or another trainer.max_micro_batch_size"
            )
        for group in range(place.first // size, (place.first + len(indices)) // size):
            mixes += [mixing.draw(place.epoch, place.batch, group, place.pixels)] * size
    return MixParameters(
        erased=torch.tensor(erased, dtype=torch.int64).view(-1, 4),
        lam=torch.tensor([mix.lam for mix in mixes], dtype=torch.float32),
        rectangle=torch.tensor([mix.rectangle for mix in mixes], dtype=torch.int64).view(-1, 4),
        weight=torch.tensor([mix.weight for mix in mixes], dtype=torch.float32),
        partner=predecessors(len(mixes), mixing.group_size),
    )


def predecessors(images: int, group: int) -> Tensor:
    """For each image the position of its predecessor in the group. That of the first is the last."""
    places = torch.arange(images)
    return places // group * group + (places - 1) % group


# ---- on the device ------------------------------------------------------------------------------------


def mix(images: Tensor, parameters: MixParameters | None) -> Tensor:
    """Erase, then mix: float [N, C, H, W] -> the same shape and memory layout."""
    if parameters is None:
        return images
    if len(parameters.erased):
        images = torch.where(inside(parameters.erased, images), images.new_zeros(()), images)
    if len(parameters.partner):
        partners = images[parameters.partner]  # index_select and masked_fill would lose the layout
        lam = parameters.lam.view(-1, 1, 1, 1).to(images.dtype)
        images = torch.where(inside(parameters.rectangle, images), partners, lam * images + (1 - lam) * partners)
    return images


def inside(rectangles: Tensor, images: Tensor) -> Tensor:
    """bool [N, 1, H, W]: the pixels of each image's rectangle."""
    top, left, bottom, right = (edge.view(-1, 1, 1, 1) for edge in rectangles.unbind(1))
    rows = torch.arange(images.shape[2], device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(images.shape[3], device=images.device).view(1, 1, 1, -1)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def soft_targets(labels: Tensor, parameters: MixParameters | None, classes: int) -> Tensor:
    """Unchanged labels [N], or labels mixed as the images: float [N, classes] with rows that sum to 1."""
    if parameters is None or not len(parameters.partner):
        return labels
    every_class = torch.arange(classes, device=labels.device)  # one_hot synchronises on some devices
    own, others = (classes_of[:, None] == every_class for classes_of in (labels, labels[parameters.partner]))
    weight = parameters.weight.view(-1, 1)
    return weight * own + (1 - weight) * others


def dominant_labels(labels: Tensor, parameters: MixParameters | None) -> Tensor:
    """The class with the larger weight in each image, for the training accuracy."""
    if parameters is None or not len(parameters.partner):
        return labels
    return torch.where(parameters.weight >= 0.5, labels, labels[parameters.partner])
