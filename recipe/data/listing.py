"""The listing that every layout ends in: one row an image, with its key, its label and where its bytes lie.

What follows knows no layouts. A row is a fixed-size record in a numpy array, so that 1.28 million images take about
120 MB. Bytes lie in a container: an archive at an offset, or a folder under a name.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipe.data.archives import Member
from recipe.data.images import FILE_BYTES_MAX, SIGNATURE_BYTES, format_of
from recipe.errors import UserError
from recipe.run import shown_path

Rows = NDArray[np.void]  # fields: key, name (bytes), label, container, bytes (u4), offset (u8), changed_ns (i8)
ROWS_AT_ONCE = 10_000
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".avif", ".avifs"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
)
OTHER_SUFFIXES = (  # never opened: notes beside images, and raw photographs, which begin with a small preview
    *(".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".md", ".html", ".npy", ".npz", ".zip", ".tar", ".mp4", ".mov"),
    *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw"),
    *(".3fr", ".iiq", ".erf", ".kdc", ".dcr", ".mrw", ".raw", ".thm"),
)
Naming = Callable[[str, list[str]], dict[str, str]]  # (class, file names) -> accepted file name -> key
Labeller = Callable[[str], int]  # key -> label


class Entry(NamedTuple):
    """One image: offset 0 and a file name in a folder, or an offset in an archive."""

    key: str
    label: int
    container: int
    name: bytes
    offset: int
    size: int
    changed_ns: int


@dataclass
class Raw:
    """Everything found: `containers` are the archives and folders that rows point into by number."""

    layout: str
    label_convention: str
    validation_split: str  # how the validation set came to be
    keeps_png: bool  # PNG files with a .png name are what the data set is made of, no oddity
    class_ids: list[str] = field(default_factory=list)  # in the order of the labels
    class_names: dict[str, str] = field(default_factory=dict)  # id -> name; an id without one is its own name
    rows: dict[str, Rows] = field(default_factory=dict)
    containers: list[Path] = field(default_factory=list)
    archives: list[Path] = field(default_factory=list)  # files whose hashes identify the raw data as a whole
    verified: set[str] = field(default_factory=set)  # archives that have their publisher's checksum, by name
    other_files: Counter[str] = field(default_factory=Counter)  # what lay beside the images: suffix -> count
    left_aside: list[str] = field(default_factory=list)  # folders and images that no split takes, such as test/


class Listing:
    """Grows the rows of one split, packing them into an array as they come."""

    def __init__(self, raw: Raw) -> None:
        self.containers, self.other_files = raw.containers, raw.other_files
        self.parts: list[Rows] = []

    def container(self, path: Path) -> int:
        """The number under which rows point to `path`."""
        if not self.containers or self.containers[-1] != path:
            self.containers.append(path)
        return len(self.containers) - 1

    def add(self, entries: Iterable[Entry]) -> None:
        """Append images."""
        if entries := list(entries):
            self.parts.append(packed(entries))

    def add_members(self, path: Path, found: Iterable[Member], label_of: Labeller) -> None:
        """Append members of an archive; a member's name is its key."""
        number = self.container(path)
        self.add(Entry(name, label_of(name), number, b"", offset, size, 0) for name, offset, size in found)

    def add_folder(self, folder: Path, class_id: str, naming: Naming, label_of: Labeller) -> None:
        """Append the images of one folder; `naming` says which files they are and how they are called."""
        number = self.container(folder)
        with os.scandir(folder) as entries:
            files = {entry.name: entry.stat() if entry.is_file() else None for entry in entries}
        for name, facts in files.items():
            if facts is not None and facts.st_size > FILE_BYTES_MAX:
                raise UserError(f"{shown_path(folder / name)} has {facts.st_size:,} bytes; no image is that large")
        images = (name for name, facts in files.items() if facts is not None and is_image(folder, name))
        keys = naming(class_id, sorted(images))
        others = (name for name, facts in files.items() if facts is None and has_suffix(name, IMAGE_SUFFIXES))
        for name in naming(class_id, sorted(others)):
            raise UserError(f"{shown_path(folder / name)} is named like an image but is no file that can be read")
        for name in (name for name, facts in files.items() if facts is None and not name.startswith(".")):
            if (folder / name).is_dir():
                refuse_images_below(folder / name)
        self.other_files.update(suffix(name) for name in files if name not in keys)
        self.add(
            Entry(key, label_of(key), number, os.fsencode(name), 0, facts.st_size, facts.st_mtime_ns)
            for name, key in keys.items()
            if (facts := files[name]) is not None
        )

    def sorted_rows(self, where: str) -> Rows:
        """All images in the order of their keys, which must differ."""
        if not self.parts:
            others = ", ".join(f"{count} x {kind}" for kind, count in self.other_files.most_common(5))
            raise UserError(f"no images were found in {where}" + (f", only {others}" if others else ""))
        rows = np.concatenate(self.parts)
        keys = rows["key"].copy()
        rows = rows[np.argsort(keys, kind="stable")]
        same = np.flatnonzero(rows["key"][1:] == rows["key"][:-1])
        if len(same):
            raise UserError(f"two images of {where} are called {rows['key'][same[0]].decode()}; rename or remove one")
        return rows


