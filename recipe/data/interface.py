"""From the live view, normalisation and classes to the `Interface` that travels with weights, and back.

Whoever has only a checkpoint or an exported file makes the same pixels with it as the evaluation that measured them.
"""

from __future__ import annotations

import math

from torchvision.transforms import InterpolationMode

from recipe.data.shards import Manifest
from recipe.data.transforms import EvaluationTransform, Normalisation
from recipe.errors import UserError
from recipe.records import Interface

PIXELS_LIMIT = 4096  # no network of this project sees more; an interface from a stranger could ask for any size


def interface_from(transform: EvaluationTransform, normalisation: Normalisation, manifest: Manifest) -> Interface:
    """Read back from the objects that measure."""
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
    """The evaluation view that the interface describes; raises `UserError` for one that cannot be."""
    known = {mode.value: mode for mode in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)}
    is_sound = 1 <= interface.crop_pixels <= interface.resize_pixels <= PIXELS_LIMIT
    colours = (*interface.mean, *interface.std)
    is_sound &= len(interface.mean) == len(interface.std) == 3 and all(map(math.isfinite, colours))
    is_sound &= all(deviation > 0 for deviation in interface.std)
    if not is_sound or interface.interpolation not in known or not interface.classes:
        raise UserError(
            f"{where} describes a view that cannot be: a short side of {interface.resize_pixels} pixels, a crop of "
            f"{interface.crop_pixels}, {interface.interpolation}, {len(interface.classes)} classes, "
            f"mean {interface.mean[:4]}, std {interface.std[:4]}"
        )
    return EvaluationTransform(
        interface.resize_pixels, interface.crop_pixels, known[interface.interpolation], interface.antialias
    )
