"""The listing that every layout ends in: one row an image, with its key, its label and where its bytes lie.

What follows knows no layouts. A row is a fixed-size record in a numpy array, so that 1.28 million images take about
120 MB. Bytes lie in a container: an archive at an offset, or a folder under a name.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipe.data.archives import Member
from recipe.data.images import FILE_BYTES_MAX, SIGNATURE_BYTES, format_of
from recipe.data.look_alikes import look_alike, refuse_same_names
from recipe.data.system_files import belongs_to_system
from recipe.errors import CONTROLS, UserError
from recipe.files import display_path, printable

Rows = NDArray[np.void]  # fields: key, name (bytes), label, container, bytes (u4), offset (u8), changed_ns (i8)
ROWS_AT_ONCE = 10_000
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".avif", ".avifs"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
)
RAW_PHOTOGRAPHS = (  # never opened: they begin with a small preview, as a TIFF
    *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw"),
    *(".3fr", ".iiq", ".erf", ".kdc", ".dcr", ".mrw", ".raw", ".thm"),
)
NOTES = (  # beside images, never opened
    *(".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".md", ".html", ".npy", ".npz", ".zip", ".tar", ".mp4", ".mov"),
)
PICTURE_SUFFIXES = (  # a file of such a name that is left out was meant to be an image
    *(*IMAGE_SUFFIXES, *RAW_PHOTOGRAPHS, ".heic", ".heif", ".jxl", ".svg", ".eps", ".psd", ".xcf", ".ico", ".ppm"),
    *(".pgm", ".pbm", ".pnm", ".tga", ".exr", ".hdr", ".dds", ".pcx", ".qoi"),
)
USUAL_SUFFIX = re.compile(r"\.[a-z][a-z0-9_+-]{0,15}")
EXAMPLES_MAX = 3  # of what is left out, for each reason and each class
LOSERS_SHOWN = 10
HIDDEN, NESTED, BESIDE, NO_SPLIT = "hidden", "folders in a class folder", "beside the class folders", "of no split"
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
class Tally:
    """How many there are, and the first of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """One more."""
        self.count += 1
        if len(self.examples) < EXAMPLES_MAX:
            self.examples.append(name if name.isprintable() else repr(name))


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
    raw_dir: Path = Path()
    left_out: dict[str, Tally] = field(default_factory=dict)  # reason -> files and folders beside the images
    lost_images: dict[str, Tally] = field(default_factory=dict)  # class (or split) -> those that are named like images

    def leave_out(self, entry: os.DirEntry[str], reason: str, loser: str | None = None) -> None:
        """Count a file or folder that is not used; one that is named like an image is lost to its class, `loser`."""
        place = os.path.relpath(entry, self.raw_dir)
        self.left_out.setdefault(HIDDEN if is_hidden(entry.name) else reason, Tally()).add(place)
        if loser is not None and has_suffix(entry.name, PICTURE_SUFFIXES) and not entry.is_dir():
            self.lost_images.setdefault(loser, Tally()).add(place)

    def leave_out_all(self, folder: Path, used: list[str], reason: str) -> None:
        """Count everything in a folder that is not `used`."""
        for entry in found_in(folder):
            if entry.name not in used:
                self.leave_out(entry, reason)


class Listing:
    """Grows the rows of one split, packing them into an array as they come."""

    def __init__(self, raw: Raw) -> None:
        self.raw, self.containers = raw, raw.containers
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
        found = found_in(folder)
        files = {entry.name: entry.stat() if entry.is_file() else None for entry in found if not is_hidden(entry.name)}
        for name, facts in files.items():
            if facts is not None and facts.st_size > FILE_BYTES_MAX:
                raise UserError(f"{display_path(folder / name)} has {facts.st_size:,} bytes; no image is that large")
        images = [name for name, facts in files.items() if facts is not None and is_image(folder, name)]
        keys = naming(class_id, images)
        unread = [name for name, facts in files.items() if facts is None and has_suffix(name, IMAGE_SUFFIXES)]
        for name in naming(class_id, unread):
            raise UserError(f"{display_path(folder / name)} is named like an image but is no file that can be read")
        for entry in found:
            if entry.is_dir() and not is_hidden(entry.name):
                refuse_images_below(folder / entry.name)
        for entry in found:
            if entry.name not in keys:
                kind = NESTED if entry.is_dir() else f"not an image of this layout ({suffix(entry.name)})"
                self.raw.leave_out(entry, kind, class_id or folder.name)
        self.add(
            Entry(key, label_of(key), number, os.fsencode(name), 0, facts.st_size, facts.st_mtime_ns)
            for name, key in keys.items()
            if (facts := files[name]) is not None
        )

    def sorted_rows(self, where: str) -> Rows:
        """All images in the order of their keys, which must differ."""
        if not self.parts:
            others = counted_by_reason(self.raw.left_out)
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
    for place, folders, names in os.walk(folder, onerror=reraised):
        folders[:] = [name for name in folders if not (is_hidden(name) or belongs_to_system(name))]
        if any(is_image(Path(place), name) for name in names):
            raise UserError(
                f"{display_path(place)} holds images inside a class folder; flatten it: move them up into "
                f"{display_path(folder.parent)}, or name the folders of the splits train/ and val/"
            )


