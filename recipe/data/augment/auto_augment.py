"""Automatic augmentation: TrivialAugment and RandAugment with random numbers per sample.

Operations and ranges are those of torchvision's `TrivialAugmentWide` and `RandAugment`, which draw from a global
generator that threads share. Magnitude 0.3 is torchvision's RandAugment magnitude 9 of 30.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from recipe.config.schema import AutoAugmentConfig, AutoAugmentPolicy
from recipe.data.augment.rng import Rng
from recipe.data.transforms import fixed_image
from recipe.run.records import Setting

TRIVIAL_STEPS = 31  # number of magnitudes of TrivialAugmentWide, ends included
FILL = [0.0, 0.0, 0.0]  # pixels outside of the image


class Operation(NamedTuple):
    """An operation with its value, in the operation's unit."""

    name: str
    value: float


class Range(NamedTuple):
    """The value at magnitude 1, and True if its sign is drawn."""

    largest: float
    is_signed: bool


TRIVIAL_RANGES = {
    "identity": Range(0.0, False),
    "shear_x": Range(0.99, True),
    "shear_y": Range(0.99, True),
    "translate_x": Range(32.0, True),  # pixels
    "translate_y": Range(32.0, True),
    "rotate": Range(135.0, True),  # degrees
    "brightness": Range(0.99, True),
    "color": Range(0.99, True),
    "contrast": Range(0.99, True),
    "sharpness": Range(0.99, True),
    "posterize": Range(6.0, False),  # removed bits
    "solarize": Range(1.0, False),  # decrease of the threshold
    "autocontrast": Range(0.0, False),
    "equalize": Range(0.0, False),
}
TRANSLATION_SHARE = 150.0 / 331.0  # of the image's side, for RandAugment
RAND_RANGES = TRIVIAL_RANGES | {
    "shear_x": Range(0.3, True),
    "shear_y": Range(0.3, True),
    "rotate": Range(30.0, True),
    "brightness": Range(0.9, True),
    "color": Range(0.9, True),
    "contrast": Range(0.9, True),
    "sharpness": Range(0.9, True),
    "posterize": Range(4.0, False),
}


@dataclass(frozen=True)
class Policy:
    """Chooses operations for a sample, and applies them."""

    name: AutoAugmentPolicy = AutoAugmentPolicy.none
    num_ops: int = 1
    magnitude: float = 0.0
    magnitude_std: float = 0.0
    probability: float = 1.0
    interpolation: InterpolationMode = InterpolationMode.NEAREST  # torchvision's default for both

    @property
    def is_on(self) -> bool:
        return self.name is not AutoAugmentPolicy.none

    def draw(self, rng: Rng, pixels: int) -> list[Operation]:
        """The operations for one square image of `pixels`, in the order of application."""
        if self.name is AutoAugmentPolicy.trivial_augment:
            magnitude = rng.integer(TRIVIAL_STEPS) / (TRIVIAL_STEPS - 1)
            return [_operation(rng, self._ranges(pixels), magnitude)]
        ranges = self._ranges(pixels)
        drawn = [_operation(rng, ranges, self._magnitude(rng)) for _ in range(self.num_ops)]
        return [operation for operation in drawn if rng.random() < self.probability]

    def _ranges(self, pixels: int) -> dict[str, Range]:
        """The range of each operation, in an image of `pixels`."""
        if self.name is AutoAugmentPolicy.trivial_augment:
            return TRIVIAL_RANGES
        shift = Range(TRANSLATION_SHARE * pixels, True)
        return RAND_RANGES | {"translate_x": shift, "translate_y": shift}

    def _magnitude(self, rng: Rng) -> float:
        if self.magnitude_std == 0:
            return self.magnitude
        return min(1.0, max(0.0, rng.normal(self.magnitude, self.magnitude_std)))

    def apply(self, image: Tensor, operations: list[Operation]) -> Tensor:
        """uint8 [3, H, W] -> the same."""
        for operation in operations:
            image = OPERATIONS[operation.name](image, operation.value, self.interpolation)
        return image

    def examples(self) -> list[Tensor]:
        """A fixed image after each operation, at three magnitudes and in both directions. Empty if off."""
        picture = fixed_image(160, 160)
        ranges = self._ranges(picture.shape[-1]) if self.is_on else {}
        return [
            self.apply(picture, [Operation(name, sign * share * largest)])
            for name, (largest, is_signed) in ranges.items()
            for share in (0.1, 0.5, 1.0)
            for sign in ((1.0, -1.0) if is_signed else (1.0,))
        ]

    def facts(self) -> dict[str, Setting]:
        if not self.is_on:
            return {}
        if self.name is AutoAugmentPolicy.trivial_augment:
            return {"policy": "TrivialAugment, wide"}
        return {
            "policy": "RandAugment",
            "policy_num_ops": self.num_ops,
            "policy_magnitude": self.magnitude,
            "policy_magnitude_std": self.magnitude_std,
            "policy_probability": self.probability,
        }


