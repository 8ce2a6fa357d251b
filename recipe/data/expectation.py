"""Holds raw data to what it claims to be, before anything is written: `data.expect=ilsvrc2012`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from recipe.data import imagenet
from recipe.data.listing import Raw
from recipe.errors import UserError
from recipe.records import Archive


def require_ilsvrc2012(raw: Raw) -> None:
    """Classes, counts and the known first labels; each violation is one sentence with the way out."""
    way_out = "with data.expect=nothing it is accepted, and the recipe says that it is not ILSVRC2012"
    if len(raw.class_ids) != imagenet.CLASSES:
        raise UserError(f"found {len(raw.class_ids)} classes, ILSVRC2012 has {imagenet.CLASSES}; {way_out}")
    if imagenet.class_list_sha256(raw.class_ids) != imagenet.CLASS_LIST_SHA256:
        raise UserError(f"the {imagenet.CLASSES} classes are not those of ILSVRC2012, or not in their order; {way_out}")
    for split, expected in imagenet.IMAGES.items():
        if len(raw.rows[split]) != expected:
            raise UserError(f"found {len(raw.rows[split]):,} {split} images, ILSVRC2012 has {expected:,}; {way_out}")
    labels = raw.rows["val"]["label"]
    counts = np.bincount(labels, minlength=imagenet.CLASSES)
    odd = np.flatnonzero(counts != imagenet.VALIDATION_IMAGES_PER_CLASS)
    if len(odd):
        raise UserError(
            f"class {raw.class_ids[odd[0]]} has {counts[odd[0]]} validation images, ILSVRC2012 has "
            f"{imagenet.VALIDATION_IMAGES_PER_CLASS} in each; {way_out}"
        )
    first = tuple(labels[: len(imagenet.FIRST_VALIDATION_LABELS)].tolist())
    if first != imagenet.FIRST_VALIDATION_LABELS:
        raise UserError(
            f"the first validation labels are {first}, of ILSVRC2012 {imagenet.FIRST_VALIDATION_LABELS}: "
            f"the labels are mixed up; {way_out}"
        )


def require_published_md5(found: Iterable[Archive], published: Mapping[str, str]) -> None:
    """The archives are the very files that were published."""
    for archive in found:
        if archive.is_published_md5 is False:
            raise UserError(
                f"{archive.name} has md5 {archive.md5}, published is {published[archive.name]}: a damaged or changed "
                "archive; download it again, or accept it with data.expect=nothing, which the recipe will say"
            )
