"""The manifest of a finished data set: its contents and settings, and opening it for a run.

Many experiments share one data set. Each run keeps a copy of its record.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from recipe.config.identity import differences
from recipe.config.schema import DataConfig, Source
from recipe.data.images import FILTER
from recipe.errors import UserError
from recipe.run.directory import Run
from recipe.run.files import display_path, write_atomically
from recipe.run.provenance import PATCHES
from recipe.run.records import ClassName, PreprocessingRecord, Record, Setting, UnusualImage, from_json

MANIFEST, RECORD = "manifest.json", "preprocessing.json"


class Shard(Record, frozen=True, kw_only=True):
    """One tar file."""

    name: str
    images: int
    bytes: int
    sha256: str


class ManifestSplit(Record, frozen=True, kw_only=True):
    """One split: its shards in order, and the hashes of its index files."""

    images: int
    index_sha256: str
    keys_sha256: str
    shards: list[Shard]
    grey_images: list[str]  # keys of images that decoders convert to RGB
    rotated_images: list[str]  # keys of images with an EXIF orientation, which is not applied


class Manifest(Record, frozen=True, kw_only=True):
    """The contents of a data set. Training checks and records the hash of the file."""

    format: str = "manifest/1"
    name: str
    settings: dict[str, Setting]  # all that change the bytes
    listing_sha256: str  # of the raw images' names, labels and sizes
    is_ilsvrc2012: bool
    label_convention: str
    classes: list[ClassName]
    splits: dict[str, ManifestSplit]
    converted: list[UnusualImage]
    rejected: list[UnusualImage]


def data_settings(data: DataConfig) -> dict[str, Any]:
    """The settings that change the bytes of the data set, without those that have no effect."""
    settings: dict[str, Any] = {
        "name": data.name,
        "source": data.source.value,
        "expect": data.expect.value,
        "on_corrupt": data.on_corrupt.value,
        "max_pixels": data.max_pixels,
        "images_per_shard": data.images_per_shard,
        "resize_short_side": data.resize_short_side,
    }
    if data.resize_short_side is not None:
        settings["jpeg_quality"] = data.jpeg_quality
        settings["resize_filter"] = FILTER  # so that shards of another filter are not continued
    if data.source is Source.folder:
        settings["validation_fraction"] = data.validation_fraction
    if data.source is Source.demo:
        settings["train_images_per_class"] = data.train_images_per_class
        settings["validation_images_per_class"] = data.validation_images_per_class
    return settings


def read_manifest(directory: str | Path) -> Manifest:
    """Read the manifest of `directory`. Raises `UserError` with the command that makes a missing one."""
    return _manifest_and_sha256(directory)[0]


def manifest_sha256(directory: str | Path) -> str:
    """The hash of the manifest, which identifies the data set in records."""
    return _manifest_and_sha256(directory)[1]


def _manifest_and_sha256(directory: str | Path) -> tuple[Manifest, str]:
    path = Path(directory) / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"no preprocessed data set in {display_path(directory)}; "
            "make it with `python preprocess.py experiment=...` and the same experiment, "
            "or name its folder with data.directory="
        ) from None
    try:
        return from_json(content, Manifest, display_path(path)), hashlib.sha256(content).hexdigest()
    except UserError as error:
        raise UserError(f"{error}; delete that file and run `python preprocess.py` again") from error


def read_record(directory: Path) -> PreprocessingRecord:
    """The record of preprocessing. Raises `UserError` if it is missing, damaged or of another manifest."""
    path = directory / RECORD
    if not path.exists():
        raise UserError(f"{display_path(path)} is missing")
    record = from_json(path.read_bytes(), PreprocessingRecord, display_path(path))
    if record.outputs.get("manifest") != manifest_sha256(directory):
        raise UserError(f"{display_path(path)} belongs to another manifest than the one beside it")
    return record


def open_dataset(data: DataConfig, run: Run | None = None) -> tuple[Manifest, str]:
    """The manifest of `data.directory` and its hash. Copies the record of preprocessing into `run` if given.

    Raises `UserError` if the data set is missing or was made with other settings.
    """
    directory = Path(data.directory)
    manifest, sha256 = _manifest_and_sha256(directory)
    changed = differences(manifest.settings, data_settings(data))
    if changed:
        raise UserError(
            f"{display_path(directory)} was made with other settings ({'; '.join(changed)}); "
            "give the same ones, or preprocess into another data.directory"
        )
    if run is not None:
        try:
            record = read_record(directory)
        except UserError as error:
            raise UserError(f"{error}: run `python preprocess.py` again") from error
        copy_record(run, directory, record)
    return manifest, sha256


def copy_record(run: Run, directory: Path, record: PreprocessingRecord) -> None:
    """Copy the record of preprocessing into a run, with the patches that it names."""
    run.write(record)
    for tree in (record.provenance.tree_at_start, record.provenance.tree_at_end):
        if tree.patch_sha256 is not None:
            patch = run.patch_file(tree.patch_sha256)
            if (directory / PATCHES / patch.name).exists():  # the hash suffices if somebody removed it
                write_atomically(patch, (directory / PATCHES / patch.name).read_bytes())


def check_same_dataset(what: str, trained_on: str, here: str, data: DataConfig) -> None:
    """Raise `UserError` unless the data set is the one that the weights were trained on (hashes of manifests)."""
    if trained_on != here:
        raise UserError(
            f"{what} was trained on another data set (manifest {trained_on[:16]}) than "
            f"{display_path(data.directory)} has ({here[:16]}); give data.directory= of the right one"
        )
