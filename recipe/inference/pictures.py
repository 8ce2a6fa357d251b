"""Users' pictures of any kind, as the uint8 RGB that the network was trained on.

Training data are JPEG and PNG that preprocessing has normalised. Users bring palettes, transparency, CMYK, 16 bits,
animations and photographs on their side, in the formats that preprocessing reads. Files are untrusted: the header is
read first, pixels are capped, a truncated file is an error.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from recipe.config.schema import MAX_PIXELS
from recipe.data.images import (
    FILE_BYTES_PER_PIXEL,
    FORMATS,
    MODES_WITHOUT_WHITE,
    as_rgb,
    flaw_of,
    lift_pillows_limit,
    reason,
)
from recipe.errors import UserError
from recipe.run.files import display_path, read_file

PAPER = (255, 255, 255)  # what shows through where a picture is transparent
Picture = str | Path | bytes | Image.Image | NDArray[np.uint8] | Tensor


def pixels_of(picture: Picture, apply_orientation: bool, max_pixels: int = MAX_PIXELS, name: str = "") -> Tensor:
    """uint8 RGB [3, H, W] of a path, a file's bytes, a Pillow image, an array [H, W, 3] or a tensor [3, H, W].

    `name` stands for a file's bytes in messages. Raises `UserError` for a file that is not a picture, is damaged, or
    claims more than `max_pixels` pixels.
    """
    if isinstance(picture, Tensor):
        return checked(picture, "the tensor")
    if isinstance(picture, np.ndarray):
        pixels = torch.from_numpy(np.array(picture))  # a copy: torch wants memory that may be written to
        return checked(pixels.permute(2, 0, 1) if pixels.dim() == 3 else pixels, "the array")
    if isinstance(picture, Image.Image):
        return pixels_of_image(picture, apply_orientation)
    content, where = bytes_of(picture, max_pixels)
    where = name or where
    if max_pixels > MAX_PIXELS:
        lift_pillows_limit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of corrupt EXIF and of large images, which are refused below
        try:
            with Image.open(io.BytesIO(content), formats=tuple(FORMATS)) as image:
                if image.width * image.height > max_pixels:
                    raise picture_too_large(where, f"{image.width} x {image.height} pixels", max_pixels)
                flaw = flaw_of(image, content)
                if flaw is not None and flaw.loses_pixels:
                    raise UserError(f"{where} is damaged: {flaw.what}; use a sound copy")
                return pixels_of_image(image, apply_orientation)
        except UserError:
            raise
        except MemoryError as error:
            raise UserError(f"there is not enough memory to read {where}; make the picture smaller") from error
        except Image.DecompressionBombError as error:
            raise picture_too_large(where, "more pixels than Pillow reads", max_pixels) from error
        except Exception as error:  # on damaged bytes Pillow's parsers raise about anything
            raise UserError(f"{where} is not a picture that can be read: {reason(content, error)}") from error


def bytes_of(picture: str | Path | bytes, max_pixels: int = MAX_PIXELS) -> tuple[bytes, str]:
    """A file's bytes, and its name for messages."""
    if isinstance(picture, bytes):
        return picture, f"the picture of {len(picture)} bytes"
    where = display_path(picture)
    return read_file(Path(picture), where, FILE_BYTES_PER_PIXEL * max_pixels), where


def picture_too_large(where: str, what: str, max_pixels: int) -> UserError:
    return UserError(f"{where} is too large: {what}, while max_pixels={max_pixels}; make it smaller, or give more")


def pixels_of_image(image: Image.Image, apply_orientation: bool) -> Tensor:
    """The first frame, upright if asked, on white paper if it is transparent."""
    if image.mode in MODES_WITHOUT_WHITE:
        raise UserError(f"the picture has {MODES_WITHOUT_WHITE[image.mode]}; 8 or 16 bits of grey or RGB are read")
    if apply_orientation:
        image = ImageOps.exif_transpose(image)
    rgb = on_paper(image) if image.has_transparency_data else as_rgb(image)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def on_paper(image: Image.Image) -> Image.Image:
    """Show transparency as white."""
    layer = image.convert("RGBA")
    paper = Image.new("RGB", layer.size, PAPER)
    paper.paste(layer, mask=layer.getchannel("A"))
    return paper


def checked(pixels: Tensor, what: str) -> Tensor:
    """Check the dtype and shape of decoded pixels. Raises `UserError`."""
    if pixels.dtype is not torch.uint8 or pixels.dim() != 3 or pixels.shape[0] != 3 or not pixels.numel():
        raise UserError(f"{what} has shape {list(pixels.shape)} and type {pixels.dtype}; wanted: uint8 RGB")
    return pixels
