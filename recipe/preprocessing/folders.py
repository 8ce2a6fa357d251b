"""Data sets in class folders, Imagenette among them.

Keys are `class/name`, with all but letters, digits, '_' and '-' percent-encoded, since WebDataset readers cut names at
the first dot.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from recipe.errors import CONTROLS, UserError
from recipe.preprocessing import imagenet
from recipe.preprocessing.listing import (
    BESIDE,
    IMAGE_SUFFIXES,
    NO_SPLIT,
    Listing,
    Naming,
    Raw,
    Rows,
    folder_entries,
    is_hidden,
    is_image,
)
from recipe.run.files import display_path, printable

IMAGE_NAME = re.compile(rf"^(.+)({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$", re.IGNORECASE | re.DOTALL)
UNSAFE = re.compile(rb"[^A-Za-z0-9_-]")
FOLDER_LABEL_CONVENTION = "position among the sorted names of the class folders, counted from 0"
IMAGENETTE_FOLDER = "imagenette2"
VALIDATION_FOLDERS = ("val", "valid", "validation")
SPLIT_FOLDERS = ("train", *VALIDATION_FOLDERS, "test")
LOOK_ALIKES_SHOWN = 10
LATIN_SHAPES = str.maketrans(  # Cyrillic and Greek letters with the shape of a Latin one
    "аеорсухіјѕһԁԛԝАВЕКМНОРСТУХЅІЈοανρυκιΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "aeopcyxijshdqwABEKMHOPCTYXSIJoavpukiABEZHIKMNOPTYX",
)


# ---- class folders ----------------------------------------------------------------------------------


def list_class_folders(root: Path, listing: Listing, naming: Naming, class_ids: list[str] | None = None) -> list[str]:
    """List root/<class>/<image>. Labels are positions in `class_ids`, by default the sorted folders."""
    check_folder(root)
    folders = class_folders(root)
    check_distinct_names(folders, display_path(root))
    listing.raw.leave_out_all(root, folders, BESIDE)
    classes = class_ids if class_ids is not None else folders
    positions = {class_id: position for position, class_id in enumerate(classes)}
    for class_id in folders:
        label = position_of(class_id, positions, f"{class_id}/...")
        listing.add_folder(root / class_id, class_id, naming, lambda _, label=label: label)  # type: ignore[misc]
    return classes


def position_of(class_id: str, positions: Mapping[str, int], key: str) -> int:
    """The label of a validation image. Raises `UserError` if its class has no training images."""
    if class_id not in positions:
        twins = [other for other in positions if appearance(other) == appearance(class_id)]
        hint = (
            f"; give {class_id!a} and the training class {twins[0]!a}, which looks like it, one name" if twins else ""
        )
        raise UserError(f"the validation image {key} is of class {class_id}, which has no training images{hint}")
    return positions[class_id]


def class_folders(root: Path) -> list[str]:
    """The sorted names of the folders in `root`, without hidden ones: the order of torchvision's ImageFolder."""
    names = [entry.name for entry in folder_entries(root) if entry.is_dir() and not is_hidden(entry.name)]
    for name in names:
        if name != printable(name) or "\n" in name or CONTROLS.search(name):
            raise UserError(f"the class folder {name!r} in {display_path(root)} has no printable name; rename it")
    return names


def check_folder(path: Path) -> None:
    """Raise `UserError` if a folder of a layout is missing."""
    if not path.is_dir():
        raise UserError(f"{display_path(path)} is missing: this layout needs it")


def check_distinct_names(names: Iterable[str], where: str) -> None:
    """Raise `UserError` if two names are the same text in two Unicode normal forms.

    A folder that was copied from a Mac may be a second one: its ä is an a with a combining mark.
    """
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise UserError(
                f"the class folders {other!a} and {name!a} in {where} have the same name in two spellings of Unicode: "
                "merge them, or rename one"
            )


