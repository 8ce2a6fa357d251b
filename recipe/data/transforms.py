"""Transforms without randomness: resize, centre crop, normalisation.

An evaluation view is a resize of the short side and a centre crop, with the pixels of torchvision's functional v2 with
antialiasing. Normalisation happens on the device.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from recipe.config.schema import EvaluationConfig, Interpolation
from recipe.data.manifest import Manifest
from recipe.errors import UserError
from recipe.run.records import Interface, Setting

INTERPOLATIONS = {
    Interpolation.bilinear: InterpolationMode.BILINEAR,
    Interpolation.bicubic: InterpolationMode.BICUBIC,
}
RESAMPLING = {
    InterpolationMode.BILINEAR: Image.Resampling.BILINEAR,
    InterpolationMode.BICUBIC: Image.Resampling.BICUBIC,
}
FILTER_RADIUS = {InterpolationMode.BILINEAR: 1, InterpolationMode.BICUBIC: 2}  # pixels of the coarser grid
PIXELS_LIMIT = 4096  # of a view: the interface in an untrusted file could require any size
RESIZED_BYTES_MAX = 64_000_000  # of a resized image. Of larger ones only the centre is computed


@dataclass(frozen=True)
class EvaluationTransform:
    """Resize the short side, crop the centre: one view of an image, uint8 in and out."""

    resize_pixels: int
    crop_pixels: int
    interpolation: InterpolationMode
    antialias: bool = True

    def __call__(self, image: Tensor) -> Tensor:
        """[3, H, W] -> [3, crop, crop]."""
        size = self._resized_size(image)
        if 3 * size[0] * size[1] > RESIZED_BYTES_MAX and self.antialias:
            return centre_of_resized(image, size, self.crop_pixels, self.interpolation)
        resized = resize(image, size, self.interpolation, self.antialias)
        cropped: Tensor = functional.center_crop(resized, [self.crop_pixels, self.crop_pixels])
        return cropped

    def _resized_size(self, image: Tensor) -> tuple[int, int]:
        """Height and width with the given short side. The long side is rounded down, as in torchvision."""
        height, width = image.shape[-2:]
        short, long = sorted((height, width))
        resized_long = int(self.resize_pixels * long / short)
        return (self.resize_pixels, resized_long) if height <= width else (resized_long, self.resize_pixels)

    @property
    def name(self) -> str:
        """The part of a metric's name for this view."""
        return f"resize{self.resize_pixels}-crop{self.crop_pixels}-{self.interpolation.value}"

    def fingerprint(self) -> str:
        """SHA-256 of the transformed pixels of fixed images."""
        return pixels_sha256([self(fixed_image(*size)) for size in ((300, 400), (40, 30), (512, 256))])

    def facts(self) -> dict[str, Setting]:
        return {
            "resize_short_side_pixels": self.resize_pixels,
            "center_crop_pixels": self.crop_pixels,
            "interpolation": self.interpolation.value,
            "antialias": self.antialias,
        }


def build_evaluation_transform(config: EvaluationConfig) -> EvaluationTransform:
    return EvaluationTransform(config.resize_pixels, config.crop_pixels, INTERPOLATIONS[config.interpolation])


def centre_of_resized(image: Tensor, size: tuple[int, int], crop: int, interpolation: InterpolationMode) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, crop, crop]: the centre of the image resized to `size`, without the rest.

    For very long images: one of 60,000 x 2 pixels would have 6 GB at a short side of 256. Pillow resizes a part with
    edges between pixels as in the full image, if given the rows and columns that the filter reaches. Differs from
    `resize` by rounding, one level of 255 or two with bicubic weights.
    """
    corners: list[tuple[float, float]] = []
    region = image
    for axis, (pixels, resized) in enumerate(zip(image.shape[1:], size, strict=True), start=1):
        scale, offset = pixels / resized, round((resized - crop) / 2)
        start, end = offset * scale, (offset + crop) * scale
        reach = FILTER_RADIUS[interpolation] * max(scale, 1.0) + 1
        first, last = max(0, math.floor(start - reach)), min(pixels, math.ceil(end + reach))
        region = region.narrow(axis, first, last - first)
        corners.append((start - first, min(end, last) - first))
    (top, bottom), (left, right) = corners
    part = Image.fromarray(region.permute(1, 2, 0).contiguous().numpy())
    centre = part.resize((crop, crop), RESAMPLING[interpolation], box=(left, top, right, bottom))
    return torch.from_numpy(np.array(centre)).permute(2, 0, 1)


def resize(
    image: Tensor, size: tuple[int, int], interpolation: InterpolationMode, antialias: bool, out: Tensor | None = None
) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, *size], into `out` if given (channels last, [3, *size]).

    The pixels are those of torchvision's functional v2. torchvision converts a single channels-last image to
    channels-first and back, which takes longer than the resize, so torch's kernel is called with `out=`. If torchvision
    uses another kernel (old CPUs), it is called itself.
    """
    if out is None:
        out = empty_image(size)
    if antialias and uses_native_kernel(interpolation) and writes_natively(image, interpolation, out):
        return out
    return out.copy_(functional.resize(image, list(size), interpolation=interpolation, antialias=antialias))


