"""From bytes to pixels to the network's input, without randomness: the contract of training and evaluation.

Decoding gives uint8 RGB; an evaluation view is a resize of the short side and a centre crop, both through
torchvision's functional v2 with antialiasing; normalisation happens on the device. EXIF orientation is never
applied: ImageNet training never did, and one image in a thousand carries one.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from recipe.config import Decoder, EvaluationConfig, Interpolation
from recipe.errors import UserError
from recipe.records import Setting

Decode = Callable[[bytes], Tensor]
INTERPOLATIONS = {
    Interpolation.bilinear: InterpolationMode.BILINEAR,
    Interpolation.bicubic: InterpolationMode.BICUBIC,
}


def build_decoder(decoder: Decoder) -> Decode:
    """The function that turns JPEG or PNG bytes into uint8 RGB of shape [3, H, W]; both libraries ignore EXIF.

    Raises `UserError` where TorchCodec's wheel does not load (a CPU-only or CUDA 12 torch).
    """
    if decoder is Decoder.pillow:
        return decode_with_pillow
    try:
        from torchcodec.decoders import decode_jpeg  # type: ignore[attr-defined]  # here: it loads shared libraries
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"data.decoder=torchcodec cannot be loaded beside this torch ({torch.__version__}); use data.decoder=pillow"
        ) from error

    def decode_with_torchcodec(content: bytes) -> Tensor:
        if content[:2] != JPEG_START:
            return decode_with_pillow(content)  # the few images that preprocessing stored as lossless PNG
        image = decode_jpeg(without_exif(content), mode="RGB")
        assert isinstance(image, Tensor), "one source gives one image"
        return image

    return decode_with_torchcodec


def decode_with_pillow(content: bytes) -> Tensor:
    """uint8 RGB of shape [3, H, W]; the tests' oracle and the decoder where TorchCodec does not load."""
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


JPEG_START, EXIF_SEGMENT = b"\xff\xd8", 0xE1
SCAN, END, FILL = 0xDA, 0xD9, 0xFF
WITHOUT_LENGTH = (0x00, 0x01, *range(0xD0, 0xD8))  # stuffing, TEM, restart markers: no segment follows


def without_exif(content: bytes) -> bytes:
    """A JPEG without its EXIF segments (ITU T.81, annex B: a marker, then a big-endian length that counts itself).

    TorchCodec applies the orientation that stands there and cannot be told not to; the pixels stay the same.
    """
    kept, copied = [], 0
    for marker, start, end in header_segments(content):
        if marker == EXIF_SEGMENT and content[start + 4 : start + 10] == b"Exif\x00\x00":
            kept.append(content[copied:start])
            copied = end
    return b"".join([*kept, content[copied:]])


def header_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment before the first scan, found as libjpeg's next_marker() does.

    It skips whatever stands between two segments (stray bytes, restart markers, fill bytes), so they hide no EXIF.
    """
    position = len(JPEG_START)
    while (position := content.find(b"\xff", position)) >= 0 and position + 4 <= len(content):
        marker = content[position + 1]
        if marker in (SCAN, END):
            return
        if marker == FILL or marker in WITHOUT_LENGTH:
            position += 1 if marker == FILL else 2
            continue
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4])
        yield marker, position, end
        position = end


@dataclass(frozen=True)
class EvaluationTransform:
    """Resize the short side, crop the centre: one view of an image, uint8 in and out."""

    resize_pixels: int
    crop_pixels: int
    interpolation: InterpolationMode
    antialias: bool = True

    def __call__(self, image: Tensor) -> Tensor:
        """[3, H, W] -> [3, crop, crop]."""
        resized = functional.resize(
            image, [self.resize_pixels], interpolation=self.interpolation, antialias=self.antialias
        )
        cropped: Tensor = functional.center_crop(resized, [self.crop_pixels, self.crop_pixels])
        return cropped

    @property
    def name(self) -> str:
        """The part of a metric's name that says how pixels were made."""
        return f"resize{self.resize_pixels}-crop{self.crop_pixels}-{self.interpolation.value}"

    def fingerprint(self) -> str:
        """Identifies what this object does by the pixels it makes of fixed pictures."""
        return pixels_sha256([self(fixed_image(*size)) for size in ((300, 400), (40, 30), (512, 256))])

    def facts(self) -> dict[str, Setting]:
        """What this object does, for the record."""
        return {
            "resize_short_side_pixels": self.resize_pixels,
            "center_crop_pixels": self.crop_pixels,
            "interpolation": self.interpolation.value,
            "antialias": self.antialias,
        }


def build_evaluation_transform(config: EvaluationConfig) -> EvaluationTransform:
    """The evaluation view that the configuration describes."""
    return EvaluationTransform(config.resize_pixels, config.crop_pixels, INTERPOLATIONS[config.interpolation])


class Normalisation:
    """uint8 [N, 3, H, W] on any device -> float32 with the data set's mean and deviation taken out."""

    def __init__(self, mean: list[float], std: list[float], device: torch.device) -> None:
        self.mean = torch.tensor(mean, device=device).mul(255).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=device).mul(255).view(1, 3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def values(self) -> dict[str, list[float]]:
        """Mean and deviation in [0, 1], read back from the tensors that are applied."""
        return {
            name: [round(value / 255, 6) for value in tensor.flatten().tolist()]
            for name, tensor in (("mean", self.mean), ("std", self.std))
        }

    def facts(self) -> dict[str, Setting]:
        """The same, for the record."""
        return {name: list(values) for name, values in self.values().items()}


def fixed_image(height: int, width: int) -> Tensor:
    """The same uint8 picture everywhere, from integers alone: gradients with a fine texture, all rows different."""
    rows = torch.arange(height).view(1, -1, 1)
    columns = torch.arange(width).view(1, 1, -1)
    channels = torch.arange(3).view(-1, 1, 1)
    return ((rows * (3 + channels) + columns * (5 - channels) + (rows * columns) % 29 * 4) % 256).to(torch.uint8)


def pixels_sha256(images: list[Tensor]) -> str:
    """Identifies what a transform does by the pixels that it makes: a change in its code changes this."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(str(list(image.shape)).encode())
        digest.update(image.contiguous().numpy().tobytes())
    return digest.hexdigest()
