"""Views: torchvision's pixels, within a grey level of Pillow's (T8, T9)."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.v2 import functional

from recipe.data import transforms
from recipe.data.transforms import (
    EvaluationTransform,
    Normalisation,
    build_evaluation_transform,
    empty_image,
    fixed_image,
    pixels_sha256,
    resize,
    uses_native_kernel,
)
from tests.builders.configs import compose_config

SIZES = [(300, 400), (400, 300), (257, 255), (60, 90), (224, 224), (500, 101)]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def transform(
    resize: int = 256,
    crop: int = 224,
    mode: InterpolationMode = InterpolationMode.BILINEAR,
) -> EvaluationTransform:
    return EvaluationTransform(resize, crop, mode)


def smooth_picture(height: int, width: int) -> Image.Image:
    """A photograph-like picture: noise of a low frequency, so that JPEG keeps it."""
    coarse = np.random.default_rng(height * width).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def largest_difference(one: Tensor, other: Tensor) -> int:
    assert one.shape == other.shape
    return int((one.int() - other.int()).abs().max())


# ---- the evaluation view ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
@pytest.mark.parametrize("size", SIZES)
def test_the_view_is_torchvisions_resize_and_centre_crop(size: tuple[int, int], mode: InterpolationMode) -> None:
    image = fixed_image(*size)
    oracle = v2.Compose([v2.Resize(256, interpolation=mode, antialias=True), v2.CenterCrop(224)])
    assert torch.equal(transform(mode=mode)(image), oracle(image))


@pytest.mark.parametrize("size", SIZES)
def test_view_and_normalisation_are_torchvisions_preset_within_one_level(size: tuple[int, int]) -> None:
    """The preset of the published weights resizes in floating point, hence the one level."""
    image = fixed_image(*size)
    mine = Normalisation(MEAN, STD, torch.device("cpu"))(transform()(image)[None])
    preset = ImageClassification(crop_size=224)(image[None])
    torch.testing.assert_close(mine, preset, rtol=0, atol=1.001 / 255 / min(STD))


@pytest.mark.parametrize(
    ("mode", "resample", "levels"),
    [
        (InterpolationMode.BILINEAR, Image.Resampling.BILINEAR, 1),
        (InterpolationMode.BICUBIC, Image.Resampling.BICUBIC, 2),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_the_view_agrees_with_pillow(
    size: tuple[int, int], mode: InterpolationMode, resample: Image.Resampling, levels: int
) -> None:
    picture = smooth_picture(*size)
    scale = 256 / min(size)
    height, width = (256 if side == min(size) else int(side * scale) for side in size)
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    expected = np.array(picture.resize((width, height), resample).crop((left, top, left + 224, top + 224)))
    found = transform(mode=mode)(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    assert largest_difference(found, torch.from_numpy(expected).permute(2, 0, 1)) <= levels


def test_without_antialiasing_the_view_would_be_another() -> None:
    image = fixed_image(600, 800)
    aliased = v2.Compose([v2.Resize(256, antialias=False), v2.CenterCrop(224)])
    assert largest_difference(transform()(image), aliased(image)) > 10


def test_facts_and_name_are_the_live_objects() -> None:
    config = compose_config("evaluation.resize_pixels=232", "evaluation.interpolation=bicubic").evaluation
    built = build_evaluation_transform(config)
    assert (built.resize_pixels, built.crop_pixels, built.interpolation) == (232, 224, InterpolationMode.BICUBIC)
    assert built.name == "resize232-crop224-bicubic"
    assert built.facts() == {
        "resize_short_side_pixels": 232,
        "center_crop_pixels": 224,
        "interpolation": "bicubic",
        "antialias": True,
    }


def test_a_change_of_anything_changes_the_fingerprint() -> None:
    variants = [transform(), transform(resize=255), transform(crop=223), transform(mode=InterpolationMode.BICUBIC)]
    prints = {pixels_sha256([variant(fixed_image(*size)) for size in SIZES]) for variant in variants}
    assert len(prints) == len(variants)


def test_the_fingerprint_depends_on_one_level_and_the_shape() -> None:
    image = fixed_image(12, 16)
    brighter = image.clone()
    brighter[2, 11, 15] += 1
    prints = {pixels_sha256(images) for images in ([image], [brighter], [image.reshape(3, 16, 12)], [image, image])}
    assert len(prints) == 4
    assert pixels_sha256([image]) == pixels_sha256([image.permute(1, 2, 0).contiguous().permute(2, 0, 1)])


# ---- normalisation ----------------------------------------------------------------------------------


def test_normalisation_is_torchvisions() -> None:
    images = torch.stack([fixed_image(40, 50), 255 - fixed_image(40, 50)])
    mine = Normalisation([0.1, 0.5, 0.9], [0.2, 0.3, 0.4], torch.device("cpu"))
    scaled = v2.functional.to_dtype(images, torch.float32, scale=True)
    torch.testing.assert_close(
        mine(images), v2.functional.normalize(scaled, [0.1, 0.5, 0.9], [0.2, 0.3, 0.4]), rtol=1e-5, atol=1e-5
    )
    assert mine(images).dtype is torch.float32
    assert mine.facts() == {"mean": [0.1, 0.5, 0.9], "std": [0.2, 0.3, 0.4]}


# ---- resizing in place ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
def test_resizing_into_a_batch_is_torchvisions_and_touches_nothing_else(mode: InterpolationMode) -> None:
    """The kernel processes four bytes at a time, and pixels have three."""
    assert uses_native_kernel(mode)
    image = fixed_image(90, 130).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for top, left, height, width in (
        (0, 0, 90, 130),
        (3, 5, 40, 77),
        (50, 1, 1, 129),
        (10, 20, 64, 1),
        (60, 90, 30, 40),
    ):
        for pixels in (32, 33):
            part = image[:, top : top + height, left : left + width]
            batch = torch.full((3, pixels, pixels, 3), 77, dtype=torch.uint8)
            resize(part, (pixels, pixels), mode, True, batch.permute(0, 3, 1, 2)[1])
            expected = functional.resize(part, [pixels, pixels], interpolation=mode, antialias=True)
            assert torch.equal(batch[1].permute(2, 0, 1), expected)
            assert torch.equal(resize(part.contiguous(), (pixels, pixels), mode, True), expected)
            assert bool((batch[0] == 77).all())
            assert bool((batch[2] == 77).all())
    without = functional.resize(image, [20, 20], interpolation=mode, antialias=False)
    assert torch.equal(resize(image, (20, 20), mode, False, empty_image((20, 20))), without)


# ---- very long images -------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "levels"), [(InterpolationMode.BILINEAR, 1), (InterpolationMode.BICUBIC, 2)])
@pytest.mark.parametrize(
    ("size", "resized", "crop"),
    [
        *(((2, 900), 64, 48), ((900, 2), 64, 48), ((1, 1000), 32, 31), ((70, 7001), 64, 64), ((640, 20000), 64, 40)),
        *(((333, 5000), 50, 33), ((300, 400), 256, 224), ((41, 40), 7, 7), ((64, 6400), 64, 64), ((13, 4001), 29, 28)),
    ],
)
def test_the_centre_alone_has_the_pixels_of_the_long_way(
    size: tuple[int, int],
    resized: int,
    crop: int,
    mode: InterpolationMode,
    levels: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = torch.from_numpy(np.random.default_rng(size[1]).integers(0, 256, (3, *size), np.uint8))
    whole = transform(resized, crop, mode)(image)
    monkeypatch.setattr(transforms, "RESIZED_BYTES_MAX", 0)
    centre = transform(resized, crop, mode)(image)
    assert largest_difference(centre, whole) <= levels
    assert (centre.int() - whole.int()).abs().float().mean() < 0.2


@pytest.mark.parametrize("size", [(1, 4_000_000), (4_000_000, 1), (2, 60_000), (60_000, 2), (300, 500_000)])
def test_a_very_long_image_costs_no_more_than_it_has(size: tuple[int, int]) -> None:
    """Resized, the first would take 3 GB for each row of the crop."""
    image = torch.zeros((3, *size), dtype=torch.uint8)
    image[:, size[0] // 3 : size[0] - size[0] // 3, size[1] // 3 : size[1] - size[1] // 3] = 200
    resource.setrlimit(resource.RLIMIT_AS, (used_memory() + 2**31, resource.RLIM_INFINITY))
    try:
        seen = transform()(image)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert seen.shape == (3, 224, 224)
    assert int(seen[:, 112, 112].min()) == 200


def used_memory() -> int:
    """Bytes of address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def test_images_below_the_limit_are_resized_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB: ratios of 325 at a short side of 256."""
    monkeypatch.setattr(transforms, "centre_of_resized", lambda *_: pytest.fail("the centre alone"))
    transform()(fixed_image(16, 5000))
