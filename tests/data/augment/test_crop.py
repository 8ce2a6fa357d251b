"""Augmentation: a function of (seed, epoch, image), with torchvision's pixels and distribution (T12-T15)."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from recipe.data.augment.crop import Augmentation, build_augmentation
from recipe.data.augment.mixup import Erasing, Mixing, Rectangle
from recipe.data.transforms import fixed_image
from tests.builders.configs import compose_config

IMAGE = fixed_image(120, 160)


def augmentation(**changes: object) -> Augmentation:
    built = build_augmentation(compose_config("augmentation.crop_pixels=32").augmentation, seed=7)
    return replace(built, **changes)  # type: ignore[arg-type]


def test_pixels_are_torchvisions_under_the_same_parameters() -> None:
    mine = augmentation()
    for index in range(20):
        box = mine.random_crop(3, index, 120, 160)
        crop = functional.crop(IMAGE, box.top, box.left, box.height, box.width)
        expected = v2.Resize([32, 32], antialias=True)(crop)
        if box.flip:
            expected = v2.RandomHorizontalFlip(p=1.0)(expected)
        assert torch.equal(mine(IMAGE, 3, index), expected)


def test_distribution_is_torchvisions() -> None:
    mine = augmentation()
    views = np.array([mine.random_crop(0, index, 120, 160)[:4] for index in range(4000)])
    torch.manual_seed(0)
    oracle = v2.RandomResizedCrop(32, antialias=True)
    theirs = np.array(
        [
            [params["top"], params["left"], params["height"], params["width"]]
            for params in (oracle.make_params([IMAGE]) for _ in range(4000))
        ]
    )
    for column in range(4):
        assert stats.ks_2samp(views[:, column], theirs[:, column]).pvalue > 1e-3


def test_half_of_the_samples_are_flipped() -> None:
    mine = augmentation()
    flips = sum(mine.random_crop(0, index, 120, 160).flip for index in range(4000))
    assert abs(flips - 2000) < 5 * np.sqrt(1000)


def test_the_same_sample_from_any_number_of_threads() -> None:
    mine = augmentation()
    alone = [mine(IMAGE, 1, index) for index in range(64)]
    for threads in (2, 5):
        with ThreadPoolExecutor(threads) as pool:
            together = list(pool.map(lambda index: mine(IMAGE, 1, index), range(64)))
        assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_seed_epoch_and_image_all_matter() -> None:
    mine = augmentation()
    views = {
        (seed, epoch, index): replace(mine, seed=seed).random_crop(epoch, index, 120, 160)
        for seed in (7, 8)
        for epoch in range(4)
        for index in range(8)
    }
    assert len(set(views.values())) == len(views)


def test_extreme_shapes_fall_back_to_a_central_crop() -> None:
    box = augmentation().random_crop(0, 0, 10, 1000)
    assert (box.top, box.height) == (0, 10)
    assert box.width == round(10 * 4 / 3)
    assert box.left == (1000 - box.width) // 2


def test_a_change_of_anything_changes_the_fingerprint() -> None:
    mine = augmentation()
    variants = [
        mine,
        replace(mine, flip_probability=0.0),
        replace(mine, scale=(0.09, 1.0)),
        replace(mine, ratio=(0.7, 4 / 3)),
        replace(mine, seed=8),
        replace(mine, crop_pixels=31),
        replace(mine, interpolation=v2.InterpolationMode.BICUBIC),
    ]
    assert len({variant.fingerprint() for variant in variants}) == len(variants)
    assert mine.fingerprint() == augmentation().fingerprint()


MIXED = Mixing(seed=7, mixup_alpha=0.2, cutmix_alpha=1.0, group_size=8)


@pytest.mark.parametrize(
    ("part", "edited"),
    [
        (Mixing, lambda draw: lambda *place: draw(*place)._replace(weight=0.25)),
        (Mixing, lambda draw: lambda self, epoch, batch, *rest: draw(self, epoch, batch + 1, *rest)),
        (Erasing, lambda draw: lambda *place: Rectangle(*(edge + 1 for edge in draw(*place)))),
        (Erasing, lambda draw: lambda self, epoch, index, *rest: draw(self, epoch, index + 1, *rest)),
    ],
)
def test_an_edit_of_the_draws_alone_changes_the_fingerprint(
    part: type, edited: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pixels of the loader do not change."""
    mine = replace(augmentation(), mixing=MIXED, erasing=Erasing(seed=7, probability=0.5))
    before, view = mine.fingerprint(), mine(IMAGE, 0, 0)
    plain = augmentation().fingerprint()
    monkeypatch.setattr(part, "draw", edited(part.draw))  # type: ignore[attr-defined]
    assert mine.fingerprint() != before
    assert torch.equal(mine(IMAGE, 0, 0), view)
    assert augmentation().fingerprint() == plain


def test_draws_for_the_device_are_in_the_fingerprint() -> None:
    mine = replace(augmentation(), mixing=MIXED)
    variants = [
        augmentation(),
        mine,
        *(
            replace(mine, mixing=replace(MIXED, **{name: 0.5}))
            for name in ("mixup_alpha", "cutmix_alpha", "probability")
        ),
        replace(mine, mixing=replace(MIXED, switch_probability=0.1)),
        replace(mine, mixing=replace(MIXED, group_size=4)),
        replace(mine, erasing=Erasing(seed=7, probability=0.5)),
        replace(mine, erasing=Erasing(seed=8, probability=0.5)),
    ]
    assert len({variant.fingerprint() for variant in variants}) == len(variants)
