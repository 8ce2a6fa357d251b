"""Random resized crop and flip, where every draw is a function of (seed, epoch, image).

No random transform class runs here: those draw from a global generator that threads share, so their crops change with
the number of threads. Parameters come from a generator of the sample's own and go to torchvision's functional v2; a
sample can be drawn again at any time to look at it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from recipe.config import AugmentationConfig
from recipe.data.transforms import INTERPOLATIONS, fixed_image, pixels_sha256
from recipe.records import Setting

AUGMENTATION_STREAM = 2  # keeps these draws apart from the order's
ATTEMPTS = 10  # to find a crop that fits, as torchvision's RandomResizedCrop


class View(NamedTuple):
    """What is drawn for one sample, in pixels of the decoded image."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


@dataclass(frozen=True)
class Augmentation:
    """Crops a random part of random shape, resizes it to a square, flips it sideways."""

    seed: int
    crop_pixels: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip_probability: float
    interpolation: InterpolationMode
    antialias: bool = True

    def __call__(self, image: Tensor, epoch: int, index: int) -> Tensor:
        """uint8 [3, H, W] -> uint8 [3, crop_pixels, crop_pixels]; the same for any thread, process or restart."""
        view = self.view(epoch, index, image.shape[-2], image.shape[-1])
        cropped: Tensor = functional.resized_crop(
            image,
            view.top,
            view.left,
            view.height,
            view.width,
            [self.crop_pixels, self.crop_pixels],
            interpolation=self.interpolation,
            antialias=self.antialias,
        )
        return cropped.flip(-1) if view.flip else cropped

    def view(self, epoch: int, index: int, height: int, width: int) -> View:
        """Draw for sample `index` of `epoch`; the distribution is that of torchvision's RandomResizedCrop."""
        generator = np.random.default_rng((AUGMENTATION_STREAM, self.seed, epoch, index))
        flip = bool(generator.random() < self.flip_probability)
        log_ratio = (math.log(self.ratio[0]), math.log(self.ratio[1]))
        for _ in range(ATTEMPTS):
            area = height * width * generator.uniform(*self.scale)
            ratio = math.exp(generator.uniform(*log_ratio))
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top = int(generator.integers(0, height - crop_height + 1))
                left = int(generator.integers(0, width - crop_width + 1))
                return View(top, left, crop_height, crop_width, flip)
        return self._central(height, width, flip)

    def _central(self, height: int, width: int, flip: bool) -> View:
        """The largest central crop whose shape is allowed, where no random one fitted."""
        crop_height, crop_width = height, width
        if width / height < self.ratio[0]:
            crop_height = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            crop_width = round(height * self.ratio[1])
        return View((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, flip)

    def facts(self) -> dict[str, Setting]:
        """What this object does, for the record."""
        return {
            "random_resized_crop_pixels": self.crop_pixels,
            "scale": list(self.scale),
            "ratio": list(self.ratio),
            "interpolation": self.interpolation.value,
            "antialias": self.antialias,
            "horizontal_flip_probability": self.flip_probability,
        }

    def fingerprint(self) -> str:
        """Identifies what this object does by the pixels it makes of 16 samples of fixed pictures."""
        sizes = [(96, 128), (150, 100), (40, 400), (64, 64)]
        return pixels_sha256(
            [self(fixed_image(*size), epoch, index) for epoch in range(2) for index in range(2) for size in sizes]
        )


def build_augmentation(config: AugmentationConfig, seed: int) -> Augmentation:
    """The augmentation that the configuration describes."""
    return Augmentation(
        seed=seed,
        crop_pixels=config.crop_pixels,
        scale=(config.scale_min, config.scale_max),
        ratio=(config.ratio_min, config.ratio_max),
        flip_probability=config.flip_probability,
        interpolation=INTERPOLATIONS[config.interpolation],
    )
