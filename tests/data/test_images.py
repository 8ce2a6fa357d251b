"""The check of a JPEG decodes less than a reader, and finds the same damage. Rewritten images have no metadata."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image

from recipe.data.images import DamagedImageError, Rules, reason, store
from tests.builders.images import JPEG_KINDS, KEEP, damaged, encoded, picture, pixels


def verdict_of_all_pixels(content: bytes) -> str:
    """The damage found by decoding to pixels: the oracle."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
                image.load()
                return f"{image.mode} {image.size}"
    except Exception as error:
        return reason(content, error)


def verdict(content: bytes) -> str | None:
    """The reported damage of an image that keeps its bytes. None: the image is converted."""
    try:
        stored = store(content, False, KEEP)
    except DamagedImageError as error:
        return str(error)
    if stored.unusual is not None:
        return None
    assert stored.content == content
    return f"{'L' if stored.is_grey else 'RGB'} {(stored.width, stored.height)}"


@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_the_check_finds_the_damage_of_a_full_decode(kind: str) -> None:
    verdicts = set()
    count = {"sound": 0, "rejected": 0}
    for content in damaged(picture(kind), np.random.default_rng(list(kind.encode()))):
        said = verdict(content)
        if said is None:
            continue
        if said.startswith(("L ", "RGB ")):  # otherwise the reader may have filled in missing pixels
            assert said == verdict_of_all_pixels(content)
        verdicts.add(said)
        count["sound" if said.startswith(("L ", "RGB ")) else "rejected"] += 1
    assert min(count.values()) >= 10
    assert len(verdicts) >= 4


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (8, 8), (9, 300)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_sound_image_is_described_as_it_came(size: tuple[int, int], channels: int) -> None:
    content = encoded(pixels("sound", *size, channels=channels))
    stored = store(content, False, KEEP)
    assert (stored.content, stored.width, stored.height) == (content, *size)
    assert stored.is_grey == (channels == 1)
    assert stored.unusual is None


METADATA: dict[str, Any] = {
    "icc_profile": b"profile" * 20,
    "comment": b"hello",
    "exif": b"Exif\0\0II*\0",
    "dpi": (300, 300),
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_resized_image_has_no_metadata(mode: str) -> None:
    content = encoded(pixels("with metadata", 90, 60).convert(mode), **METADATA)
    stored = store(content, False, Rules(keeps_png=False, resize_short_side=30, quality=77))
    with Image.open(io.BytesIO(content)) as image:
        plain = Image.fromarray(np.asarray(image.convert("RGB") if mode == "CMYK" else image))
    small = plain.resize((45, 30), Image.Resampling.BILINEAR)
    assert stored.content == encoded(small, quality=77)
    assert not any(value in stored.content for value in (b"hello", b"profile", b"Exif"))


def test_a_truncated_image_is_refused_also_if_it_is_resized() -> None:
    content = encoded(pixels("cut", 400, 300))
    with pytest.raises(DamagedImageError, match="truncated"):
        store(content[: 2 * len(content) // 3], False, Rules(keeps_png=False, resize_short_side=30, quality=77))


@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_pixels_that_are_resized_are_pillows(kind: str) -> None:
    """The library that checks a JPEG also decodes it here."""
    content = picture(kind)
    with Image.open(io.BytesIO(content)) as image:
        oracle = Image.fromarray(np.asarray(image)).resize((43, 30), Image.Resampling.BILINEAR)
    stored = store(content, False, Rules(keeps_png=False, resize_short_side=30, quality=90))
    assert (stored.unusual, stored.content) == (None, encoded(oracle, quality=90))
