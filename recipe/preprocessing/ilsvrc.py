"""ILSVRC2012 in its common layouts: official archives, extracted folders, one of each, or Kaggle's.

Labels are positions among the sorted WNIDs of the training set. Keys are the published names of the images.
`data.expect=ilsvrc2012` checks classes, counts, labels and checksums.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy.io import loadmat

from recipe.errors import UserError
from recipe.preprocessing import archives, imagenet
from recipe.preprocessing.folders import check_folder, class_folders, list_class_folders, position_of
from recipe.preprocessing.listing import Labeller, Listing, Raw
from recipe.run.files import display_path
from recipe.run.records import Archive

KAGGLE_IMAGES = Path("ILSVRC/Data/CLS-LOC")
KAGGLE_LABELS = "LOC_val_solution.csv"
KAGGLE_NAMES = "LOC_synset_mapping.txt"
VALIDATION_SPLIT = "the validation set of ILSVRC2012"
LOOKED_FOR = (
    f"{imagenet.TRAIN_ARCHIVE}, {imagenet.VALIDATION_ARCHIVE} and {imagenet.DEVKIT_ARCHIVE}, or the extracted "
    f"train/ and val/, or Kaggle's {KAGGLE_IMAGES}/ with {KAGGLE_LABELS}; {imagenet.WHERE_TO_GET}"
)


def list_ilsvrc(raw_dir: Path) -> Raw:
    """List the training tar or train/<wnid>/, with the validation tar, val/<wnid>/ or a flat val/ and the devkit."""
    tars = [raw_dir / imagenet.TRAIN_ARCHIVE, raw_dir / imagenet.VALIDATION_ARCHIVE]
    raw = Raw("", imagenet.WORDNET_LABEL_CONVENTION, VALIDATION_SPLIT, keeps_png=False, raw_dir=raw_dir)
    train = Listing(raw)
    if tars[0].is_file():
        raw.class_ids = list_train_tar(tars[0], train)
    elif (raw_dir / "train").is_dir():
        raw.class_ids = list_class_folders(raw_dir / "train", train, ilsvrc_train_keys)
    else:
        raise UserError(f"no training images in {display_path(raw_dir)}: looked for {LOOKED_FOR}")
    raw.rows["train"] = train.sorted_rows("the training set")
    validation = Listing(raw)
    needs_devkit = list_validation(raw_dir, raw.class_ids, validation)
    raw.rows["val"] = validation.sorted_rows("the validation set")
    devkit = raw_dir / imagenet.DEVKIT_ARCHIVE
    if needs_devkit or devkit.is_file() or (raw_dir / imagenet.DEVKIT_FOLDER).is_dir():
        raw.class_names = read_devkit(raw_dir)[0]
    else:
        raw.class_names = imagenet.published_class_names(raw.class_ids)
    raw.archives = [path for path in (*tars, devkit) if path.is_file()]
    kinds = ("official tar" if path.is_file() else "extracted folders" for path in tars)
    raw.layout = "ILSVRC2012, " + " and ".join(f"{split}: {kind}" for split, kind in zip(raw.rows, kinds, strict=True))
    return raw


def list_train_tar(path: Path, listing: Listing) -> list[str]:
    """List the class tars inside the training tar. Returns the sorted WNIDs."""
    where = display_path(path)
    with path.open("rb") as handle:
        tars = archives.class_tars(handle, where)
        for label, (wnid, offset, size) in enumerate(tars):
            handle.seek(offset)
            inside = f"{wnid}.tar in {where}"
            members = list(archives.members(handle, archives.TRAIN_IMAGE, archives.MEMBER_BYTES_MAX, inside))
            for member in members:
                if not member.name.startswith(f"{wnid}_") or member.offset + member.size > offset + size:
                    raise UserError(f"the member {member.name}.JPEG does not belong in {inside}")
            listing.add_members(path, members, lambda _, label=label: label)  # type: ignore[misc]
    return [tar.name for tar in tars]


def list_validation(raw_dir: Path, class_ids: list[str], listing: Listing) -> bool:
    """List the validation images. Returns True if their labels came from the devkit."""
    tar, folder = raw_dir / imagenet.VALIDATION_ARCHIVE, raw_dir / "val"
    if tar.is_file():
        label_of = ground_truth(raw_dir, class_ids)
        with tar.open("rb") as handle:
            members = archives.members(handle, archives.VALIDATION_IMAGE, archives.MEMBER_BYTES_MAX, display_path(tar))
            listing.add_members(tar, members, label_of)
        return True
    if not folder.is_dir():
        raise UserError(f"no validation images in {display_path(raw_dir)}: looked for {LOOKED_FOR}")
    if class_folders(folder):
        list_class_folders(folder, listing, ilsvrc_validation_keys, class_ids)
        return False
    listing.add_folder(folder, "", ilsvrc_validation_keys, ground_truth(raw_dir, class_ids))
    return True


def ground_truth(raw_dir: Path, class_ids: list[str]) -> Labeller:
    """Validation key -> label. Line k of the devkit's ground truth is an ILSVRC2012_ID."""
    _, wnids = read_devkit(raw_dir)
    positions = {wnid: position for position, wnid in enumerate(class_ids)}

    def label_of(key: str) -> int:
        number = int(key.rpartition("_")[2])
        if not 1 <= number <= len(wnids):
            raise UserError(f"{key} has no line in the devkit's ground truth, which has {len(wnids)} lines")
        return position_of(wnids[number - 1], positions, key)

    return label_of


