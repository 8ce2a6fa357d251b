"""People's own pictures: every ordinary kind becomes RGB, a hostile one becomes a sentence."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recipe.data.decoding import PillowDecoder, decoded
from recipe.errors import UserError
from recipe.inference.pictures import pixels_of
from tests.builders.images import pixels

ORIENTATION = 0x0112


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def rgb_of(content: bytes, apply_orientation: bool = False) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return pixels_of(content, apply_orientation).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_an_ordinary_picture_is_what_pillow_shows(form: str) -> None:
    content = saved(pixels("picture"), form)
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(rgb_of(content), np.asarray(image.convert("RGB")))


def test_a_jpeg_has_the_pixels_of_the_evaluation() -> None:
    content = saved(pixels("picture"), "JPEG")
    assert torch.equal(pixels_of(content, apply_orientation=False), decoded(content, PillowDecoder()))


def test_cmyk_is_converted() -> None:
    content = saved(pixels("picture").convert("CMYK"), "JPEG", quality=95)
    assert np.abs(rgb_of(content).astype(int) - np.asarray(pixels("picture")).astype(int)).mean() < 30


def test_a_palette_keeps_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    assert rgb_of(saved(image, "PNG")).tolist() == [[[255, 0, 0], [0, 0, 255]]]


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (2, 1))
    image.putdata([(10, 20, 30, 0), (10, 20, 30, 255)])
    assert rgb_of(saved(image, "PNG")).tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_16_bits_keep_their_high_byte() -> None:
    image = Image.fromarray(np.array([[0, 0x1234, 0xFFFF]], dtype=np.uint16))
    assert rgb_of(saved(image, "PNG"))[0, :, 0].tolist() == [0, 0x12, 0xFF]


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    content = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert rgb_of(content)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("apply_orientation", [True, False])
def test_a_photograph_on_its_side_is_turned_only_if_asked(apply_orientation: bool) -> None:
    upright = pixels("picture", 40, 30)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # shown after a quarter turn clockwise
    content = saved(upright, "PNG", exif=exif)
    expected = np.rot90(np.asarray(upright), -1) if apply_orientation else np.asarray(upright)
    assert np.array_equal(rgb_of(content, apply_orientation), expected)


def test_paths_arrays_images_and_tensors_are_alike(tmp_path: Path) -> None:
    image = pixels("picture")
    (tmp_path / "x.png").write_bytes(saved(image, "PNG"))
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for picture in (tmp_path / "x.png", str(tmp_path / "x.png"), image, array, tensor):
        assert torch.equal(pixels_of(picture, apply_orientation=True), tensor)


def enormous() -> bytes:
    return saved(Image.new("1", (20000, 20000)), "PNG")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"it is empty \(0 bytes\)"),
        (b"hello, I am no picture", "is none of JPEG"),
        (saved(pixels("cut", 200, 150), "JPEG")[:900], "is damaged: it is truncated"),
        (saved(pixels("cut", 200, 150), "JPEG")[:900] + b"\xff\xd9", "is damaged: it is truncated"),
        (saved(pixels("cut", 200, 150), "JPEG")[:20], "not a picture that can be read: it is a damaged JPEG"),
        (enormous, "is too large: .*max_pixels=178956970"),
    ],
)
def test_a_hostile_or_damaged_file_is_refused_in_one_line(content: bytes | Callable[[], bytes], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refused:
        pixels_of(content if isinstance(content, bytes) else content(), apply_orientation=True)
    assert "\n" not in str(refused.value)


def test_max_pixels_is_an_argument(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(saved(Image.new("1", (3000, 3000)), "PNG"))
    assert pixels_of(tmp_path / "large.png", apply_orientation=False).shape == (3, 3000, 3000)
    said = r"large\.png is too large: 3000 x 3000 pixels, while max_pixels=8999999; make it smaller, or give more"
    with pytest.raises(UserError, match=said):
        pixels_of(tmp_path / "large.png", apply_orientation=False, max_pixels=3000 * 3000 - 1)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jpg cannot be read: No such file"):
        pixels_of(tmp_path / "gone.jpg", apply_orientation=True)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8), np.zeros((4, 4), dtype=np.uint8)]
)
def test_pixels_of_another_type_or_shape_are_refused(wrong: Any) -> None:
    with pytest.raises(UserError, match="wanted: uint8 RGB"):
        pixels_of(wrong, apply_orientation=True)
