"""Checks of one image, and the bytes in which it is stored.

A JPEG or PNG of 8-bit RGB or grayscale keeps its bytes, since all decoders read them alike. Other images (other
formats, CMYK, palettes, transparency, 16 bits, a PNG called .JPEG, a JPEG with stray bytes) are decoded here and stored
as lossless RGB PNG, so that decoders cannot differ later. The first of several frames is used. EXIF orientation is not
applied: training on ImageNet never did, and 1 in 1,000 of its images has one.

Images are untrusted: the header is read first, pixels are capped, only the formats of `FORMATS` are tried, and a
truncated file is an error, not a partly grey image.
"""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from recipe.config.schema import MAX_PIXELS
from recipe.data.integrity import Flaw, clean_pixels, jpeg_flaw, png_flaw

FORMATS = {  # Pillow's name -> the usual one. Its other readers are not used: that of EPS runs Ghostscript
    "JPEG": "JPEG",
    "PNG": "PNG",
    "WEBP": "WebP",
    "BMP": "BMP",
    "TIFF": "TIFF",
    "GIF": "GIF",
    "AVIF": "AVIF",
    "JPEG2000": "JPEG 2000",
}
OPTIONAL = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # format -> feature that Pillow may lack
SIGNATURES = (  # of the first bytes
    (re.compile(rb"\xff\xd8\xff"), "JPEG"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WEBP"),
    (re.compile(rb"BM....\0\0\0\0....[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL), "BMP"),
    (re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), "TIFF"),
    (re.compile(rb"GIF8[79]a"), "GIF"),
    (re.compile(rb"....ftyp(.{4})*?avi[fs]", re.DOTALL), "AVIF"),
    (re.compile(rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"), "JPEG2000"),
)
SIGNATURE_BYTES = 32
FILE_BYTES_PER_PIXEL = 8  # of an uncompressed picture with 16 bits and transparency
IMAGE_BYTES_MAX = FILE_BYTES_PER_PIXEL * MAX_PIXELS  # of a file in a folder, read at once
JPEG_FORMATS = ("JPEG", "MPO")  # MPO: a JPEG followed by a second view that JPEG readers ignore
COLOURS = {"RGB": "RGB", "L": "GRAY"}  # of a JPEG that keeps its bytes: Pillow's name -> simplejpeg's
JPEG_SIDE_MAX = 65_500  # pixels that libjpeg writes
ORIENTATION_TAG, BITS_TAG = 0x0112, 258
PNG_BIT_DEPTH = 24  # position in the file, before the colour type
PNG_PLAIN_COLOUR_TYPES = (0, 2)  # grayscale, RGB
MODES_WITHOUT_WHITE = {"F": "floating-point samples", "I": "samples of 32 bits", "LAB": "CIELAB colours"}
GREY = "grayscale"
FILTER = "bilinear"  # as torchvision's references, in two thirds of the time of bicubic
ROTATED = "EXIF orientation, not applied"
ERRORS_DESCRIPTOR = 2
AS_PNG = "stored as lossless RGB PNG"


class RejectedImageError(Exception):
    """An image that is not stored, with the reason."""

    verdict = "cannot be stored"
    way_out = "convert it"


class DamagedImageError(RejectedImageError):
    """The bytes are damaged."""

    verdict = "is corrupt"
    way_out = "replace it"


class TooLargeImageError(RejectedImageError):
    """More pixels than the settings allow."""

    way_out = "raise data.max_pixels"


@dataclass(frozen=True)
class Rules:
    """How the images of one split are stored."""

    keeps_png: bool  # files named .png keep their bytes
    resize_short_side: int | None  # pixels
    quality: int  # of the JPEG that a resized image becomes
    max_pixels: int = MAX_PIXELS
    is_verified: bool = False  # the archive has the published checksum: published damage is kept


@dataclass(frozen=True)
class StoredImage:
    """The bytes to store, and their difference from the raw ones."""

    content: bytes
    extension: str  # the true format: jpg or png
    width: int
    height: int
    is_grey: bool
    is_rotated: bool  # carries an EXIF orientation other than upright
    unusual: str | None = None  # why the bytes were converted
    done: str = ""  # "stored as ..."


def store(content: bytes, is_named_png: bool, rules: Rules) -> StoredImage:
    """Check one image by decoding all of it and choose its stored form. Raises `RejectedImageError`."""
    if len(content) > FILE_BYTES_PER_PIXEL * rules.max_pixels:
        raise too_large(f"{len(content)} bytes", rules.max_pixels)
    lift_pillows_limit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of corrupt EXIF, which does not matter here
        try:
            return stored_form(content, is_named_png, rules)
        except (RejectedImageError, MemoryError):
            raise
        except Exception as error:  # Pillow raises many types for hostile bytes
            raise DamagedImageError(reason(content, error)) from error


def stored_form(content: bytes, is_named_png: bool, rules: Rules) -> StoredImage:
    """As `store`, but raises Pillow's own errors."""
    with Image.open(io.BytesIO(content), formats=tuple(FORMATS)) as image:
        if image.width * image.height > rules.max_pixels:
            raise too_large(f"{image.width} x {image.height} pixels", rules.max_pixels)
        if image.mode in MODES_WITHOUT_WHITE:
            raise RejectedImageError(f"it has {MODES_WITHOUT_WHITE[image.mode]}: 8 or 16 bits of grey or RGB are read")
        shrinks = rules.resize_short_side is not None and can_shrink(image, rules.resize_short_side)
        pixels = pixels_of_clean_jpeg(image, content) if shrinks else None
        flaw = None if pixels is not None else flaw_of(image, content)
        if flaw is not None and flaw.loses_pixels and not rules.is_verified:
            raise DamagedImageError(flaw.what)
        unusual = unusual_kind(image, content, is_named_png and rules.keeps_png)
        if flaw is not None:
            damage = f"damaged {image.format}: {flaw.what}" if flaw.loses_pixels else flaw.what
            unusual = damage if unusual is None else f"{unusual}, {damage}"
        is_rotated = image.format != "TIFF" and orientation(image) not in (0, 1)  # Pillow turns a TIFF
        if rules.resize_short_side is not None and shrinks:
            return resized(
                image if pixels is None else pixels, rules.resize_short_side, rules.quality, unusual, is_rotated
            )
        if unusual is not None:
            return as_png(image, unusual, is_rotated)
        extension = "jpg" if image.format in JPEG_FORMATS else "png"
        return StoredImage(content, extension, *image.size, image.mode == "L", is_rotated)


def pixels_of_clean_jpeg(image: Image.Image, content: bytes) -> Image.Image | None:
    """Pillow's pixels, decoded by simplejpeg, which also checks the JPEG. None for a flawed one."""
    if image.format not in JPEG_FORMATS or image.mode not in COLOURS:
        return None
    pixels = clean_pixels(content, COLOURS[image.mode])
    return None if pixels is None else Image.fromarray(pixels.squeeze(-1) if image.mode == "L" else pixels)


def flaw_of(image: Image.Image, content: bytes) -> Flaw | None:
    """The damage of a JPEG or PNG.

    Decoders of other formats refuse most damage themselves, but not all in a JPEG or a fax inside a TIFF, nor missing
    tiles of JPEG 2000. All markers and coefficients of a JPEG are decoded. The rest of a decoder (inverse transform,
    upsampling, colours) cannot fail.
    """
    if image.format == "PNG":
        flaw = png_flaw(content)
        if flaw is None:
            image.load()
        return flaw
    if image.format in JPEG_FORMATS:
        try:
            return jpeg_flaw(content)
        except ValueError:  # a subsampling that simplejpeg does not know, or unreadable
            image.load()
    return None


def lift_pillows_limit() -> None:
    """Switch off Pillow's own limit of `MAX_PIXELS` in this process: `max_pixels` is checked instead."""
    Image.MAX_IMAGE_PIXELS = None


def too_large(what: str, max_pixels: int) -> TooLargeImageError:
    """The error for an image that claims too many pixels."""
    return TooLargeImageError(f"it is too large: {what}, while data.max_pixels={max_pixels}")


def can_shrink(image: Image.Image, short_side: int) -> bool:
    """True if an image is larger than `short_side`, and small enough for a JPEG after resizing."""
    short, long = sorted(image.size)
    return short > short_side and long * short_side / short <= JPEG_SIDE_MAX


def format_of(head: bytes) -> str | None:
    """The format by the first `SIGNATURE_BYTES` of a file. None if they are not of an image."""
    return next((form for sign, form in SIGNATURES if sign.match(head[:SIGNATURE_BYTES])), None)


def unusual_kind(image: Image.Image, content: bytes, keeps_png: bool) -> str | None:
    """The reason to convert an image, by its header. None for one that keeps its bytes."""
    if image.format in JPEG_FORMATS:
        return None if image.mode in ("RGB", "L") else f"{image.mode} JPEG"
    if image.format != "PNG":
        return unusual_format(image)
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


def unusual_format(image: Image.Image) -> str:
    """The name of a format other than JPEG and PNG, with the property that is lost in 8-bit RGB."""
    name = FORMATS[str(image.format)]
    bits = getattr(image, "tag_v2", {}).get(BITS_TAG, (8,))
    depth = 16 if image.mode.startswith("I;16") else max(bits)
    if image.mode == "CMYK":
        return f"CMYK {name}"
    if image.has_transparency_data:
        return f"{name} with transparency"
    if depth > 8:
        return f"{name} of {depth} bits"
    if getattr(image, "is_animated", False):
        return f"{name} with several frames"
    return name


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 0 where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 0))
    except Exception:  # damaged EXIF does not mean a damaged image
        return 0


def as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB without metadata. 16-bit grayscale keeps its high byte."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return without_metadata(image.convert("RGB"))


def without_metadata(image: Image.Image) -> Image.Image:
    """The image without comment and profile, which Pillow would write into the new file."""
    image.info = {}
    return image


def as_png(image: Image.Image, unusual: str, is_rotated: bool) -> StoredImage:
    rgb = as_rgb(image)
    return StoredImage(encoded(rgb, "PNG"), "png", rgb.width, rgb.height, False, is_rotated, unusual, AS_PNG)


def resized(image: Image.Image, short_side: int, quality: int, unusual: str | None, is_rotated: bool) -> StoredImage:
    """The stored form of `data.resize_short_side`: resized by `FILTER` with antialiasing, JPEG."""
    plain = image if unusual is None else as_rgb(image)
    scale = short_side / min(plain.size)
    width, height = (max(short_side, round(side * scale)) for side in plain.size)
    small = without_metadata(plain.resize((width, height), Image.Resampling[FILTER.upper()]))
    content = encoded(small, "JPEG", quality=quality)
    done = "" if unusual is None else "stored as resized RGB JPEG"
    return StoredImage(content, "jpg", width, height, small.mode == "L", is_rotated, unusual, done)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def reason(content: bytes, error: Exception) -> str:
    """The reason why Pillow cannot read an image, without memory addresses, so that it is equal in every run."""
    if not content:
        return "it is empty (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        form = format_of(content)
        if form in OPTIONAL and not features.check(OPTIONAL[form]):
            return f"it is {FORMATS[form]}, which this build of Pillow cannot read"
        return f"it is a damaged {FORMATS[form]}" if form else f"it is none of {', '.join(FORMATS.values())}"
    return re.sub(r"\s*<[^>]*>", "", " ".join(str(error).split())) or type(error).__name__


def silence_decoders() -> None:
    """Drop messages of C libraries on stderr, such as libjpeg's warnings, and keep those of Python."""
    sys.stderr = os.fdopen(os.dup(ERRORS_DESCRIPTOR), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, ERRORS_DESCRIPTOR)
    os.close(nowhere)