def read_devkit(raw_dir: Path) -> tuple[dict[str, str], list[str]]:
    """WNID -> name of the leaf classes, and the WNID of each validation image in order.

    The table is in the order of ILSVRC2012_ID, not of the labels. Inner nodes of WordNet (those with children) are not
    classes.
    """
    table, truth = archives.devkit_files(raw_dir)
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(table), squeeze_me=True)["synsets"])  # type: ignore[arg-type]
        leaves = [synset for synset in synsets if int(synset["num_children"]) == 0]
        names = {str(leaf["WNID"]): str(leaf["words"]) for leaf in leaves}
        wnid_of = {int(leaf["ILSVRC2012_ID"]): str(leaf["WNID"]) for leaf in leaves}
        return names, [wnid_of[int(line)] for line in truth.split()]
    except Exception as error:  # a damaged MATLAB file fails in many ways
        raise UserError(f"the devkit in {display_path(raw_dir)} cannot be read ({error!r})") from error


def ilsvrc_train_keys(class_id: str, names: list[str]) -> dict[str, str]:
    """The keys of training images. They begin with the class."""
    matched = {name: archives.TRAIN_IMAGE.fullmatch(name) for name in names}
    return {name: match[1] for name, match in matched.items() if match and match[1].startswith(f"{class_id}_")}


def ilsvrc_validation_keys(class_id: str, names: list[str]) -> dict[str, str]:
    """The keys of validation images, by their numbers."""
    matched = {name: archives.VALIDATION_IMAGE.fullmatch(name) for name in names}
    return {name: match[1] for name, match in matched.items() if match}


# ---- Kaggle's packing of the same images ------------------------------------------------------------


def list_kaggle(raw_dir: Path) -> Raw:
    """List ILSVRC/Data/CLS-LOC/{train/<wnid>,val}/, with labels in a CSV file beside ILSVRC/."""
    raw = Raw(
        "ILSVRC2012, Kaggle", imagenet.WORDNET_LABEL_CONVENTION, VALIDATION_SPLIT, keeps_png=False, raw_dir=raw_dir
    )
    train, validation = (Listing(raw), Listing(raw))
    raw.class_ids = list_class_folders(raw_dir / KAGGLE_IMAGES / "train", train, ilsvrc_train_keys)
    raw.rows["train"] = train.sorted_rows("the training set")
    wnids = kaggle_labels(raw_dir / KAGGLE_LABELS)
    positions = {wnid: position for position, wnid in enumerate(raw.class_ids)}

    def label_of(key: str) -> int:
        if key not in wnids:
            raise UserError(f"{key} has no line in {KAGGLE_LABELS}")
        return position_of(wnids[key], positions, key)

    check_folder(raw_dir / KAGGLE_IMAGES / "val")
    validation.add_folder(raw_dir / KAGGLE_IMAGES / "val", "", ilsvrc_validation_keys, label_of)
    raw.rows["val"] = validation.sorted_rows("the validation set")
    raw.class_names = kaggle_names(raw_dir / KAGGLE_NAMES) or imagenet.published_class_names(raw.class_ids)
    raw.archives = [path for path in (raw_dir / KAGGLE_LABELS, raw_dir / KAGGLE_NAMES) if path.is_file()]
    return raw


def kaggle_labels(path: Path) -> dict[str, str]:
    """Validation key -> WNID. The column PredictionString is a WNID and a box, repeated."""
    if not path.is_file():
        raise UserError(f"{display_path(path)} is missing: it has the labels of Kaggle's validation images")
    with path.open(newline="", encoding="utf-8") as handle:
        try:
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(handle)}
        except (KeyError, IndexError, AttributeError, ValueError, csv.Error) as error:
            raise UserError(f"{display_path(path)} is not Kaggle's table of labels ({error!r})") from error


def kaggle_names(path: Path) -> dict[str, str]:
    """WNID -> name, from lines such as `n01440764 tench, Tinca tinca`."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {wnid: name for wnid, _, name in (line.partition(" ") for line in lines)}


# ---- data.expect=ilsvrc2012 -------------------------------------------------------------------------


def check_ilsvrc2012(raw: Raw) -> None:
    """Raise `UserError` unless classes, counts and the first validation labels are those of ILSVRC2012."""
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
    wrong = np.flatnonzero(counts != imagenet.VALIDATION_IMAGES_PER_CLASS)
    if len(wrong):
        raise UserError(
            f"class {raw.class_ids[wrong[0]]} has {counts[wrong[0]]} validation images, ILSVRC2012 has "
            f"{imagenet.VALIDATION_IMAGES_PER_CLASS} in each; {way_out}"
        )
    first = tuple(labels[: len(imagenet.FIRST_VALIDATION_LABELS)].tolist())
    if first != imagenet.FIRST_VALIDATION_LABELS:
        raise UserError(
            f"the first validation labels are {first}, of ILSVRC2012 {imagenet.FIRST_VALIDATION_LABELS}: "
            f"the labels are mixed up; {way_out}"
        )


def check_published_md5(files: Iterable[Archive]) -> None:
    """Raise `UserError` unless the archives have the published md5."""
    for archive in files:
        if archive.is_published_md5 is False:
            published = imagenet.PUBLISHED_MD5[archive.name]
            raise UserError(
                f"{archive.name} has md5 {archive.md5}, published is {published}: a damaged or changed "
                "archive; download it again, or accept it with data.expect=nothing; the recipe will state it"
            )
