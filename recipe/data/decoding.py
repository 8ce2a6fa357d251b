"""Image decoders: the bytes of an image file to the pixels of a crop.

A crop for training needs about half of an image. nvImageCodec, NVIDIA's layer over libjpeg-turbo (its GPU decoder is
not used), skips rows and columns outside the crop, with the same pixels as a full decode. Damage in skipped parts is
not seen. Pillow gives the same pixels from a full decode. It also decodes images that nvImageCodec refuses, since
preprocessing stores only images that Pillow reads. EXIF orientation is not applied: ImageNet training never did, and
one image in a thousand has one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recipe.config.schema import Decoder
from recipe.data.images import encoded, lift_pillows_limit, reason
from recipe.errors import UserError
from recipe.run.launcher import launched

JPEG_START = b"\xff\xd8"
MARKER, SEQUENTIAL_FRAMES = 0xFF, (0xC0, 0xC1)  # baseline and extended: rows of blocks, one after the other
FRAMES_AND_SCAN = frozenset((*range(0xC0, 0xD0), 0xDA)) - {0xC4, 0xC8, 0xCC}  # tables and an extension
PROCESSOR_EXTENSION = "libjpeg_turbo_ext.so*"  # the part of nvImageCodec that decodes JPEG without a GPU
EXACT = ":fancy_upsampling=1 :fast_idct=0"  # as Pillow (and its defaults). Faster modes save 5 % and change pixels
COLUMNS_LEAST = 8  # of a part: libjpeg-turbo upsamples colour of at most two samples in another way


class UndecodableError(Exception):
    """An image that the decoder cannot read, with the reason."""


class EncodedImage(Protocol):
    """An image that is decoded on access, and only the requested part."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""

    def part(self, top: int, left: int, height: int, width: int) -> Tensor:
        """uint8 RGB of shape [3, height, width], channels last in memory. Rows need not be contiguous."""


class ImageDecoder(Protocol):
    """A library that decodes JPEG and PNG. Threads may share one."""

    name: str

    def open(self, content: bytes) -> EncodedImage:
        """The image in a file's bytes. Raises `UndecodableError`, here or when pixels are accessed."""


class WholeImage:
    """A fully decoded image: uint8 [3, H, W]."""

    def __init__(self, image: Tensor) -> None:
        self.image = image

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[-2], self.image.shape[-1]

    def part(self, top: int, left: int, height: int, width: int) -> Tensor:
        """uint8 [3, height, width], a view of the image."""
        return self.image[:, top : top + height, left : left + width]


class PillowDecoder:
    """Full decode by Pillow, for every stored image: the reference in tests and the fallback on any system."""

    name = Decoder.pillow.value

    def __init__(self) -> None:
        lift_pillows_limit()  # preprocessing has checked data.max_pixels

    def open(self, content: bytes) -> EncodedImage:
        """Decode the image."""
        try:
            with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
                pixels = np.array(image.convert("RGB"))
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many types for damaged bytes
            raise UndecodableError(reason(content, error)) from error
        return WholeImage(torch.from_numpy(pixels).permute(2, 0, 1))


class NvImageCodecDecoder:
    """Partial decode of JPEGs by nvImageCodec on the CPU. PNGs are left to Pillow."""

    name = Decoder.nvimgcodec.value

    def __init__(self) -> None:
        self.library, self.pillow, self.per_thread = load_nvimgcodec(), PillowDecoder(), threading.local()
        try:
            self.parameters = self.library.DecodeParams(
                apply_exif_orientation=False, color_spec=self.library.ColorSpec.SRGB
            )
            sound = self.library.CodeStream(encoded(Image.new("RGB", (8, 8)), "JPEG"))
            decodes = self.region(sound, 0, 0, 8, 8) is not None
        except (AttributeError, RuntimeError) as error:
            raise cannot_be_used(" ".join(str(error).split())) from error
        if not decodes:  # otherwise Pillow would decode everything, without a message
            raise cannot_be_used("it does not decode JPEG here")

    def open(self, content: bytes) -> EncodedImage:
        """Read the header of a JPEG, or decode another image with Pillow."""
        if content[:2] == JPEG_START:
            stream = self.library.CodeStream(content)
            with contextlib.suppress(RuntimeError):  # a header that Pillow may be able to read
                return PartialImage(self, content, stream)
        return self.pillow.open(content)

    def region(self, stream: Any, top: int, left: int, bottom: int, right: int) -> Tensor | None:
        """Decode rows and columns, uint8 [3, bottom - top, right - left]. None if the library refuses."""
        region = self.library.Region(top, left, bottom, right)
        image = self.codec.decode(stream.get_sub_code_stream(0, region), params=self.parameters)
        return None if image is None else torch.from_numpy(np.asarray(image)).permute(2, 0, 1)

    @property
    def codec(self) -> Any:
        """The library's decoder, one for each thread: sharing one is not documented as safe."""
        if not hasattr(self.per_thread, "codec"):
            self.per_thread.codec = self.library.Decoder(
                device_id=self.library.NVIMGCODEC_DEVICE_CPU_ONLY,
                max_num_cpu_threads=1,
                backends=[self.library.Backend(self.library.BackendKind.CPU_ONLY)],
                options=EXACT,
            )
        return self.per_thread.codec


