"""Partial decoding: pixels and errors are those of Pillow (T7, T35)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from recipe.config.schema import Decoder
from recipe.data import decoding
from recipe.data.decoding import (
    ImageDecoder,
    NvImageCodecDecoder,
    PartialImage,
    PillowDecoder,
    UndecodableError,
    decoded,
)
from recipe.data.images import ORIENTATION_TAG, store
from tests.builders import images as damages
from tests.builders.images import encoded

PILLOW = PillowDecoder()
KINDS = {
    "colour as fine as light": {"subsampling": "4:4:4", "quality": 95},
    "half as wide": {"subsampling": "4:2:2"},
    "half as wide and high": {"subsampling": "4:2:0"},
    "half as high": {"subsampling": "4:2:2", "factors": (1, 2)},
    "a quarter as wide": {"subsampling": "4:2:0", "factors": (4, 1)},
    "tables of its own": {"optimize": True, "quality": 30},
    "grey": {"grey": True},
    "progressive": {"progressive": True},
    "progressive, half as wide": {"progressive": True, "subsampling": "4:2:2"},
    "restart markers": {"restart_marker_rows": 1, "subsampling": "4:2:0"},
    "RGB inside": {"keep_rgb": True},
    "with EXIF and a comment": {"exif": Image.Exif().tobytes(), "comment": b"\xff\xc0\xff\xda"},
}
SIZES = [(64, 96), (97, 51), (200, 133), (7, 9), (1, 1), (3, 40)]


def jpeg(height: int, width: int, **options: object) -> bytes:
    """A JPEG full of detail, to detect a wrong row or column."""
    if "factors" in options:
        return relabelled(height, width, **options)  # type: ignore[arg-type]
    noise = np.random.default_rng((height, width)).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    return encoded(picture.convert("L") if options.pop("grey", False) else picture, "JPEG", **options)


def relabelled(height: int, width: int, subsampling: str, factors: tuple[int, int]) -> bytes:
    """A JPEG with sampling factors (across, down) that Pillow does not write, made from one with as many blocks.

    The image is garbled, but each block has a valid position.
    """
    across, down = factors
    units = -(-height // (8 * down)), -(-width // (8 * across))
    unit = (8, 16) if subsampling == "4:2:2" else (16, 16)
    content = bytearray(jpeg(units[0] * unit[0], units[1] * unit[1], subsampling=subsampling))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = height.to_bytes(2) + width.to_bytes(2)
    content[frame + 11] = across << 4 | down
    return bytes(content)


def exif(orientation: int) -> Image.Exif:
    values = Image.Exif()
    values[ORIENTATION_TAG] = orientation
    return values


@pytest.fixture(scope="module")
def decoder() -> NvImageCodecDecoder:
    return NvImageCodecDecoder()


@pytest.fixture
def alone(decoder: NvImageCodecDecoder, monkeypatch: pytest.MonkeyPatch) -> NvImageCodecDecoder:
    """The library without Pillow as a fallback."""

    def asked(self: PillowDecoder, content: bytes) -> None:
        raise AssertionError("Pillow was asked")

    monkeypatch.setattr(PillowDecoder, "open", asked)
    return decoder


# ---- pixels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_any_part_has_the_pixels_of_pillows_full_image(
    kind: str, size: tuple[int, int], decoder: NvImageCodecDecoder
) -> None:
    content = jpeg(*size, **KINDS[kind])
    whole, picture = decoded(content, PILLOW), decoder.open(content)
    assert isinstance(picture, PartialImage)
    assert picture.size == size == tuple(whole.shape[-2:])
    assert torch.equal(decoded(content, decoder), whole)
    generator = np.random.default_rng(0)
    for _ in range(40):
        height, width = (int(generator.integers(1, side + 1)) for side in size)
        top, left = int(generator.integers(size[0] - height + 1)), int(generator.integers(size[1] - width + 1))
        part = picture.part(top, left, height, width)
        assert part.dtype is torch.uint8
        assert part.stride(0) == 1, "channels last"
        assert torch.equal(part, whole[:, top : top + height, left : left + width])


@pytest.mark.parametrize(
    "kind", ["half as wide and high", "half as wide", "half as high", "a quarter as wide", "progressive"]
)
@pytest.mark.parametrize("width", [1, 2, 9, 17, 33, 34, 35, 50])
def test_the_narrowest_parts_equal_the_full_image_too(kind: str, width: int, decoder: NvImageCodecDecoder) -> None:
    """Otherwise the first and last columns of the library differ by up to 13 levels."""
    content = jpeg(34, width, **KINDS[kind])
    whole, picture = decoded(content, PILLOW), decoder.open(content)
    for columns in (1, 2, 3, 5):
        for left in range(width - columns + 1):
            assert torch.equal(picture.part(17, left, 3, columns), whole[:, 17:20, left : left + columns])


def test_no_more_is_decoded_than_is_looked_at(decoder: NvImageCodecDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    decode = NvImageCodecDecoder.region

    def noting(self: NvImageCodecDecoder, stream: object, *region: int) -> Tensor | None:
        asked.append(region)
        return decode(self, stream, *region)

    monkeypatch.setattr(NvImageCodecDecoder, "region", noting)
    picture = decoder.open(jpeg(300, 400))
    picture.part(100, 200, 50, 60)
    picture.part(100, 399, 50, 1)
    assert asked == [(100, 200, 150, 260), (100, 392, 150, 400)]


@pytest.mark.parametrize("scans", range(1, 10))
def test_a_progressive_picture_without_its_last_scans_has_one_look(scans: int, decoder: NvImageCodecDecoder) -> None:
    """libjpeg smooths missing parts. Otherwise parts of the library differ by up to 37 levels."""
    content = jpeg(200, 300, progressive=True)
    begins = [found.start() for found in re.finditer(b"\xff\xda", content)]
    tables = content.find(b"\xff\xc4", begins[scans - 1], begins[scans])
    cut = content[: tables if tables > 0 else begins[scans]] + b"\xff\xd9"
    whole, picture = decoded(cut, PILLOW), decoder.open(cut)
    for top, left, height, width in ((0, 0, 20, 30), (33, 40, 100, 151), (180, 280, 20, 20)):
        assert torch.equal(picture.part(top, left, height, width), whole[:, top : top + height, left : left + width])


def test_the_exact_decoding_options_have_an_effect(
    decoder: NvImageCodecDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = jpeg(97, 131, subsampling="4:2:0")
    monkeypatch.setattr(decoding, "EXACT", ":fancy_upsampling=0")
    assert not torch.equal(decoded(content, NvImageCodecDecoder()), decoded(content, decoder))


@pytest.mark.parametrize("kind", KINDS)
def test_pillow_is_not_needed_for_a_sound_jpeg(kind: str, alone: NvImageCodecDecoder) -> None:
    """Otherwise loading would be slow without a visible reason."""
    picture = alone.open(jpeg(97, 131, **KINDS[kind]))
    assert picture.part(3, 4, 50, 60).shape == (3, 50, 60)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_png_is_decoded_without_loss(mode: str, decoder: NvImageCodecDecoder) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (33, 47, 3), np.uint8)
    picture = Image.fromarray(noise).convert(mode)
    expected = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decoded(encoded(picture, "PNG"), decoder), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", list(Decoder))
def test_no_decoder_applies_an_exif_orientation(name: Decoder, orientation: int) -> None:
    plain, marked = jpeg(40, 64), jpeg(40, 64, exif=exif(orientation))
    library = decoding.build_decoder(name)
    assert marked != plain
    assert library.open(marked).size == (40, 64)
    assert torch.equal(decoded(marked, library), decoded(plain, library))


def test_threads_share_a_decoder(decoder: NvImageCodecDecoder) -> None:
    contents = [jpeg(100 + i, 150 - i) for i in range(8)]
    expected = [decoded(content, PILLOW) for content in contents]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            found = list(pool.map(lambda content: decoded(content, decoder), contents))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# ---- what is no image, or a damaged one -------------------------------------------------------------


@pytest.mark.parametrize("name", list(Decoder))
@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"GIF89a" + bytes(50), bytes(100)])
def test_other_files_than_images_are_undecodable(name: Decoder, content: bytes) -> None:
    with pytest.raises(UndecodableError) as raised:
        decoded(content, decoding.build_decoder(name))
    assert "0x" not in str(raised.value), "the same words on every run"


@pytest.mark.parametrize("name", list(Decoder))
def test_a_cut_off_image_is_an_error_not_grey_pixels(name: Decoder) -> None:
    content = jpeg(97, 131)
    with pytest.raises(UndecodableError, match="truncated"):
        decoded(content[: len(content) // 2], decoding.build_decoder(name))


@pytest.mark.parametrize("kind", damages.JPEG_KINDS)
def test_of_a_damaged_image_both_say_the_same(kind: str, decoder: NvImageCodecDecoder) -> None:
    """The pixels of Pillow, of parts too, or the reason of Pillow."""
    refused, generator = 0, np.random.default_rng(2)
    for content in damages.damaged(damages.picture(kind), np.random.default_rng(1)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of corrupt EXIF
            expected, found = outcome(content, PILLOW), outcome(content, decoder)
        assert type(found) is type(expected), (expected, found)
        assert torch.equal(found, expected) if isinstance(found, Tensor) else found == expected  # type: ignore[arg-type]
        refused += isinstance(found, str)
        if isinstance(expected, Tensor):
            top, left = (int(generator.integers(side)) for side in expected.shape[1:])
            part = decoder.open(content).part(top, left, expected.shape[1] - top, expected.shape[2] - left)
            assert torch.equal(part, expected[:, top:, left:])
    assert refused > 10


def outcome(content: bytes, library: ImageDecoder) -> Tensor | str:
    try:
        return decoded(content, library)
    except UndecodableError as error:
        return str(error)


# ---- the library ------------------------------------------------------------------------------------

LOADING = """
import os
from recipe.config.schema import Decoder
from recipe.data.decoding import build_decoder, decoded
before = dict(os.environ)
os.makedirs(os.environ["TMPDIR"])
print(tuple(decoded(open(0, "rb").read(), build_decoder(Decoder.nvimgcodec)).shape))
assert dict(os.environ) == before
assert os.listdir(os.environ["TMPDIR"]) == []
"""


@pytest.mark.process
def test_loading_prints_nothing_and_leaves_no_files(tmp_path: Path) -> None:
    """On a machine without CUDA its other extensions would print eight lines."""
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run(
        [sys.executable, "-c", LOADING], input=jpeg(30, 40), capture_output=True, check=True, env=environment
    )
    assert done.stdout.decode() == "(3, 30, 40)\n"
    assert done.stderr == b""


REFUSED = """
from recipe.config.schema import Decoder
from recipe.data import decoding
from recipe.errors import UserError
{cause}
decoding.build_decoder(Decoder.pillow)
try:
    decoding.build_decoder(Decoder.nvimgcodec)
