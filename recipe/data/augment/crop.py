"""Augmentation of a sample: random resized crop and flip, then automatic augmentation.

All parameters are a function of (seed, epoch, image), and the pixels are those of torchvision's functional v2 with
these parameters, so any sample can be reproduced. torchvision's random transforms are not used: they draw from a global
generator that threads share, so their crops change with the number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode

from recipe.config.schema import AugmentationConfig
from recipe.data.augment.auto_augment import Policy, build_policy
from recipe.data.augment.mixup import (
    ATTEMPTS,
    BatchPlace,
    Erasing,
    Mixing,
    MixParameters,
    build_erasing,
    build_mixing,
    mix_parameters,
)
from recipe.data.augment.rng import Rng
from recipe.data.decoding import EncodedImage, WholeImage
from recipe.data.transforms import (
    INTERPOLATIONS,
    empty_image,
    fixed_image,
    pixels_sha256,
    resize,
)
from recipe.run.records import Setting

CROP_STREAM, POLICY_STREAM = 2, 5  # separate their random numbers from one another and from those of the order


class Crop(NamedTuple):
    """The crop and flip of one sample, in pixels of the decoded image."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


@dataclass(frozen=True)
class ProgressiveResizing:
    """Sizes of training images by epoch: linear between two epochs, rounded to multiples (FFCV's ImageNet recipes)."""

    first_pixels: int | None = None  # None: one size throughout
    start_epoch: float = 0.0
    end_epoch: float = 0.0
    multiple: int = 1

    def pixels(self, epoch: int, last_pixels: int) -> int:
        """The size in an epoch, counted from 0: a pure function, equal in a resumed run."""
        if self.first_pixels is None or epoch >= self.end_epoch:
            return last_pixels
        between = np.interp(epoch, [self.start_epoch, self.end_epoch], [self.first_pixels, last_pixels])
        return int(np.round(between / self.multiple)) * self.multiple


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop and horizontal flip, then the policy. Erasing and mixing follow on the device."""

    seed: int
    crop_pixels: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip_probability: float
    interpolation: InterpolationMode
    antialias: bool = True
    policy: Policy = field(default_factory=Policy)
    resizing: ProgressiveResizing = field(default_factory=ProgressiveResizing)
    mixing: Mixing = field(default_factory=Mixing)
    erasing: Erasing = field(default_factory=Erasing)
    repeats: int = 1

    def __call__(self, image: Tensor, epoch: int, index: int, copy: int = 0) -> Tensor:
        """uint8 [3, H, W] -> uint8 [3, pixels, pixels]. The same for any thread, process or restart."""
        pixels = self.pixels(epoch)
        out = empty_image((pixels, pixels))
        self.write(WholeImage(image), epoch, index, copy, out)
        return out

    def write(self, picture: EncodedImage, epoch: int, index: int, copy: int, out: Tensor) -> None:
        """Augment an image into `out`, which is channels-last, and decode its crop only."""
        crop, size = self.random_crop(epoch, index, *picture.size, copy), (out.shape[-2], out.shape[-1])
        part = picture.part(crop.top, crop.left, crop.height, crop.width)
        if not (crop.flip or self.policy.is_on):
            resize(part, size, self.interpolation, self.antialias, out)
            return
        resized = resize(part, size, self.interpolation, self.antialias)
        image = resized[None].flip(-1)[0] if crop.flip else resized  # torch flips batches faster than images
        if self.policy.is_on:
            rng = Rng(POLICY_STREAM, self.seed, epoch, index, copy)
            image = self.policy.apply(image, self.policy.draw(rng, size[0]))
        out.copy_(image)

    def pixels(self, epoch: int) -> int:
        """The size of the views of an epoch, counted from 0."""
        return self.resizing.pixels(epoch, self.crop_pixels)

    def mix_parameters(
        self, place: BatchPlace, indices: NDArray[np.int64], copies: NDArray[np.int64]
    ) -> MixParameters | None:
        """The parameters of erasing and mixing for the images of one forward pass. None if both are off."""
        return mix_parameters(self.mixing, self.erasing, place, indices, copies)

    def random_crop(self, epoch: int, index: int, height: int, width: int, copy: int = 0) -> Crop:
        """The crop of copy `copy` of sample `index` in `epoch`, distributed as in torchvision's RandomResizedCrop."""
        rng = Rng(CROP_STREAM, self.seed, epoch, index, copy)
        flip = rng.random() < self.flip_probability
        log_ratio = (math.log(self.ratio[0]), math.log(self.ratio[1]))
        for _ in range(ATTEMPTS):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(*log_ratio))
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top, left = rng.integer(height - crop_height + 1), rng.integer(width - crop_width + 1)
                return Crop(top, left, crop_height, crop_width, flip)
        return self._central(height, width, flip)

    def _central(self, height: int, width: int, flip: bool) -> Crop:
        """The largest central crop of an allowed shape, used if no random crop fits."""
        crop_height, crop_width = height, width
        if width / height < self.ratio[0]:
            crop_height = max(1, round(width / self.ratio[0]))
        elif width / height > self.ratio[1]:
            crop_width = max(1, round(height * self.ratio[1]))
        return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, flip)

    def facts(self, epochs: int) -> dict[str, Setting]:
        """The live settings over a training of `epochs`, for the record."""
        crop: dict[str, Setting] = {
            "random_resized_crop_pixels": self._sizes(epochs),
            "scale": list(self.scale),
            "ratio": list(self.ratio),
            "interpolation": self.interpolation.value,
            "antialias": self.antialias,
            "horizontal_flip_probability": self.flip_probability,
        }
        repeats: dict[str, Setting] = {"repeats_in_a_global_batch": self.repeats} if self.repeats > 1 else {}
        return crop | self.policy.facts() | repeats | self.erasing.facts() | self.mixing.facts()

    def _sizes(self, epochs: int) -> Setting:
        """One size, or each size with its first epoch, counted from 1."""
        sizes = [self.pixels(epoch) for epoch in range(epochs)]
        begins = [epoch for epoch in range(epochs) if epoch == 0 or sizes[epoch] != sizes[epoch - 1]]
        return sizes[0] if len(begins) <= 1 else [f"{sizes[epoch]} from epoch {epoch + 1}" for epoch in begins]

    def fingerprint(self) -> str:
        """A hash of the pixels of 16 samples of fixed images, and of the mix parameters of four batches if any.

        Also hashes rare cases: crops that do not fit after all attempts, and each operation of the policy.
        """
        sizes = [(96, 128), (150, 100), (40, 400), (64, 64)]
        views = [self(fixed_image(*size), epoch, index) for epoch in range(2) for index in range(2) for size in sizes]
        central = [self._central(*size, flip=False)[:4] for size in ((30, 201), (201, 30), (45, 51))]
        indices = np.arange(4 * self.mixing.group_size)
        places = [BatchPlace(epoch, batch, 0, self.pixels(epoch)) for epoch in range(2) for batch in range(2)]
        mixes = [self.mix_parameters(place, indices, np.zeros_like(indices)) for place in places]
        tensors = [tensor for parameters in mixes if parameters is not None for tensor in parameters]
        return pixels_sha256([*views, torch.tensor(central), *self.policy.examples(), *tensors])


def build_augmentation(config: AugmentationConfig, seed: int) -> Augmentation:
    resizing = config.progressive_resizing
    return Augmentation(
        seed=seed,
        crop_pixels=config.crop_pixels,
        scale=(config.scale_min, config.scale_max),
        ratio=(config.ratio_min, config.ratio_max),
        flip_probability=config.flip_probability,
        interpolation=INTERPOLATIONS[config.interpolation],
        policy=build_policy(config.auto_augment),
        resizing=ProgressiveResizing(
            resizing.first_pixels, resizing.start_epoch, resizing.end_epoch, resizing.multiple
        ),
        mixing=build_mixing(config.mixup, seed),
        erasing=build_erasing(config.random_erasing, seed),
        repeats=config.repeated_augmentation,
    )
