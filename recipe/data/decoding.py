"""From the bytes of an image file to its pixels, no further than somebody looks at them.

A crop for training needs about half of a picture. nvImageCodec, NVIDIA's layer over libjpeg-turbo (and over the decoder
of a GPU, which is not used here), leaves out rows and columns outside the crop, with the pixels that decoding
all of it would give; damage in what it leaves out is not seen. Pillow has the same pixels and decodes whole pictures.
What nvImageCodec refuses, Pillow is asked for: preprocessing has stored only what that reads. Neither applies an EXIF
orientation: ImageNet training never did, and one image in a thousand carries one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
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

JPEG_START = b"\xff\xd8"
MARKER, SEQUENTIAL_FRAMES = 0xFF, (0xC0, 0xC1)  # baseline and extended: rows of blocks, one after the other
FRAMES_AND_SCAN = frozenset((*range(0xC0, 0xD0), 0xDA)) - {0xC4, 0xC8, 0xCC}  # those are tables and an extension
PROCESSOR_EXTENSION = "libjpeg_turbo_ext.so*"  # the part of nvImageCodec that decodes JPEG without a GPU
EXACT = ":fancy_upsampling=1 :fast_idct=0"  # as Pillow (and its defaults); faster ways save 5 % and move pixels
COLUMNS_LEAST = 8  # of a part: where colour is two samples wide or less, libjpeg-turbo upsamples it in another way


class UndecodableError(Exception):
    """The bytes are no image that this decoder reads; the text says why."""


class EncodedImage(Protocol):
    """An image that is decoded when somebody looks at it, and no further than that."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""

    def part(self, top: int, left: int, height: int, width: int) -> Tensor:
        """uint8 RGB of shape [3, height, width], channels last in memory, where other pixels may be between rows."""


class ImageDecoder(Protocol):
    """A library that decodes JPEG and PNG; threads may share one."""

    name: str

    def open(self, content: bytes) -> EncodedImage:
        """The picture in a file's bytes; this, or looking at it, raises `UndecodableError`."""


class WholeImage:
    """Decoded as a whole: uint8 [3, H, W]."""

    def __init__(self, image: Tensor) -> None:
        self.image = image

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[-2], self.image.shape[-1]

    def part(self, top: int, left: int, height: int, width: int) -> Tensor:
        """uint8 [3, height, width], a view of the image."""
        return self.image[:, top : top + height, left : left + width]


class PillowDecoder:
    """Reads whatever preprocessing stores, whole pictures only: the tests' oracle, and the way out everywhere."""

    name = Decoder.pillow.value

    def __init__(self) -> None:
        lift_pillows_limit()  # preprocessing has held every image to data.max_pixels

    def open(self, content: bytes) -> EncodedImage:
        """The picture, decoded."""
        try:
            with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
                pixels = np.array(image.convert("RGB"))
        except MemoryError:
            raise
        except Exception as error:  # on damaged bytes Pillow's parsers raise about anything
            raise UndecodableError(reason(content, error)) from error
        return WholeImage(torch.from_numpy(pixels).permute(2, 0, 1))


class NvImageCodecDecoder:
    """Parts of JPEGs by nvImageCodec on the processor; the few PNGs by Pillow."""

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
        if not decodes:  # else Pillow would decode everything, slowly and without a message
            raise cannot_be_used("it does not decode JPEG here")

    def open(self, content: bytes) -> EncodedImage:
        """The picture, of which nothing but the header was read if it is a JPEG."""
        if content[:2] == JPEG_START:
            stream = self.library.CodeStream(content)
            with contextlib.suppress(RuntimeError):  # a header that it cannot read, and Pillow perhaps can
                return PartialImage(self, content, stream)
        return self.pillow.open(content)

    def region(self, stream: Any, top: int, left: int, bottom: int, right: int) -> Tensor | None:
        """Those rows and columns, uint8 [3, bottom - top, right - left]; None where the bytes are refused."""
        region = self.library.Region(top, left, bottom, right)
        image = self.codec.decode(stream.get_sub_code_stream(0, region), params=self.parameters)
        return None if image is None else torch.from_numpy(np.asarray(image)).permute(2, 0, 1)

    @property
    def codec(self) -> Any:
        """The library's own decoder: one for each thread, since none says that they may share one."""
        if not hasattr(self.per_thread, "codec"):
            self.per_thread.codec = self.library.Decoder(
                device_id=self.library.NVIMGCODEC_DEVICE_CPU_ONLY,
                max_num_cpu_threads=1,
                backends=[self.library.Backend(self.library.BackendKind.CPU_ONLY)],
                options=EXACT,
            )
        return self.per_thread.codec


class PartialImage:
    """A JPEG of which the rows and columns are decoded that are looked at; all of it where it is no sequential one.

    Of a progressive JPEG all has to be read for any pixel, and where its last scans are missing, libjpeg smooths what
    it shows, a part in another way than the whole.
    """

    def __init__(self, decoder: NvImageCodecDecoder, content: bytes, stream: Any) -> None:
        self.decoder, self.content, self.stream = decoder, content, stream
        self.size = (stream.height, stream.width)

    def part(self, top: int, left: int, height: int, width: int) -> Tensor:
        """uint8 [3, height, width], a view of what was decoded."""
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
    """Whether a JPEG's blocks follow one another, found in its segments (ITU T.81, annex B); False where unsure."""
    position = len(JPEG_START)
    while position + 4 <= len(content) and content[position] == MARKER:
        if content[position + 1] in FRAMES_AND_SCAN:
            return content[position + 1] in SEQUENTIAL_FRAMES
        position += 2 + int.from_bytes(content[position + 2 : position + 4])
    return False


def build_decoder(decoder: Decoder) -> ImageDecoder:
    """The library that the configuration names; raises `UserError` where it cannot be used on this machine."""
    return PillowDecoder() if decoder is Decoder.pillow else NvImageCodecDecoder()


def decoded(content: bytes, decoder: ImageDecoder) -> Tensor:
    """All of a picture, uint8 [3, H, W]; raises `UndecodableError`."""
    picture = decoder.open(content)
    return picture.part(0, 0, *picture.size)


def cannot_be_used(why: str) -> UserError:
    """What to do where the library does not work."""
    return UserError(
        f"loader.decoder={Decoder.nvimgcodec.value} cannot be used on this machine ({why}); "
        f"use loader.decoder={Decoder.pillow.value}: it has the same pixels and is slower"
    )


@cache
def load_nvimgcodec() -> Any:
    """The library, with nothing loaded but what decodes JPEG on the processor.

    Its other extensions look for CUDA's libraries, and complain on stderr where there are none.
    """
    try:
        with only_the_processors_extension():
            from nvidia import nvimgcodec
    except (ImportError, OSError) as error:
        raise cannot_be_used(" ".join(str(error).split())) from error
    return nvimgcodec


@contextlib.contextmanager
def only_the_processors_extension() -> Iterator[None]:
    """Settings in the environment for as long as the library is imported: it reads them then."""
    package = importlib.util.find_spec("nvidia.nvimgcodec")
    if package is None or package.origin is None:
        raise ImportError("it is not installed")
    with tempfile.TemporaryDirectory() as folder:
        for extension in (Path(package.origin).parent / "extensions").glob(PROCESSOR_EXTENSION):
            (Path(folder) / extension.name).symlink_to(extension)
        wanted = {"NVIMGCODEC_EXTENSIONS_PATH": folder, "PYNVIMGCODEC_VERBOSITY": "0"}  # it returns what it refuses
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