def reraised(error: OSError) -> None:
    """`os.walk` would leave out a folder that it cannot read."""
    raise error


def list_class_folders(root: Path, listing: Listing, naming: Naming, class_ids: list[str] | None = None) -> list[str]:
    """List root/<class>/<image>; labels are positions in `class_ids`, by default the sorted folders."""
    require_folder(root)
    found = class_folders(root)
    refuse_same_names(found, display_path(root))
    listing.raw.leave_out_all(root, found, BESIDE)
    classes = class_ids if class_ids is not None else found
    positions = {class_id: position for position, class_id in enumerate(classes)}
    for class_id in found:
        label = position_of(class_id, positions, f"{class_id}/...")
        listing.add_folder(root / class_id, class_id, naming, lambda _, label=label: label)  # type: ignore[misc]
    return classes


def position_of(class_id: str, positions: Mapping[str, int], key: str) -> int:
    """The label of a validation image."""
    if class_id not in positions:
        twin = look_alike(class_id, positions)
        hint = f"; give {class_id!a} and the training class {twin!a}, which looks like it, one name" if twin else ""
        raise UserError(
            f"the validation image {key} is of class {class_id}, of which there are no training images{hint}"
        )
    return positions[class_id]


def class_folders(root: Path) -> list[str]:
    """The sorted names of the folders in `root`, without hidden ones: the order of torchvision's ImageFolder."""
    names = [entry.name for entry in found_in(root) if entry.is_dir() and not is_hidden(entry.name)]
    for name in names:
        if name != printable(name) or "\n" in name or CONTROLS.search(name):
            raise UserError(f"the class folder {name!r} in {display_path(root)} has no printable name; rename it")
    return names


def require_folder(path: Path) -> None:
    """Stop where a part of a layout is missing."""
    if not path.is_dir():
        raise UserError(f"{display_path(path)} is missing: this layout needs it")


def is_image(folder: Path, name: str) -> bool:
    """Whether a file is an image: by its suffix, or by its first bytes where that is not known or missing."""
    if is_hidden(name) or belongs_to_system(name):
        return False
    if has_suffix(name, IMAGE_SUFFIXES):
        return True
    if has_suffix(name, (*NOTES, *RAW_PHOTOGRAPHS)) or not (folder / name).is_file():
        return False
    with (folder / name).open("rb") as file:
        return format_of(file.read(SIGNATURE_BYTES)) is not None


def has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file is named as one of a kind."""
    return name[1:].lower().endswith(suffixes)


# ---- what is left out -------------------------------------------------------------------------------


def found_in(folder: Path) -> list[os.DirEntry[str]]:
    """Everything in a folder in the order of the names, but for what belongs to the operating system."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not belongs_to_system(entry.name)), key=lambda entry: entry.name)


def is_hidden(name: str) -> bool:
    """Such as .git or .part.jpg."""
    return name.startswith(".")


def suffix(name: str) -> str:
    """How files that are not images are counted: numbers and the like, of which there may be thousands, as one."""
    found = Path(name).suffix.lower()
    return (found if USUAL_SUFFIX.fullmatch(found) else "another suffix") if found else "no suffix"


def counted_by_reason(left_out: Mapping[str, Tally]) -> str:
    """What was left out, in words: the five most frequent reasons with an example of each."""
    most = sorted(left_out.items(), key=lambda reason: -reason[1].count)[:5]
    return ", ".join(f"{tally.count:,} x {reason}, such as {tally.examples[0]}" for reason, tally in most)


def loss_lines(raw: Raw) -> Iterator[str]:
    """A warning for each class that loses images, the first ten of them."""
    for number, (loser, tally) in enumerate(raw.lost_images.items()):
        if number == LOSERS_SHOWN:
            yield f"warning: {len(raw.lost_images) - LOSERS_SHOWN:,} more classes lose images; the recipe counts them"
            return
        what = "class" if loser in raw.class_ids else "folder"
        more = ", ..." if tally.count > len(tally.examples) else ""
        examples = ", ".join(tally.examples)
        yield f"warning: images of the {what} {loser!r} that are left out: {tally.count:,} ({examples}{more})"
