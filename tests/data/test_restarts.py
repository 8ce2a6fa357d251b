"""A part of a picture, cut out between restart markers: the same pixels to the last bit, or no cut at all."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from PIL import features
from torch import Tensor

from recipe.config import Decoder
from recipe.data.jpeg import Header, read_header
from recipe.data.restarts import excerpt, interval_for
from recipe.data.transforms import build_decoder, decode_with_pillow, opened
from tests.data.test_jpeg import jpeg

KINDS = {
    "half as wide and high": ({"subsampling": "4:2:0"}, 16),
    "half as wide": ({"subsampling": "4:2:2"}, 16),
    "colour as fine as light": ({"subsampling": "4:4:4"}, 8),
    "grey": ({"grey": True}, 8),
}
SIZES = [(64, 96), (97, 51), (131, 200), (33, 163), (16, 300), (75, 19), (40, 67)]  # 163, 67 and 19 end in 3 columns
DIVISIONS = {  # what Pillow is asked for, by the units in a row
    "rows": lambda across: {"restart_marker_rows": 1},
    "two rows": lambda across: {"restart_marker_rows": 2},
    "units": lambda across: {"restart_marker_blocks": 1},
    "parts of rows": lambda across: {"restart_marker_blocks": interval_for(across * 16, 16)},
}


@pytest.fixture(scope="module")
def decode() -> Callable[[bytes], Tensor]:
    return build_decoder(Decoder.torchcodec)


def crops(height: int, width: int, count: int) -> list[tuple[int, int, int, int]]:
    """Random parts of a picture, those at its corners and of one pixel among them."""
    chance = random.Random(height * 1000 + width)
    found = [(0, 0, 1, 1), (height - 1, width - 1, 1, 1), (height // 2, 0, 1, width), (0, width - 2, height, 2)]
    for _ in range(count):
        size = chance.randint(1, height), chance.randint(1, width)
        found.append((chance.randint(0, height - size[0]), chance.randint(0, width - size[1]), *size))
    return found


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_has_the_pixels_of_the_whole(
    kind: str, division: str, decode: Callable[[bytes], Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    options, unit = KINDS[kind]
    is_same_library = features.version("libjpeg_turbo") is not None
    cuts = 0
    for size in SIZES:
        content = jpeg(*size, **options, **DIVISIONS[division](-(-size[1] // unit)))
        header = read_header(content)
        assert header is not None
        wholes = [(decode, decode(content))] + [(decode_with_pillow, decode_with_pillow(content))] * is_same_library
        for top, left, height, width in crops(*size, 12):
            cut = excerpt(content, header, top, left, height, width)
            cuts += cut is not None
            for decoder, whole in wholes:
                part = opened(content, decoder, stops_early=False).part(top, left, height, width)
                assert torch.equal(part, whole[:, top : top + height, left : left + width])
            if cut is not None:
                shown = decode(cut.content)
                assert shown.shape[1] * shown.shape[2] < size[0] * size[1]
                assert len(cut.content) < len(content)
    assert cuts > 40
    assert capfd.readouterr().err == "", "what is cut out is a whole JPEG, of which no decoder complains"


def test_little_more_is_decoded_than_is_looked_at(decode: Callable[[bytes], Tensor]) -> None:
    content = jpeg(256, 384, subsampling="4:2:0", restart_marker_blocks=4)
    header = read_header(content)
    assert header is not None
    cut = excerpt(content, header, 100, 140, 40, 100)
    assert cut is not None
    assert (cut.top, cut.left) == (96, 128)
    assert tuple(decode(cut.content).shape) == (3, 48, 128)
    assert len(cut.content) < len(content) / 5


@pytest.mark.parametrize("options", [{}, {"progressive": True, "restart_marker_rows": 1}, {"restart_marker_blocks": 5}])
def test_where_markers_divide_nothing_there_is_no_part(options: dict[str, object]) -> None:
    content = jpeg(64, 96, **options)
    header = read_header(content)
    assert header is not None
    assert excerpt(content, header, 10, 10, 5, 5) is None


def test_of_a_picture_that_is_needed_as_a_whole_there_is_no_part() -> None:
    content = jpeg(64, 96, restart_marker_blocks=1)
    header = read_header(content)
    assert header is not None
    assert excerpt(content, header, 0, 0, 64, 96) is None


def result_of(read: Callable[[], Tensor]) -> Tensor | str:
    """Pixels, or the kind of the decoder's own error."""
    try:
        return read()
    except Exception as error:  # each decoder raises its own kinds
        return type(error).__name__


