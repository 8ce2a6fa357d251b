"""Decoding no further than needed: the same pixels to the last bit, whatever kind of JPEG it is."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from recipe.config import Decoder
from recipe.data.jpeg import Content, read_header, upper_rows
from recipe.data.transforms import (
    PartialPicture,
    WholePicture,
    build_decoder,
    decode_with_pillow,
    empty_image,
    fixed_image,
    opened,
    resize,
    uses_native_kernel,
)


def jpeg(height: int, width: int, **options: object) -> bytes:
    """A JPEG full of detail, so that a wrong row or a wrong neighbour shows."""
    noise = np.random.default_rng((height, width)).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    (picture.convert("L") if options.pop("grey", False) else picture).save(stream, "JPEG", **options)
    return stream.getvalue()


KINDS = {
    "colour as fine as light": {"subsampling": "4:4:4", "quality": 95},
    "half as wide": {"subsampling": "4:2:2"},
    "half as wide and high": {"subsampling": "4:2:0"},
    "grey": {"grey": True},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_rows": 1, "subsampling": "4:2:0"},
    "with EXIF and a comment": {"exif": Image.Exif().tobytes(), "comment": b"\xff\xc0\xff\xda"},
}


@pytest.fixture(scope="module")
def decode() -> Callable[[bytes], Tensor]:
    return build_decoder(Decoder.torchcodec)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 96), (97, 51), (200, 133)])
def test_upper_rows_have_the_pixels_of_the_whole(
    kind: str, size: tuple[int, int], decode: Callable[[bytes], Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    content = jpeg(*size, **KINDS[kind])
    whole, header = decode(content), read_header(content)
    assert header is not None
    assert (header.height, header.width) == size == tuple(whole.shape[-2:])
    shortened = 0
    for bottom in range(1, size[0] + 1, 5):
        cut = upper_rows(content, header, bottom)
        rows = decode(cut)
        shortened += rows.shape[1] < size[0]
        assert len(cut) == len(content)
        assert bottom <= rows.shape[1] <= size[0]
        assert torch.equal(rows[:, :bottom], whole[:, :bottom])
        assert torch.equal(
            PartialPicture(content, header, decode, True).part(0, 3, bottom, 40), whole[:, :bottom, 3:43]
        )
    assert (shortened > 0) == (kind != "progressive"), "only rows that follow one another can be left out"
    capfd.readouterr()  # libjpeg warns of what it skips


def test_what_is_no_plain_jpeg_is_decoded_whole() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (9, 7)).save(stream, "PNG")
    picture = opened(stream.getvalue(), decode_with_pillow, stops_early=True)
    assert isinstance(picture, WholePicture)
    assert picture.size == (7, 9)


def test_a_decoder_that_may_not_stop_early_is_given_all_of_a_file() -> None:
    content, given = jpeg(60, 50), []

    def noting(content: Content) -> Tensor:
        given.append(content)
        return decode_with_pillow(content)

    part = opened(content, noting, stops_early=False).part(3, 4, 5, 6)
    assert torch.equal(part, decode_with_pillow(content)[:, 3:8, 4:10])
    assert given == [content]


@pytest.mark.parametrize("length", range(0, 640, 7))
def test_a_header_that_is_cut_off_or_damaged_is_none_or_harmless(length: int) -> None:
    content = jpeg(30, 40)
    for damaged in (content[:length], content[:length] + b"\xff\xc0\x00\x02" + content[length:]):
        header = read_header(damaged)
        if header is not None:
            assert len(upper_rows(damaged, header, 3)) == len(damaged)


@pytest.mark.parametrize("mode", [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
def test_resizing_into_a_batch_is_torchvisions_and_touches_nothing_else(mode: InterpolationMode) -> None:
    """The kernel works in words of four bytes on pixels of three."""
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
