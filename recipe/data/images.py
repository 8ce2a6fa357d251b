"""One image: is it sound, and in which bytes is it stored?

An image keeps its original bytes where every decoder reads them alike: a JPEG or PNG of 8-bit RGB or grey. Everything
else (CMYK, palettes, transparency, 16 bits, a PNG called .JPEG, a JPEG that does not end) is decoded once, here, and
stored as lossless RGB PNG, so that no decoder's opinion can change a result later. EXIF orientation is never applied:
training on ImageNet never did, and 1 in 1,000 of its images carries one.

Images come from strangers: the header is read first and pixels are capped, only two formats are tried, and a truncated
file is an error, never a grey-filled picture.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

PIXELS_MAX = 50_000_000  # the largest image of ILSVRC2012 has 37 million; Pillow's own limit is 179 million
FILE_BYTES_MAX = 4 * PIXELS_MAX  # an uncompressed picture of that size
JPEG_FORMATS = ("JPEG", "MPO")  # MPO: a JPEG with a second view behind it, which readers of JPEG ignore
JPEG_END, JPEG_SCAN = b"\xff\xd9", b"\xff\xda"  # inside a scan 0xFF is followed by 0 or a restart marker
ORIENTATION_TAG = 0x0112
PNG_BIT_DEPTH = 24  # byte of the file; libpng's colour type follows
PNG_PLAIN_COLOUR_TYPES = (0, 2)  # grey, RGB
GREY = "grey"
FILTER = "bilinear"  # what torchvision's references resize with, and two thirds of bicubic's time
ROTATED = "EXIF orientation, not applied"


class DamagedImageError(Exception):
    """The bytes are no sound image; the text says why."""


@dataclass(frozen=True)
class Rules:
    """What the settings ask of one split's images."""

    keeps_png: bool  # files named .png are PNG files by right
    resize_short_side: int | None  # pixels
    quality: int  # of the JPEG that a resized image becomes


@dataclass(frozen=True)
class StoredImage:
    """The bytes to store, and how they differ from those that came."""

    content: bytes
    extension: str  # the true format: jpg or png
    width: int
    height: int
    is_grey: bool
    is_rotated: bool  # carries an EXIF orientation other than upright
    oddity: str | None = None  # what was found, where it was not stored as it came
    done: str = ""


def store(content: bytes, is_named_png: bool, rules: Rules) -> StoredImage:
    """Check one image by decoding all of it and choose its stored form; raises `DamagedImageError`."""
    if len(content) > FILE_BYTES_MAX:
        raise DamagedImageError(f"{len(content)} bytes are more than the {FILE_BYTES_MAX} that are allowed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of corrupt EXIF and large images: neither changes what is done
        try:
            return stored_form(content, is_named_png, rules)
        except (DamagedImageError, MemoryError):
            raise
        except Exception as error:  # on hostile bytes Pillow's parsers raise about anything
            raise DamagedImageError(reason(content, error)) from error


def stored_form(content: bytes, is_named_png: bool, rules: Rules) -> StoredImage:
    """As `store`, with Pillow's own errors."""
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
        if image.width * image.height > PIXELS_MAX:
            raise DamagedImageError(too_large(f"{image.width} x {image.height}"))
        oddity = odd_kind(image, content, is_named_png and rules.keeps_png)
        is_rotated = orientation(image) not in (0, 1)
        if rules.resize_short_side is not None and min(image.size) > rules.resize_short_side:
            return resized(image, rules.resize_short_side, rules.quality, oddity, is_rotated)
        if oddity is not None:
            return as_png(image, oddity, is_rotated)
        extension = "jpg" if image.format in JPEG_FORMATS else "png"
        as_it_came = StoredImage(content, extension, image.width, image.height, image.mode == "L", is_rotated)
        check(image)
        return as_it_came


def check(image: Image.Image) -> None:
    """Decode all that can be corrupt: every marker and every coefficient of every component.

    What follows in a decoder of JPEG (inverse transform, upsampling, colours) is arithmetic that cannot fail, so
    libjpeg is asked for the least of it: brightness, at an eighth of the size. Size and mode of `image` change.
    """
    if image.format in JPEG_FORMATS:
        image.draft("L", (1, 1))
    image.load()


def odd_kind(image: Image.Image, content: bytes, keeps_png: bool) -> str | None:
    """What is unusual about an image, by its header; None for one that keeps its bytes."""
    if image.format in JPEG_FORMATS:
        if JPEG_SCAN in content[max(content.rfind(JPEG_END), 0) :]:
            return "JPEG without an end marker"  # Pillow reads it, others do not
        return None if image.mode in ("RGB", "L") else f"{image.mode} JPEG"
    depth, colour_type = content[PNG_BIT_DEPTH], content[PNG_BIT_DEPTH + 1]
    if image.mode == "P":
        return "PNG with a palette"
    if colour_type not in PNG_PLAIN_COLOUR_TYPES or "transparency" in image.info:
        return "PNG with transparency"
    if depth != 8:
        return f"PNG of {depth} bits"
    if getattr(image, "is_animated", False):
        return "PNG with several frames"
    return None if keeps_png else "PNG not named .png"


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 0 where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 0))
    except Exception:  # EXIF is free-form: a broken one is no reason to reject the picture
        return 0


def as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, without profile or other metadata; 16-bit grey keeps its high byte."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return without_metadata(image.convert("RGB"))


def without_metadata(image: Image.Image) -> Image.Image:
    """The same picture; Pillow would write its comment or profile into the new file."""
    image.info = {}
    return image


def as_png(image: Image.Image, oddity: str, is_rotated: bool) -> StoredImage:
    """The lossless stored form of an odd image."""
    rgb = as_rgb(image)
    return StoredImage(
        encoded(rgb, "PNG"), "png", rgb.width, rgb.height, False, is_rotated, oddity, "stored as lossless RGB PNG"
    )


def resized(image: Image.Image, short_side: int, quality: int, oddity: str | None, is_rotated: bool) -> StoredImage:
    """The stored form where a smaller one was asked for: `FILTER` with antialiasing, JPEG."""
    plain = image if oddity is None else as_rgb(image)
    scale = short_side / min(plain.size)
    width, height = (max(short_side, round(side * scale)) for side in plain.size)
    small = without_metadata(plain.resize((width, height), Image.Resampling[FILTER.upper()]))
    content = encoded(small, "JPEG", quality=quality)
    done = "" if oddity is None else "stored as resized RGB JPEG"
    return StoredImage(content, "jpg", width, height, small.mode == "L", is_rotated, oddity, done)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def reason(content: bytes, error: Exception) -> str:
    """Why Pillow could not read it, the same on every run (its own texts can hold memory addresses)."""
    if not content:
        return "it is empty (0 bytes)"
    if isinstance(error, Image.DecompressionBombError):
        return too_large("its header")
    if isinstance(error, UnidentifiedImageError):
        return "it is neither JPEG nor PNG"
    return re.sub(r"\s*<[^>]*>", "", " ".join(str(error).split())) or type(error).__name__


def too_large(what: str) -> str:
    """The sentence for a picture that claims too many pixels."""
    return f"it is too large: {what} claims more than {PIXELS_MAX // 1_000_000} million pixels"
