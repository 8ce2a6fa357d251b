"""From the bytes of an image file to its pixels, no further than somebody looks at them.

A crop for training needs about half of a picture. nvImageCodec, NVIDIA's layer over libjpeg-turbo (and over the decoder
of a GPU, which is not used here), leaves out the rows and columns that nobody asked for, with the pixels that decoding
all of it would give; Pillow has the same pixels and decodes whole pictures. What one refuses, the other is asked for:
preprocessing has stored only what Pillow reads. Neither applies an EXIF orientation: ImageNet training never did, and
one image in a thousand carries one.
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
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recipe.config import Decoder
from recipe.data.images import reason
from recipe.errors import UserError

JPEG_START = b"\xff\xd8"
PROCESSOR_EXTENSION = "libjpeg_turbo_ext.so*"  # the part of nvImageCodec that decodes JPEG without a GPU
EXACT = ":fancy_upsampling=1 :fast_idct=0"  # as Pillow; the faster ways save 5 % and move pixels by up to 53 levels
COLUMNS_LEAST = 8  # of a part: where colour is two samples wide or less, libjpeg-turbo upsamples it in another way


class UndecodableError(Exception):
    """The bytes are no image that this decoder reads; the text says why."""


class Picture(Protocol):
    """An image that is decoded when somebody looks at it, and no further than that."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""

    def part(self, top: int, left: int, height: int, width: int) -> Tensor:
        """uint8 RGB of shape [3, height, width], channels last in memory, where other pixels may lie between rows."""


class ImageDecoder(Protocol):
    """A library that decodes JPEG and PNG; threads may share one."""

    name: str

    def open(self, content: bytes) -> Picture:
        """The picture in a file's bytes; this, or looking at it, raises `UndecodableError`."""


class WholePicture:
    """Decoded as a whole: uint8 [3, H, W]."""

    def __init__(self, image: Tensor) -> None:
        self.image = image

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[-2], self.image.shape[-1]

    def part(self, top: int, left: int, height: int, width: int) -> Tensor:
        """uint8 [3, height, width], a view of the image."""
        return self.image[:, top : top + height, left : left + width]


class PillowDecoder:
    """Reads whatever preprocessing stores, whole pictures only: the tests' oracle, and the way out everywhere."""

    name = Decoder.pillow.value

    def open(self, content: bytes) -> Picture:
        """The picture, decoded."""
        try:
            with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
                pixels = np.array(image.convert("RGB"))
        except Exception as error:  # on damaged bytes Pillow's parsers raise about anything
            raise UndecodableError(reason(content, error)) from error
        return WholePicture(torch.from_numpy(pixels).permute(2, 0, 1))


class NvImageCodecDecoder:
    """Parts of JPEGs by nvImageCodec on the processor; the few PNGs by Pillow."""

    name = Decoder.nvimgcodec.value

    def __init__(self) -> None:
        self.library = load_nvimgcodec()
        self.parameters = self.library.DecodeParams(
            apply_exif_orientation=False, color_spec=self.library.ColorSpec.SRGB
        )
        self.pillow = PillowDecoder()
        self.own = threading.local()
        if self.decode(self.library.CodeStream(a_jpeg()), 0, 0, 1, 1) is None:
            raise cannot_be_used("it does not decode JPEG here")  # else Pillow would do all, slowly, and nobody knew

    def open(self, content: bytes) -> Picture:
        """The picture, of which nothing but the header was read if it is a JPEG."""
        if content[:2] == JPEG_START:
            stream = self.library.CodeStream(content)
            with contextlib.suppress(RuntimeError):  # a header that it cannot read, and Pillow perhaps can
                return PartialPicture(self, content, stream, (stream.height, stream.width))
        return self.pillow.open(content)

    def decode(self, stream: Any, top: int, left: int, bottom: int, right: int) -> Tensor | None:
        """Those rows and columns, uint8 [3, bottom - top, right - left]; None where the bytes are refused."""
        region = self.library.Region(top, left, bottom, right)
        image = self.codec.decode(stream.get_sub_code_stream(0, region), params=self.parameters)
        return None if image is None else torch.from_numpy(np.asarray(image)).permute(2, 0, 1)

    @property
    def codec(self) -> Any:
        """The library's own decoder: one for each thread, since none says that they may share one."""
        if not hasattr(self.own, "codec"):
            self.own.codec = self.library.Decoder(
                device_id=self.library.NVIMGCODEC_DEVICE_CPU_ONLY,
                max_num_cpu_threads=1,
                backends=[self.library.Backend(self.library.BackendKind.CPU_ONLY)],
                options=EXACT,
            )
        return self.own.codec


class PartialPicture:
    """A JPEG of which the rows and columns are decoded that are looked at."""

    def __init__(self, decoder: NvImageCodecDecoder, content: bytes, stream: Any, size: tuple[int, int]) -> None:
        self.decoder, self.content, self.stream, self.size = decoder, content, stream, size

    def part(self, top: int, left: int, height: int, width: int) -> Tensor:
        """uint8 [3, height, width], a view of what was decoded."""
        first = max(0, min(left, self.size[1] - COLUMNS_LEAST))
        last = min(max(left + width, first + COLUMNS_LEAST), self.size[1])
        pixels = self.decoder.decode(self.stream, top, first, top + height, last)
        if pixels is None:
            return self.decoder.pillow.open(self.content).part(top, left, height, width)
        return pixels[:, :, left - first : left - first + width]


def build_decoder(decoder: Decoder) -> ImageDecoder:
    """The library that the configuration names; raises `UserError` where it cannot be used on this machine."""
    return PillowDecoder() if decoder is Decoder.pillow else NvImageCodecDecoder()


def decoded(content: bytes, decoder: ImageDecoder) -> Tensor:
    """All of a picture, uint8 [3, H, W]; raises `UndecodableError`."""
    picture = decoder.open(content)
    return picture.part(0, 0, *picture.size)


def a_jpeg() -> bytes:
    """A sound one, as small as they come."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG")
    return stream.getvalue()


def cannot_be_used(why: str) -> UserError:
    """What to do where the library does not work."""
    return UserError(
        f"data.decoder={Decoder.nvimgcodec.value} cannot be used on this machine ({why}); "
        f"use data.decoder={Decoder.pillow.value}: it has the same pixels and is slower"
    )


@cache
def load_nvimgcodec() -> ModuleType:
    """The library, with nothing loaded but what decodes JPEG on the processor.

    Its other extensions look for CUDA's libraries, and complain on stderr where there are none.
    """
    try:
        with only_the_processors_extension():
            from nvidia import nvimgcodec
    except (ImportError, OSError) as error:
        raise cannot_be_used(" ".join(str(error).split())) from error
    assert isinstance(nvimgcodec, ModuleType)
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
        wanted = {"NVIMGCODEC_EXTENSIONS_PATH": folder, "PYNVIMGCODEC_VERBOSITY": "0"}  # 0: what it refuses, it returns
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