def divided(kind: str) -> tuple[bytes, Header]:
    """A picture as preprocessing divides it, and its header."""
    options, unit = KINDS[kind]
    sound = jpeg(97, 163, **options, restart_marker_blocks=interval_for(163, unit))
    header = read_header(sound)
    assert header is not None
    return sound, header


@pytest.mark.parametrize("kind", KINDS)
def test_of_damaged_bytes_the_pixels_or_the_error_are_those_of_the_whole(
    kind: str, decode: Callable[[bytes], Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    """Bytes of the pixels changed, put in, left out, or markers among them; also what ends too early."""
    sound, header = divided(kind)
    chance, cuts = random.Random(kind), 0
    for _ in range(150):
        at = chance.randrange(header.scan, len(sound))
        put = bytes([0xFF, chance.choice((0xD0, 0xD3, 0xD9, 0xC4, 0xFF))]) if chance.random() < 0.3 else b""
        put += chance.randbytes(chance.randrange(3))
        damaged = sound[:at] + put + sound[at + chance.randrange(4) :]
        if chance.random() < 0.1:
            damaged = sound[:at]
        whole = result_of(lambda damaged=damaged: decode(damaged))
        for top, left, height, width in crops(97, 163, 3)[2:]:
            cuts += excerpt(damaged, header, top, left, height, width) is not None
            picture = result_of(lambda damaged=damaged: opened(damaged, decode, stops_early=False))
            if isinstance(picture, str):
                assert picture == whole
                continue
            box = (top, left, height, width)
            part = result_of(lambda picture=picture, box=box: picture.part(*box))
            if isinstance(whole, str) or isinstance(part, str):
                assert part is whole or part == whole
                continue
            assert torch.equal(part, whole[:, top : top + height, left : left + width])
    assert cuts > 50
    capfd.readouterr()


@pytest.mark.parametrize("kind", KINDS)
def test_of_damaged_headers_the_pixels_or_the_error_are_those_of_the_whole(
    kind: str, decode: Callable[[bytes], Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    sound, header = divided(kind)
    chance = random.Random(kind)
    ends = range(2, header.scan)
    interesting = [sound.index(b"\xff\xdd") + at for at in range(6)] + [header.frame + at for at in range(19)]
    for _ in range(250):
        at = chance.choice(interesting if chance.random() < 0.8 else ends)
        damaged = sound[:at] + bytes([sound[at] ^ 1 << chance.randrange(8)]) + sound[at + 1 :]
        whole = result_of(lambda damaged=damaged: decode(damaged))
        picture = result_of(lambda damaged=damaged: opened(damaged, decode, stops_early=False))
        part = picture if isinstance(picture, str) else result_of(lambda picture=picture: picture.part(40, 90, 30, 33))
        if isinstance(whole, str) or isinstance(part, str):
            assert part is whole or part == whole
            continue
        assert torch.equal(part, whole[:, 40:70, 90:123])
    capfd.readouterr()


@pytest.mark.parametrize("unit", [8, 16])
def test_an_interval_divides_a_row(unit: int) -> None:
    most = 64 // unit
    for width in range(1, 700):
        across = -(-width // unit)
        units = interval_for(width, unit)
        assert 1 <= units <= most
        assert across % units == 0
        assert all(across % more for more in range(units + 1, most + 1))