KERNELS = {
    InterpolationMode.BILINEAR: torch.ops.aten._upsample_bilinear2d_aa.out,
    InterpolationMode.BICUBIC: torch.ops.aten._upsample_bicubic2d_aa.out,
}


def empty_image(size: tuple[int, int]) -> Tensor:
    """uint8 [3, *size] with channels last in memory."""
    return torch.empty((*size, 3), dtype=torch.uint8).permute(2, 0, 1)


def writes_natively(image: Tensor, interpolation: InterpolationMode, out: Tensor) -> bool:
    """True if torch's kernel accepts the memory layouts of the image and `out`."""
    if image.stride(0) != 1:
        image = empty_image((image.shape[-2], image.shape[-1])).copy_(image)
    try:
        KERNELS[interpolation](image[None], list(out.shape[-2:]), False, None, None, out=out[None])
    except RuntimeError:
        return False
    return True


@cache
def uses_native_kernel(interpolation: InterpolationMode) -> bool:
    """True if the kernel has torchvision's pixels on this machine with this torch, by comparing both."""
    for source, size in (((97, 131), (64, 64)), ((40, 30), (64, 48)), ((64, 64), (64, 64))):
        image, out = fixed_image(*source), empty_image(size)
        expected = functional.resize(image, list(size), interpolation=interpolation, antialias=True)
        if not (writes_natively(image, interpolation, out) and torch.equal(out, expected)):
            return False
    return True


class Normalisation:
    """uint8 [N, 3, H, W] on any device -> float32, normalised by the data set's mean and standard deviation."""

    def __init__(self, mean: list[float], std: list[float], device: torch.device) -> None:
        self.mean = torch.tensor(mean, device=device).mul(255).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=device).mul(255).view(1, 3, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def values(self) -> dict[str, list[float]]:
        """Mean and standard deviation in [0, 1], read back from the tensors in use."""
        return {
            name: [round(value / 255, 6) for value in tensor.flatten().tolist()]
            for name, tensor in (("mean", self.mean), ("std", self.std))
        }

    def facts(self) -> dict[str, Setting]:
        return {name: list(values) for name, values in self.values().items()}


def fixed_image(height: int, width: int) -> Tensor:
    """A fixed uint8 image from integer arithmetic: gradients with a fine texture, all rows different."""
    rows = torch.arange(height).view(1, -1, 1)
    columns = torch.arange(width).view(1, 1, -1)
    channels = torch.arange(3).view(-1, 1, 1)
    return ((rows * (3 + channels) + columns * (5 - channels) + (rows * columns) % 29 * 4) % 256).to(torch.uint8)


def pixels_sha256(images: list[Tensor]) -> str:
    """SHA-256 of pixels, to detect a change of a transform."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(str(list(image.shape)).encode())
        digest.update(image.contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- with the weights: the `Interface` of a checkpoint or an exported file ---------------------------


def interface_from(transform: EvaluationTransform, normalisation: Normalisation, manifest: Manifest) -> Interface:
    """The preprocessing of the evaluation and the classes. Stored with the weights."""
    mean_and_std = normalisation.values()
    return Interface(
        classes=manifest.classes,
        label_convention=manifest.label_convention,
        resize_pixels=transform.resize_pixels,
        crop_pixels=transform.crop_pixels,
        interpolation=transform.interpolation.value,
        antialias=transform.antialias,
        mean=mean_and_std["mean"],
        std=mean_and_std["std"],
    )


def transform_of(interface: Interface, where: str) -> EvaluationTransform:
    """The evaluation view of an interface. Raises `UserError` for an impossible one."""
    known = {mode.value: mode for mode in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)}
    is_sound = 1 <= interface.crop_pixels <= interface.resize_pixels <= PIXELS_LIMIT
    colours = (*interface.mean, *interface.std)
    is_sound &= len(interface.mean) == len(interface.std) == 3 and all(map(math.isfinite, colours))
    is_sound &= all(deviation > 0 for deviation in interface.std)
    if not is_sound or interface.interpolation not in known or not interface.classes:
        raise UserError(
            f"{where} describes an invalid view: a short side of {interface.resize_pixels} pixels, a crop of "
            f"{interface.crop_pixels}, {interface.interpolation}, {len(interface.classes)} classes, "
            f"mean {interface.mean[:4]}, std {interface.std[:4]}"
        )
    return EvaluationTransform(
        interface.resize_pixels, interface.crop_pixels, known[interface.interpolation], interface.antialias
    )