def _operation(rng: Rng, ranges: dict[str, Range], magnitude: float) -> Operation:
    """A random operation, all equally likely, at this share of its range."""
    name = list(ranges)[rng.integer(len(ranges))]
    largest, is_signed = ranges[name]
    sign = -1.0 if is_signed and rng.random() < 0.5 else 1.0
    return Operation(name, sign * largest * magnitude)


def build_policy(config: AutoAugmentConfig) -> Policy:
    return Policy(config.policy, config.num_ops, config.magnitude, config.magnitude_std, config.probability)


# ---- the operations: (image, value, interpolation) -> image -------------------------------------------


def _affine(
    image: Tensor, mode: InterpolationMode, translate: list[int], shear: list[float], centre: list[float] | None
) -> Tensor:
    moved: Tensor = functional.affine(
        image, angle=0.0, translate=translate, scale=1.0, shear=shear, interpolation=mode, fill=FILL, center=centre
    )
    return moved


def _shear_x(image: Tensor, value: float, mode: InterpolationMode) -> Tensor:
    return _affine(image, mode, [0, 0], [math.degrees(math.atan(value)), 0.0], [0, 0])


def _shear_y(image: Tensor, value: float, mode: InterpolationMode) -> Tensor:
    return _affine(image, mode, [0, 0], [0.0, math.degrees(math.atan(value))], [0, 0])


def _translate_x(image: Tensor, value: float, mode: InterpolationMode) -> Tensor:
    return _affine(image, mode, [int(value), 0], [0.0, 0.0], None)


def _translate_y(image: Tensor, value: float, mode: InterpolationMode) -> Tensor:
    return _affine(image, mode, [0, int(value)], [0.0, 0.0], None)


def _rotate(image: Tensor, value: float, mode: InterpolationMode) -> Tensor:
    turned: Tensor = functional.rotate(image, angle=value, interpolation=mode, fill=FILL)
    return turned


def _enhanced(adjust: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float, InterpolationMode], Tensor]:
    """Value 0 keeps the image, -0.9 removes nearly all of the property, 0.9 nearly doubles it."""
    return lambda image, value, _: adjust(image, 1.0 + value)


def _posterize(image: Tensor, value: float, _: InterpolationMode) -> Tensor:
    kept: Tensor = functional.posterize(image, bits=8 - round(value))
    return kept


def _solarize(image: Tensor, value: float, _: InterpolationMode) -> Tensor:
    inverted: Tensor = functional.solarize(image, threshold=255 * (1.0 - value))
    return inverted


OPERATIONS: dict[str, Callable[[Tensor, float, InterpolationMode], Tensor]] = {
    "identity": lambda image, _value, _mode: image,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "brightness": _enhanced(functional.adjust_brightness),
    "color": _enhanced(functional.adjust_saturation),
    "contrast": _enhanced(functional.adjust_contrast),
    "sharpness": _enhanced(functional.adjust_sharpness),
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": lambda image, _value, _mode: functional.autocontrast(image),
    "equalize": lambda image, _value, _mode: functional.equalize(image),
}
