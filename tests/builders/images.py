"""Small pictures and image files, sound and damaged."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from recipe.data.images import Rules


def pixels(name: str, width: int = 40, height: int = 30, channels: int = 3) -> Image.Image:
    """A picture that differs with its name."""
    generator = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()[:8]))
    coarse = generator.integers(0, 256, (4, 4, channels), dtype=np.uint8)
    image = Image.fromarray(coarse if channels > 1 else coarse[:, :, 0])
    return image.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def jpeg(name: str) -> bytes:
    """A JPEG whose size and content follow from its name."""
    return encoded(pixels(name, 30 + len(name), 20 + ord(name[-1]) % 16), quality=90)


def png_header_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be enormous."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_header_of(width: int, height: int) -> bytes:
    """A small JPEG whose frame header claims to be enormous."""
    content = bytearray(jpeg("x"))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


KEEP = Rules(keeps_png=False, resize_short_side=None, quality=90)


JPEG_KINDS: dict[str, dict[str, Any]] = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:4:4": {"subsampling": "4:4:4"},
    "grey": {},
    "restart markers": {"restart_marker_blocks": 3},
    "progressive": {"progressive": True, "subsampling": "4:2:0"},
    "progressive 4:4:4": {"progressive": True, "subsampling": "4:4:4"},
    "progressive grey": {"progressive": True},
    "progressive, restart markers": {"progressive": True, "restart_marker_rows": 1},
    "RGB inside": {"keep_rgb": True},
    "two pictures": {"save_all": True, "append_images": [pixels("behind", 50, 40)]},
}


MARKERS = (0x01, 0xC0, 0xC2, 0xC4, 0xC9, 0xD0, 0xD7, 0xD8, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xE0, 0xEE, 0xFE)


DAMAGES = 12  # of each sort


def picture(kind: str) -> bytes:
    """A JPEG of that kind, detailed enough for several hundred bytes of coefficients."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    image = Image.fromarray(noise).resize((100, 70), Image.Resampling.BICUBIC)
    form = "MPO" if kind == "two pictures" else "JPEG"
    return encoded(image.convert("L") if "grey" in kind else image, form, quality=90, **JPEG_KINDS[kind])


def damaged(content: bytes, generator: np.random.Generator) -> Iterator[bytes]:
    """Bits flipped, bytes changed, cut, deleted, zeroed, repeated, and markers where none belong."""
    for first in (0, content.index(b"\xff\xda")) * DAMAGES:  # anywhere, and among the coefficients
        at, length = int(generator.integers(first, len(content))), int(generator.choice([1, 2, 20, 300]))
        flipped, changed = bytearray(content), bytearray(content)
        flipped[at] ^= 1 << int(generator.integers(8))
        for place in generator.integers(first, len(content), 20):
            changed[place] = int(generator.integers(256))
        behind = content[at + length :]
        yield from (bytes(flipped), bytes(changed), content[:at], content[:at] + behind)
        yield content[:at] + bytes(length) + behind
        yield content[: at + length] + content[at:]
        yield content[:at] + bytes([0xFF, int(generator.choice(MARKERS))]) + content[at + 2 :]
