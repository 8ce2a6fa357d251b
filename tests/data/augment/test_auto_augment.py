"""TrivialAugment and RandAugment: pixels and distribution of draws as in torchvision."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from recipe.config.schema import AutoAugmentPolicy
from recipe.data.augment.auto_augment import (
    OPERATIONS,
    RAND_RANGES,
    TRANSLATION_SHARE,
    TRIVIAL_RANGES,
    Operation,
    Policy,
)
from recipe.data.augment.rng import Rng
from recipe.data.transforms import fixed_image

IMAGE = fixed_image(40, 40)
TRIVIAL = Policy(AutoAugmentPolicy.trivial_augment)
TORCHVISIONS = {name: "".join(word.capitalize() for word in name.split("_")) for name in OPERATIONS} | {
    "autocontrast": "AutoContrast"
}


def theirs(oracle: v2.Transform, image: Tensor, name: str, magnitude: float) -> Tensor:
    """One operation applied by torchvision. For two of them the magnitude is a threshold or bits."""
    result: Tensor = oracle._apply_image_or_video_transform(  # type: ignore[attr-defined]
        image, TORCHVISIONS[name], magnitude, interpolation=InterpolationMode.NEAREST, fill={torch.Tensor: None}
    )
    return result


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("step", [0, 1, 9, 17, 30])
def test_pixels_are_torchvisions(name: str, step: int) -> None:
    for kind, ranges in (("TrivialAugmentWide", TRIVIAL_RANGES), ("RandAugment", RAND_RANGES)):
        oracle = getattr(v2, kind)()
        bins, is_signed = oracle._AUGMENTATION_SPACE[TORCHVISIONS[name]]
        magnitudes = bins(31, 40, 40)
        magnitude = 0.0 if magnitudes is None else float(magnitudes[step])
        largest = TRANSLATION_SHARE * 40 if kind == "RandAugment" and "translate" in name else ranges[name].largest
        assert ranges[name].is_signed == is_signed
        for sign in (1.0, -1.0) if is_signed else (1.0,):
            mine = TRIVIAL.apply(IMAGE, [Operation(name, sign * largest * step / 30)])
            expected = theirs(oracle, IMAGE, name, sign * magnitude)
            # torchvision's magnitudes are float32: a product may round to another grey level, an edge move by a pixel
            beyond = (mine.int() - expected.int()).abs() > 1
            assert float(beyond.float().mean()) < 0.01, (kind, sign)
            assert mine.shape == IMAGE.shape
            assert mine.dtype is torch.uint8


def sampled(policy: Policy, count: int = 4000) -> list[list[Operation]]:
    return [policy.draw(Rng(5, 0, 0, index), 40) for index in range(count)]


def test_trivial_augment_draws_one_operation_and_a_magnitude_evenly() -> None:
    drawn = [operation for (operation,) in sampled(TRIVIAL)]
    counts = Counter(operation.name for operation in drawn)
    assert counts.keys() == TRIVIAL_RANGES.keys()
    assert all(abs(count - 4000 / 14) < 5 * np.sqrt(4000 / 14) for count in counts.values())
    turns = [operation.value for operation in drawn if operation.name == "rotate"]
    assert {round(abs(turn) / 135 * 30, 6) for turn in turns} == set(range(31))
    assert abs(sum(turn < 0 for turn in turns) / sum(turn != 0 for turn in turns) - 0.5) < 0.15


def test_rand_augment_draws_so_many_operations_of_one_magnitude() -> None:
    drawn = sampled(Policy(AutoAugmentPolicy.rand_augment, num_ops=3, magnitude=0.3))
    assert {len(operations) for operations in drawn} == {3}
    values = {round(abs(o.value), 9) for operations in drawn for o in operations if o.name == "translate_y"}
    assert values == {round(0.3 * TRANSLATION_SHARE * 40, 9)}
    bits = {o.value for operations in drawn for o in operations if o.name == "posterize"}
    assert bits == {4 * 0.3}


def test_rand_augment_may_leave_operations_out_and_vary_its_magnitude() -> None:
    half = sampled(Policy(AutoAugmentPolicy.rand_augment, 2, 0.6, probability=0.5))
    assert abs(sum(map(len, half)) - 4000) < 5 * np.sqrt(2000)
    varied = sampled(Policy(AutoAugmentPolicy.rand_augment, 1, 0.6, magnitude_std=0.05))
    magnitudes = [abs(o.value) / 30 for (o,) in varied if o.name == "rotate"]
    assert abs(np.mean(magnitudes) - 0.6) < 0.02
    assert abs(np.std(magnitudes) - 0.05) < 0.01
    wild = sampled(Policy(AutoAugmentPolicy.rand_augment, 1, 0.9, magnitude_std=5.0))
    assert {abs(o.value) <= 30 for (o,) in wild if o.name == "rotate"} == {True}


def test_no_policy_says_nothing() -> None:
    assert Policy().facts() == {}
    assert not Policy().is_on
