"""Finds the raw images of a data set, in whichever layout people have them, and lists them without touching them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from recipe.config.schema import DataConfig, Source
from recipe.data.demo import write_demo_archives
from recipe.data.folders import fetch_imagenette, list_folder_data_set, list_imagenette
from recipe.data.ilsvrc import KAGGLE_IMAGES, LOOKED_FOR, list_ilsvrc, list_kaggle
from recipe.data.listing import Raw
from recipe.errors import UserError
from recipe.run import disk_errors, shown_path

DRAWN_SPLIT = "drawn like the training images, from other random numbers"
DRAWN_OR_DOWNLOADED = (Source.demo, Source.imagenette)


def find_raw(data: DataConfig) -> Raw:
    """The listing of the raw images of `data`; raises `UserError` with what is looked for and where to get it."""
    raw_dir = given_raw_dir(data)
    fill(raw_dir, data)
    with read_errors(raw_dir):
        raw = listed(raw_dir, data)
    if data.source is Source.demo:
        raw.layout, raw.validation_split = f"drawn, in the layout of {raw.layout}", DRAWN_SPLIT
    require_every_class(raw)
    return raw


@contextmanager
def read_errors(raw_dir: Path) -> Iterator[None]:
    """Turn what a folder without permission, a link to itself or a failing disk says into one sentence."""
    try:
        yield
    except OSError as error:
        where = shown_path(error.filename or raw_dir)
        raise UserError(
            f"cannot read {where}: {error.strerror or error}; mend it, or give another data.raw_dir"
        ) from error


def listed(raw_dir: Path, data: DataConfig) -> Raw:
    """By the layout that is found."""
    if data.source is Source.folder:
        return list_folder_data_set(raw_dir, data.validation_fraction)
    if data.source is Source.imagenette:
        return list_imagenette(raw_dir)
    if (raw_dir / KAGGLE_IMAGES).is_dir():
        return list_kaggle(raw_dir)
    return list_ilsvrc(raw_dir)


def given_raw_dir(data: DataConfig) -> Path:
    """The folder of raw files, which has to be there unless it is filled by this project."""
    wanted = "a folder of images for each class, or train/ and val/ with such folders"
    wanted = wanted if data.source is Source.folder else LOOKED_FOR
    if data.raw_dir is None:
        raise UserError(f"data.raw_dir is not given: name the folder that holds {wanted}")
    raw_dir = Path(data.raw_dir)
    with read_errors(raw_dir):
        is_there = data.source in DRAWN_OR_DOWNLOADED or raw_dir.is_dir()
    if not is_there:
        raise UserError(f"data.raw_dir={shown_path(raw_dir)} is no folder: it should hold {wanted}")
    return raw_dir


def fill(raw_dir: Path, data: DataConfig) -> None:
    """Draw the demo's archives, download Imagenette; whoever has a data set of their own brings it."""
    if data.source in DRAWN_OR_DOWNLOADED:
        with disk_errors(raw_dir):
            raw_dir.mkdir(parents=True, exist_ok=True)
            if data.source is Source.demo:
                write_demo_archives(raw_dir, data.train_images_per_class, data.validation_images_per_class)
            else:
                fetch_imagenette(raw_dir)


def require_every_class(raw: Raw) -> None:
    """A class without training images cannot be learnt, and would still move the labels of all others."""
    present = np.unique(raw.rows["train"]["label"])
    absent = sorted(set(range(len(raw.class_ids))) - set(present.tolist()))
    if absent:
        raise UserError(
            f"class {raw.class_ids[absent[0]]!r} has no training images ({len(absent)} of {len(raw.class_ids)} classes "
            "have none): remove its folder or put images into it"
        )