except UserError as error:
    print(error)
"""


CAUSES = {
    "it is not installed": "decoding.importlib.util.find_spec = lambda name: None",
    "it does not decode JPEG here": "decoding.PROCESSOR_EXTENSION = 'nothing*'",
    "module 'nvidia.nvimgcodec' has no attribute 'ColorSpec'": "del decoding.load_nvimgcodec().ColorSpec",
}


@pytest.mark.process
@pytest.mark.parametrize("why", CAUSES)
def test_an_unusable_decoder_is_reported_at_once_with_the_reason(why: str) -> None:
    """Otherwise Pillow would decode every image, and loading would be slow without a message."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSED.format(cause=CAUSES[why])], capture_output=True, check=True, text=True
    )
    assert done.stdout.startswith(f"nvImageCodec (loader.decoder=nvimgcodec) cannot be used on this machine ({why})")


SILENCED = """
import sys
from recipe.config.schema import Decoder
from recipe.data.decoding import build_decoder, decoded
from recipe.data.images import silence_decoders
if {silenced}:
    silence_decoders()
decoded(open(0, "rb").read(), build_decoder(Decoder.nvimgcodec))
print("said by Python", file=sys.stderr)
"""


@pytest.mark.process
@pytest.mark.parametrize("silenced", [True, False])
def test_decoding_processes_do_not_print_warnings_of_libjpeg(silenced: bool) -> None:
    stray = jpeg(97, 131)[:-2] + bytes(13) + b"\xff\xd9"
    assert store(stray, False, damages.KEEP).unusual == "stray bytes in a JPEG", "shards do not have them"
    done = subprocess.run(
        [sys.executable, "-c", SILENCED.format(silenced=silenced)], input=stray, capture_output=True, check=True
    )
    assert done.stderr.endswith(b"said by Python\n")
    assert (done.stderr == b"said by Python\n") == silenced
