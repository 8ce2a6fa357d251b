"""Any folder of class folders is a data set; Imagenette is one of them.

Keys are `class/name` with all but letters, digits, '_' and '-' percent-encoded, since readers of WebDataset cut a name
at its first dot.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from recipe.data import imagenet
from recipe.data.listing import (
    IMAGE_SUFFIXES,
    NO_SPLIT,
    Listing,
    Raw,
    Rows,
    class_folders,
    found_in,
    is_image,
    list_class_folders,
)
from recipe.errors import UserError
from recipe.files import display_path

IMAGE_NAME = re.compile(rf"^(.+)({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$", re.IGNORECASE | re.DOTALL)
UNSAFE = re.compile(rb"[^A-Za-z0-9_-]")
LABEL_CONVENTION = "position among the sorted names of the class folders, counted from 0"
IMAGENETTE_FOLDER = "imagenette2"
VALIDATION_FOLDERS = ("val", "valid", "validation")
SPLIT_FOLDERS = ("train", *VALIDATION_FOLDERS, "test")


def list_folder_data_set(raw_dir: Path, validation_fraction: float) -> Raw:
    """raw_dir/{train,val}/<class>/<image>, or raw_dir/<class>/<image> with a validation set drawn by hash.

    The folder of validation images may also be called valid or validation.
    """
    root, given = split_folders(raw_dir)
    raw = Raw("class folders", LABEL_CONVENTION, "", keeps_png=True, raw_dir=raw_dir)
    train = Listing(raw)
    raw.class_ids = list_class_folders(root, train, folder_keys)
    if root != raw_dir:
        raw.leave_out_all(raw_dir, [folder.name for folder in (root, given) if folder], NO_SPLIT)
    rows = train.sorted_rows(display_path(root))
    if given:
        validation = Listing(raw)
        list_class_folders(given, validation, folder_keys, raw.class_ids)
        raw.rows = {"train": rows, "val": validation.sorted_rows(display_path(given))}
        raw.validation_split = f"given with the raw data, in {given.name}/"
        return raw
    raw.rows, saved = split_by_hash(rows, validation_fraction)
    raw.validation_split = f"held out by the SHA-256 of the keys, a fraction of {validation_fraction:g}" + (
        f"; {saved} classes that would have lost all their images keep one for training" if saved else ""
    )
    return raw


def split_folders(raw_dir: Path) -> tuple[Path, Path | None]:
    """The folder of the training classes, and that of the validation classes where there is one."""
    names = class_folders(raw_dir)
    if "train" not in names or train_is_a_class(raw_dir, names):
        if not names:
            refuse_flat_images(raw_dir)
        return raw_dir, None
    given = [raw_dir / name for name in VALIDATION_FOLDERS if name in names]
    if len(given) > 1:
        raise UserError(f"{display_path(raw_dir)} holds {given[0].name}/ and {given[1].name}/; leave one of them")
    for folder in (raw_dir / "train", *given):
        refuse_flat_images(folder)
    return raw_dir / "train", given[0] if given else None


def train_is_a_class(raw_dir: Path, names: list[str]) -> bool:
    """A folder train/ of images beside other classes holds pictures of trains."""
    return bool(set(names) - set(SPLIT_FOLDERS)) and not class_folders(raw_dir / "train")


def refuse_flat_images(folder: Path) -> None:
    """Images beside or instead of class folders are of no class, and would be left out without a word."""
    flat = [entry.name for entry in found_in(folder) if is_image(folder, entry.name) and not entry.is_dir()]
    if flat:
        raise UserError(
            f"{display_path(folder)} itself holds images, such as {flat[0]!r} ({len(flat):,} in all): move each into a "
            "folder of its class"
        )


def list_imagenette(raw_dir: Path) -> Raw:
    """imagenette2/{train,val}/<wnid>/*.JPEG, as `fetch_imagenette` left it.

    Unproven against the real host, which could not be reached where this was written; tests use a generated archive.
    """
    from torchvision.datasets import Imagenette  # imports torch: seconds that only this source pays

    raw = list_folder_data_set(raw_dir / IMAGENETTE_FOLDER, validation_fraction=0.0)
    raw.layout, raw.label_convention, raw.keeps_png = "Imagenette 2, full size", imagenet.LABEL_CONVENTION, False
    known = Imagenette(raw_dir, split="train", size="full", download=False)
    raw.class_names = {wnid: ", ".join(names) for wnid, names in zip(known.wnids, known.classes, strict=True)}
    raw.archives = [path for path in [raw_dir / f"{IMAGENETTE_FOLDER}.tgz"] if path.is_file()]
    return raw


def fetch_imagenette(raw_dir: Path) -> None:
    """Download (unless it is there), check and unpack imagenette2.tgz; the folder gets its name only when complete.

    A .tgz has no random access, so this is the one archive that is unpacked by its members' names: by torchvision, and
    only after the archive's md5 was found to be the published one.
    """
    if (raw_dir / IMAGENETTE_FOLDER).is_dir():
        return
    from torchvision.datasets import Imagenette

    archive, unpacking = raw_dir / f"{IMAGENETTE_FOLDER}.tgz", raw_dir / "unpacking"
    unpacking.mkdir(exist_ok=True)
    shutil.rmtree(unpacking / IMAGENETTE_FOLDER, ignore_errors=True)  # torchvision takes half of it for the whole
    if archive.is_file() and not (unpacking / archive.name).exists():
        (unpacking / archive.name).symlink_to(archive.resolve())
    try:
        Imagenette(unpacking, split="train", size="full", download=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(
            f"Imagenette could not be downloaded into {display_path(raw_dir)} ({error}); fetch imagenette2.tgz from "
            "github.com/fastai/imagenette by other means and put it there"
        ) from error
    (unpacking / IMAGENETTE_FOLDER).rename(raw_dir / IMAGENETTE_FOLDER)
    if not archive.exists():
        (unpacking / archive.name).rename(archive)


def folder_keys(class_id: str, names: list[str]) -> dict[str, str]:
    """`class/stem`, or `class/file name` where two files of the class share a stem, percent-encoded."""
    stems = {name: matched[1] if (matched := IMAGE_NAME.match(name)) else name for name in names}
    while repeated := {stem for stem, count in Counter(stems.values()).items() if count > 1}:
        stems = {name: name if stem in repeated else stem for name, stem in stems.items()}
    return {name: f"{percent_encoded(class_id)}/{percent_encoded(stem)}" for name, stem in stems.items()}


def percent_encoded(name: str) -> str:
    """All but letters, digits, '_' and '-' as %XX of the bytes of the file name ('.' too, unlike in URLs)."""
    return UNSAFE.sub(lambda found: b"%%%02X" % found[0][0], os.fsencode(name)).decode("ascii")


def split_by_hash(rows: Rows, validation_fraction: float) -> tuple[dict[str, Rows], int]:
    """Hold out each image by its own key, so that adding images moves none from one side to the other.

    But for one of a class whose images would all be held out: the one with the largest hash stays for training. Also
    returns the number of such classes.
    """
    digests = b"".join(hashlib.sha256(key).digest()[:8] for key in rows["key"].tolist())
    numbers = np.frombuffer(digests, dtype=">u8").astype(np.uint64)
    is_validation = numbers < validation_fraction * 2.0**64
    lost = np.setdiff1d(rows["label"][is_validation], rows["label"][~is_validation])
    for label in lost:
        of_class = np.flatnonzero(rows["label"] == label)
        is_validation[of_class[np.argmax(numbers[of_class])]] = False
    if is_validation.all() or not is_validation.any():
        raise UserError(
            f"data.validation_fraction={validation_fraction:g} of {len(rows)} images leaves "
            f"{int(is_validation.sum())} for validation; give another fraction or a val/ folder"
        )
    return {"train": rows[~is_validation], "val": rows[is_validation]}, len(lost)