class PartialImage:
    """A JPEG decoded in the requested region only. Progressive and other non-sequential ones are decoded in full.

    A progressive JPEG has to be read completely for any pixel. If its last scans are missing, libjpeg smooths the
    image, and smooths a part differently.
    """

    def __init__(self, decoder: NvImageCodecDecoder, content: bytes, stream: Any) -> None:
        self.decoder, self.content, self.stream = decoder, content, stream
        self.size = (stream.height, stream.width)

    def part(self, top: int, left: int, height: int, width: int) -> Tensor:
        """uint8 [3, height, width], a view of the decoded pixels."""
        first_row, first_column, (last_row, last_column) = 0, 0, self.size
        if is_sequential(self.content):
            first_row, last_row = top, top + height
            first_column = max(0, min(left, last_column - COLUMNS_LEAST))
            last_column = min(max(left + width, first_column + COLUMNS_LEAST), last_column)
        pixels = self.decoder.region(self.stream, first_row, first_column, last_row, last_column)
        if pixels is None:
            return self.decoder.pillow.open(self.content).part(top, left, height, width)
        top, left = top - first_row, left - first_column
        return pixels[:, top : top + height, left : left + width]


def is_sequential(content: bytes) -> bool:
    """True for a baseline or extended JPEG, by its segments (ITU T.81, annex B). False if unsure."""
    position = len(JPEG_START)
    while position + 4 <= len(content) and content[position] == MARKER:
        if content[position + 1] in FRAMES_AND_SCAN:
            return content[position + 1] in SEQUENTIAL_FRAMES
        position += 2 + int.from_bytes(content[position + 2 : position + 4])
    return False


def build_decoder(decoder: Decoder) -> ImageDecoder:
    """The decoder of that name. Raises `UserError` if its library cannot be used on this machine."""
    return PillowDecoder() if decoder is Decoder.pillow else NvImageCodecDecoder()


def usable_decoder(decoder: Decoder) -> ImageDecoder:
    """The decoder of that name, or Pillow if its library is absent or broken. Rank 0 prints the reason once."""
    try:
        return build_decoder(decoder)
    except UserError as error:
        if launched().is_rank0:
            report_fallback(str(error))
        return PillowDecoder()


@cache
def report_fallback(reason: str) -> None:
    print(f"{reason}: Pillow decodes, with the same pixels and slower", file=sys.stderr, flush=True)


def decoded(content: bytes, decoder: ImageDecoder) -> Tensor:
    """Decode all of an image, uint8 [3, H, W]. Raises `UndecodableError`."""
    picture = decoder.open(content)
    return picture.part(0, 0, *picture.size)


def cannot_be_used(why: str) -> UserError:
    return UserError(f"nvImageCodec (loader.decoder=nvimgcodec) cannot be used on this machine ({why})")


@cache
def load_nvimgcodec() -> Any:
    """Import the library with the extension for JPEG on the CPU only.

    Other extensions look for CUDA's libraries and print errors if there are none.
    """
    try:
        with only_the_processors_extension():
            from nvidia import nvimgcodec
    except (ImportError, OSError) as error:
        raise cannot_be_used(" ".join(str(error).split())) from error
    return nvimgcodec


@contextlib.contextmanager
def only_the_processors_extension() -> Iterator[None]:
    """Set environment variables while the library is imported and reads them."""
    try:
        package = importlib.util.find_spec("nvidia.nvimgcodec")
    except ModuleNotFoundError:  # `nvidia`, the namespace of NVIDIA's packages, is not there either
        package = None
    if package is None or package.origin is None:
        raise ImportError("it is not installed")
    with tempfile.TemporaryDirectory() as folder:
        for extension in (Path(package.origin).parent / "extensions").glob(PROCESSOR_EXTENSION):
            (Path(folder) / extension.name).symlink_to(extension)
        wanted = {"NVIMGCODEC_EXTENSIONS_PATH": folder, "PYNVIMGCODEC_VERBOSITY": "0"}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
