"""Pixels: torchvision's, within a grey level of Pillow's, and never turned by EXIF (T8, T9, T35)."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms._presets import ImageClassification

from recipe.config import Decoder
from recipe.data.transforms import (
    EvaluationTransform,
    Normalisation,
    build_decoder,
    build_evaluation_transform,
    decode_with_pillow,
    fixed_image,
    pixels_sha256,
    without_exif,
)
from tests.conftest import compose_config

SIZES = [(300, 400), (400, 300), (257, 255), (60, 90), (224, 224), (500, 101)]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
ORIENTATION = 0x0112


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


def jpeg(picture: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", **{"quality": 90, **options})
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    values = Image.Exif()
    values[ORIENTATION] = orientation
    return values


def segment(marker: int, payload: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(payload) + 2).to_bytes(2) + payload


@pytest.fixture(scope="module")
def torchcodec() -> Callable[[bytes], Tensor]:
    return build_decoder(Decoder.torchcodec)


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


def test_the_fingerprint_sees_one_level_and_the_shape() -> None:
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


# ---- EXIF -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_no_decoder_applies_an_exif_orientation(orientation: int, torchcodec: Callable[[bytes], Tensor]) -> None:
    picture = smooth_picture(40, 64)
    plain, marked = jpeg(picture), jpeg(picture, exif=exif(orientation))
    assert marked != plain
    for decode in (torchcodec, decode_with_pillow):
        assert decode(marked).shape == (3, 40, 64)
        assert torch.equal(decode(marked), decode(plain))


@pytest.mark.parametrize("order", ["EXI", "IXE", "XEI", "EXE"])
def test_only_the_exif_segments_go(order: str, torchcodec: Callable[[bytes], Tensor]) -> None:
    picture = smooth_picture(40, 64)
    plain = jpeg(picture)
    segments = {
        "E": segment(0xE1, exif(6).tobytes()),
        "X": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\x00<x/>"),
        "I": segment(0xE2, b"ICC_PROFILE\x00\x01\x01" + bytes(500)),
    }
    marked = plain[:2] + b"".join(segments[kind] for kind in order) + plain[2:]
    expected = plain[:2] + b"".join(segments[kind] for kind in order if kind != "E") + plain[2:]
    assert without_exif(marked) == expected
    assert torch.equal(torchcodec(marked), torchcodec(plain))


def test_exif_behind_a_large_segment_goes_too(torchcodec: Callable[[bytes], Tensor]) -> None:
    plain = jpeg(smooth_picture(40, 64))
    profile = segment(0xE2, b"ICC_PROFILE\x00\x01\x01" + bytes(20_000))
    marked = plain[:2] + profile + segment(0xE1, exif(6).tobytes()) + plain[2:]
    assert decode_with_pillow(marked).shape == torchcodec(marked).shape
    assert without_exif(marked) == plain[:2] + profile + plain[2:]


def test_exif_behind_fill_bytes_goes_too(torchcodec: Callable[[bytes], Tensor]) -> None:
    """ITU T.81, B.1.1.2: any marker may be preceded by any number of bytes 0xFF."""
    plain = jpeg(smooth_picture(40, 64))
    marked = plain[:2] + b"\xff\xff" + segment(0xE1, exif(6).tobytes()) + plain[2:]
    assert decode_with_pillow(marked).shape == torchcodec(marked).shape


@pytest.mark.parametrize(
    "between", [b"\x00", b"stray", b"\xff\x00", b"\xff\xd0", b"\xff\xff\xff", b"\x00\xff\xd7\xff\x01 \xff\x00\xff"]
)
def test_exif_behind_stray_bytes_goes_too(between: bytes, torchcodec: Callable[[bytes], Tensor]) -> None:
    """libjpeg searches for the next marker and takes restart markers for nothing, so what it finds has to go."""
    plain = jpeg(smooth_picture(40, 64))
    marked = plain[:2] + segment(0xFE, b"a comment") + between + segment(0xE1, exif(6).tobytes()) + plain[2:]
    assert b"Exif" not in without_exif(marked)
    assert torch.equal(torchcodec(marked), torchcodec(plain))


def test_without_exif_the_bytes_stay_as_they_are() -> None:
    content = jpeg(smooth_picture(40, 64))
    assert without_exif(content) == content
    words = jpeg(smooth_picture(40, 64), comment=b"Exif\x00\x00 is only mentioned here")
    assert without_exif(words) == words


def test_cut_off_headers_neither_raise_nor_hang() -> None:
    content = jpeg(smooth_picture(40, 64), exif=exif(6))
    for length in range(700):
        assert len(without_exif(content[:length])) <= length
    for length in (0, 1, 0xFFFF):  # a segment that claims less than its own length field, or more than the file
        damaged = content[:2] + b"\xff\xe1" + length.to_bytes(2) + b"Exif\x00\x00" + content[2:]
        assert isinstance(without_exif(damaged), bytes)


# ---- decoders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"quality": 30}, {"optimize": True}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_decoders_agree(mode: str, options: dict[str, object], torchcodec: Callable[[bytes], Tensor]) -> None:
    content = jpeg(smooth_picture(97, 131).convert(mode), **options)
    one, other = torchcodec(content), decode_with_pillow(content)
    assert one.dtype is other.dtype is torch.uint8
    assert one.shape == (3, 97, 131)
    assert largest_difference(one, other) <= 2
    if mode == "L":
        assert torch.equal(one[0], one[1])
        assert torch.equal(one[0], one[2])


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_png_is_decoded_without_loss(mode: str, torchcodec: Callable[[bytes], Tensor]) -> None:
    picture = smooth_picture(33, 47).convert(mode)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    expected = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(torchcodec(stream.getvalue()), expected)


@pytest.mark.parametrize("decoder", list(Decoder))
@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"GIF89a" + bytes(50), bytes(100)])
def test_what_is_no_image_raises(decoder: Decoder, content: bytes) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - each decoder has its own kinds; the loader names the image
        build_decoder(decoder)(content)


@pytest.mark.parametrize("decoder", list(Decoder))
def test_a_cut_off_image_is_an_error_not_grey_pixels(decoder: Decoder) -> None:
    content = jpeg(smooth_picture(97, 131))
    with pytest.raises(Exception):  # noqa: B017, PT011
        build_decoder(decoder)(content[: len(content) // 2])
