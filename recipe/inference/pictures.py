"""People's own pictures, of whatever kind and from whomever, as the uint8 RGB that the network was trained on.

Training data are JPEG and PNG that preprocessing has normalised; a user brings palettes, transparency, CMYK, 16 bits,
animations and photographs that lie on their side. Files are hostile until read: the header is looked at first, pixels
are capped, a truncated file is an error.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from recipe.data.images import FILE_BYTES_MAX, PIXELS_MAX, as_rgb
from recipe.errors import UserError
from recipe.files import read_file
from recipe.run import shown_path

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
PAPER = (255, 255, 255)  # what shows through where a picture is transparent
Picture = str | Path | bytes | Image.Image | NDArray[np.uint8] | Tensor


def pixels_of(picture: Picture, apply_orientation: bool) -> Tensor:
    """uint8 RGB [3, H, W] of a path, a file's bytes, a Pillow image, an array [H, W, 3] or a tensor [3, H, W].

    Raises `UserError` for what is no picture, is damaged, or claims more than 50 million pixels.
    """
    if isinstance(picture, Tensor):
        return checked(picture, "the tensor")
    if isinstance(picture, np.ndarray):
        pixels = torch.from_numpy(np.array(picture))  # a copy: torch wants memory that may be written to
        return checked(pixels.permute(2, 0, 1) if pixels.dim() == 3 else pixels, "the array")
    if isinstance(picture, Image.Image):
        return pixels_of_image(picture, apply_orientation)
    content, where = bytes_of(picture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of corrupt EXIF and of large images, which are refused below
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                refuse_bombs(image, where)
                return pixels_of_image(image, apply_orientation)
        except UserError:
            raise
        except Exception as error:  # on damaged bytes Pillow's parsers raise about anything
            raise UserError(f"{where} is no picture that can be read: {reason(error)}") from error


def bytes_of(picture: str | Path | bytes) -> tuple[bytes, str]:
    """A file's bytes, and what to call it."""
    if isinstance(picture, bytes):
        return picture, f"the picture of {len(picture)} bytes"
    where = shown_path(picture)
    return read_file(Path(picture), where, FILE_BYTES_MAX), where


def refuse_bombs(image: Image.Image, where: str) -> None:
    """By the header, before a pixel is decoded."""
    if image.width * image.height > PIXELS_MAX:
        raise UserError(
            f"{where} claims {image.width} x {image.height} pixels, more than the {PIXELS_MAX // 1_000_000} million "
            "that are read; make it smaller"
        )


def pixels_of_image(image: Image.Image, apply_orientation: bool) -> Tensor:
    """The first frame, upright if asked, on white paper where it is transparent."""
    if apply_orientation:
        image = ImageOps.exif_transpose(image)
    rgb = on_paper(image) if image.has_transparency_data else as_rgb(image)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def on_paper(image: Image.Image) -> Image.Image:
    """Transparency as a person would see it."""
    layer = image.convert("RGBA")
    paper = Image.new("RGB", layer.size, PAPER)
    paper.paste(layer, mask=layer.getchannel("A"))
    return paper


def checked(pixels: Tensor, what: str) -> Tensor:
    """Pixels that somebody else has decoded."""
    if pixels.dtype is not torch.uint8 or pixels.dim() != 3 or pixels.shape[0] != 3 or not pixels.numel():
        raise UserError(f"{what} has shape {list(pixels.shape)} and type {pixels.dtype}; wanted: uint8 RGB")
    return pixels


def reason(error: Exception) -> str:
    """Why, without the memory addresses that some of Pillow's texts hold."""
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    return " ".join(str(error).split()) or type(error).__name__
