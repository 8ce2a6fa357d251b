"""The sources of raw images: find their layout and list them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from recipe.config.schema import DataConfig, Source
from recipe.errors import UserError
from recipe.preprocessing.demo import write_demo_archives
from recipe.preprocessing.folders import fetch_imagenette, list_folder_data_set, list_imagenette
from recipe.preprocessing.ilsvrc import KAGGLE_IMAGES, LOOKED_FOR, list_ilsvrc, list_kaggle
from recipe.preprocessing.listing import Raw
from recipe.run.files import disk_errors, display_path

DRAWN_SPLIT = "drawn like the training images, from other random numbers"
DRAWN_OR_DOWNLOADED = (Source.demo, Source.imagenette)


def find_raw(data: DataConfig) -> Raw:
    """List the raw images of `data`. Draws the demo and downloads Imagenette first.

    Raises `UserError` with the accepted layouts and the place to get the files.
    """
    raw_dir = check_raw_dir(data)
    if data.source in DRAWN_OR_DOWNLOADED:
        with disk_errors(raw_dir):
            raw_dir.mkdir(parents=True, exist_ok=True)
            if data.source is Source.demo:
                write_demo_archives(raw_dir, data.train_images_per_class, data.validation_images_per_class)
            else:
                fetch_imagenette(raw_dir)
    with read_errors(raw_dir):
        if data.source is Source.folder:
            raw = list_folder_data_set(raw_dir, data.validation_fraction)
        elif data.source is Source.imagenette:
            raw = list_imagenette(raw_dir)
        elif (raw_dir / KAGGLE_IMAGES).is_dir():
            raw = list_kaggle(raw_dir)
        else:
            raw = list_ilsvrc(raw_dir)
    if data.source is Source.demo:
        raw.layout, raw.validation_split = f"drawn, in the layout of {raw.layout}", DRAWN_SPLIT
    check_every_class(raw)
    return raw


@contextmanager
def read_errors(raw_dir: Path) -> Iterator[None]:
    """Raise `UserError` for errors of reading: missing permission, a link to itself, a failing disk."""
    try:
        yield
    except OSError as error:
        where = display_path(error.filename or raw_dir)
        raise UserError(
            f"cannot read {where}: {error.strerror or error}; fix it, or give another data.raw_dir"
        ) from error


def check_raw_dir(data: DataConfig) -> Path:
    """The folder of raw files. Raises `UserError` unless it exists or its files are drawn or downloaded."""
    folders = "a folder of images for each class, or train/ and val/ with such folders"
    wanted = folders if data.source is Source.folder else LOOKED_FOR
    if data.raw_dir is None:
        raise UserError(f"data.raw_dir is not given: name the folder that has {wanted}")
    raw_dir = Path(data.raw_dir)
    with read_errors(raw_dir):
        is_there = data.source in DRAWN_OR_DOWNLOADED or raw_dir.is_dir()
    if not is_there:
        raise UserError(f"data.raw_dir={display_path(raw_dir)} is not a folder: it should have {wanted}")
    return raw_dir


def check_every_class(raw: Raw) -> None:
    """Raise `UserError` for a class without training images: it would move the labels of the others."""
    present = np.unique(raw.rows["train"]["label"])
    absent = sorted(set(range(len(raw.class_ids))) - set(present.tolist()))
    if absent:
        raise UserError(
            f"class {raw.class_ids[absent[0]]!r} has no training images ({len(absent)} of {len(raw.class_ids)} classes "
            "have none): remove its folder or put images into it"
        )