def look_alike_lines(names: Iterable[str]) -> Iterator[str]:
    """A warning for each of the first ten groups of names that look alike (`Cat` and `cat` can be meant)."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(appearance(name), []).append(name)
    for group in [group for group in groups.values() if len(group) > 1][:LOOK_ALIKES_SHOWN]:
        yield f"warning: classes whose names look alike: {', '.join(map(ascii, group))}; merge those that are one class"


def appearance(name: str) -> str:
    """The same text for names that look alike: compatible forms, alphabets, case and spaces count as equal."""
    latin = unicodedata.normalize("NFKC", name).translate(LATIN_SHAPES)
    visible = "".join(letter for letter in latin if unicodedata.category(letter) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", visible.casefold()).split())


# ---- data sets of class folders ---------------------------------------------------------------------


def list_folder_data_set(raw_dir: Path, validation_fraction: float) -> Raw:
    """List raw_dir/{train,val}/<class>/<image>, or raw_dir/<class>/<image> with a validation set chosen by hash.

    The folder of validation images may also be called valid or validation.
    """
    root, validation_root = split_folders(raw_dir)
    raw = Raw("class folders", FOLDER_LABEL_CONVENTION, "", keeps_png=True, raw_dir=raw_dir)
    train = Listing(raw)
    raw.class_ids = list_class_folders(root, train, folder_keys)
    if root != raw_dir:
        raw.leave_out_all(raw_dir, [folder.name for folder in (root, validation_root) if folder], NO_SPLIT)
    rows = train.sorted_rows(display_path(root))
    if validation_root:
        validation = Listing(raw)
        list_class_folders(validation_root, validation, folder_keys, raw.class_ids)
        raw.rows = {"train": rows, "val": validation.sorted_rows(display_path(validation_root))}
        raw.validation_split = f"given with the raw data, in {validation_root.name}/"
        return raw
    raw.rows, saved = split_by_hash(rows, validation_fraction)
    raw.validation_split = f"held out by the SHA-256 of the keys, a fraction of {validation_fraction:g}" + (
        f"; {saved} classes that would have lost all their images keep one for training" if saved else ""
    )
    return raw


def split_folders(raw_dir: Path) -> tuple[Path, Path | None]:
    """The folder of the training classes, and that of the validation classes if there is one."""
    names = class_folders(raw_dir)
    if "train" not in names or train_is_a_class(raw_dir, names):
        if not names:
            check_no_flat_images(raw_dir)
        return raw_dir, None
    given = [name for name in VALIDATION_FOLDERS if name in names]
    if len(given) > 1:
        raise UserError(f"{display_path(raw_dir)} has both {given[0]}/ and {given[1]}/; leave one of them")
    for name in ("train", *given):
        check_no_flat_images(raw_dir / name)
    return raw_dir / "train", raw_dir / given[0] if given else None


def train_is_a_class(raw_dir: Path, names: list[str]) -> bool:
    """True if train/ has pictures of trains: images, not class folders, beside other classes."""
    return bool(set(names) - set(SPLIT_FOLDERS)) and not class_folders(raw_dir / "train")


def check_no_flat_images(folder: Path) -> None:
    """Raise `UserError` for images beside or in place of class folders: they have no class."""
    flat = [entry.name for entry in folder_entries(folder) if is_image(folder, entry.name) and not entry.is_dir()]
    if flat:
        raise UserError(
            f"{display_path(folder)} itself has images, such as {flat[0]!r} ({len(flat):,} in all): move each into a "
            "folder of its class"
        )


def list_imagenette(raw_dir: Path) -> Raw:
    """List imagenette2/{train,val}/<wnid>/*.JPEG, as unpacked by `fetch_imagenette`.

    Not tried with the real host, which was not reachable. Tests use a generated archive.
    """
    from torchvision.datasets import Imagenette  # imports torch, which takes seconds

    raw = list_folder_data_set(raw_dir / IMAGENETTE_FOLDER, validation_fraction=0.0)
    raw.layout, raw.keeps_png = "Imagenette 2, full size", False
    raw.label_convention = imagenet.WORDNET_LABEL_CONVENTION
    known = Imagenette(raw_dir, split="train", size="full", download=False)
    raw.class_names = {wnid: ", ".join(names) for wnid, names in zip(known.wnids, known.classes, strict=True)}
    raw.archives = [path for path in [raw_dir / f"{IMAGENETTE_FOLDER}.tgz"] if path.is_file()]
    return raw


def fetch_imagenette(raw_dir: Path) -> None:
    """Download imagenette2.tgz if absent, check and unpack it. The folder gets its name only when complete.

    A .tgz has no random access, so this is the one archive that is unpacked by its members' names: by torchvision, and
    only if it has the published md5.
    """
    if (raw_dir / IMAGENETTE_FOLDER).is_dir():
        return
    from torchvision.datasets import Imagenette

    archive, unpacking = raw_dir / f"{IMAGENETTE_FOLDER}.tgz", raw_dir / "unpacking"
    unpacking.mkdir(exist_ok=True)
    shutil.rmtree(unpacking / IMAGENETTE_FOLDER, ignore_errors=True)  # torchvision would use a partial one
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
    """`class/stem`, or `class/file name` if two files of the class have the same stem, percent-encoded."""
    stems = {name: matched[1] if (matched := IMAGE_NAME.match(name)) else name for name in names}
    while repeated := {stem for stem, count in Counter(stems.values()).items() if count > 1}:
        stems = {name: name if stem in repeated else stem for name, stem in stems.items()}
    return {name: f"{percent_encoded(class_id)}/{percent_encoded(stem)}" for name, stem in stems.items()}


def percent_encoded(name: str) -> str:
    """All but letters, digits, '_' and '-' as %XX of the bytes of the file name ('.' too, unlike in URLs)."""
    return UNSAFE.sub(lambda found: b"%%%02X" % found[0][0], os.fsencode(name)).decode("ascii")


def split_by_hash(rows: Rows, validation_fraction: float) -> tuple[dict[str, Rows], int]:
    """Choose validation images by their own keys, so that added images do not move others between splits.

    If all images of a class would be chosen, the one with the largest hash stays for training. Also returns the number
    of such classes.
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