def packed(entries: list[Entry]) -> Rows:
    """Entries as a structured array; byte strings are as wide as the longest one here, concatenation widens them."""
    keys = np.array([entry.key.encode("ascii") for entry in entries])
    names = np.array([entry.name for entry in entries])
    return np.array(
        [(entry.key.encode("ascii"), *entry[1:]) for entry in entries],
        dtype=[
            ("key", f"S{keys.dtype.itemsize}"),
            ("label", "<u4"),
            ("container", "<u4"),
            ("name", f"S{max(names.dtype.itemsize, 1)}"),
            ("offset", "<u8"),
            ("bytes", "<u4"),
            ("changed_ns", "<i8"),
        ],
    )


def listing_sha256(rows: Mapping[str, Rows]) -> str:
    """Identifies which raw images were meant: the lines `split key label bytes`, no time of change and no path.

    Cheap enough to be made again whenever somebody asks for a finished data set, which a hash of all bytes is not.
    """
    digest = hashlib.sha256()
    for split, listed in rows.items():
        for part in in_parts(listed):
            columns = (part[name].tolist() for name in ("key", "label", "bytes"))
            for key, label, size in zip(*columns, strict=True):
                digest.update(b"%s %s %d %d\n" % (split.encode(), key, label, size))
    return digest.hexdigest()


def in_parts(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Pieces of an array that may be as long as a data set, for what makes Python objects of its elements."""
    for first in range(0, len(array), ROWS_AT_ONCE):
        yield array[first : first + ROWS_AT_ONCE]


# ---- folders of class folders -----------------------------------------------------------------------


def refuse_images_below(folder: Path) -> None:
    """Images in a folder inside a class folder, however deep, would be left out without a word."""
    for place, _, names in os.walk(folder, onerror=reraised):
        if any(is_image(Path(place), name) for name in names):
            raise UserError(
                f"{shown_path(place)} holds images inside a class folder; flatten it: move them up into "
                f"{shown_path(folder.parent)}, or name the folders of the splits train/ and val/"
            )


def reraised(error: OSError) -> None:
    """`os.walk` would leave out a folder that it cannot read."""
    raise error


def list_class_folders(root: Path, listing: Listing, naming: Naming, class_ids: list[str] | None = None) -> list[str]:
    """List root/<class>/<image>; labels are positions in `class_ids`, by default the sorted folders."""
    require_folder(root)
    found = class_folders(root)
    classes = class_ids if class_ids is not None else found
    positions = {class_id: position for position, class_id in enumerate(classes)}
    for class_id in found:
        label = position_of(class_id, positions, f"{class_id}/...")
        listing.add_folder(root / class_id, class_id, naming, lambda _, label=label: label)  # type: ignore[misc]
    return classes


def position_of(class_id: str, positions: Mapping[str, int], key: str) -> int:
    """The label of a validation image."""
    if class_id not in positions:
        raise UserError(f"the validation image {key} is of class {class_id}, of which there are no training images")
    return positions[class_id]


def class_folders(root: Path) -> list[str]:
    """The sorted names of the folders in `root`, without hidden ones: the order of torchvision's ImageFolder."""
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    for name in names:
        if not name.isprintable():
            raise UserError(f"the class folder {name!r} in {shown_path(root)} has no printable name; rename it")
    return names


def require_folder(path: Path) -> None:
    """Stop where a part of a layout is missing."""
    if not path.is_dir():
        raise UserError(f"{shown_path(path)} is missing: this layout needs it")


def is_image(folder: Path, name: str) -> bool:
    """Whether a file is an image: by its suffix, or by its first bytes where that is not known or missing."""
    if has_suffix(name, IMAGE_SUFFIXES):
        return True
    if name.startswith(".") or has_suffix(name, OTHER_SUFFIXES) or not (folder / name).is_file():
        return False
    with (folder / name).open("rb") as file:
        return format_of(file.read(SIGNATURE_BYTES)) is not None


def has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file is named as one of a kind."""
    return name[1:].lower().endswith(suffixes)


def suffix(name: str) -> str:
    """How files that are no images are counted."""
    return Path(name).suffix.lower() or "files or folders without a suffix"
