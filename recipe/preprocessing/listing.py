"""The listing of raw images for all layouts: one row per image, with key, label and place of its bytes.

A row is a fixed-size record in a numpy array: 1.28 million images take about 120 MB. The bytes of an image are in a
container, either an archive at an offset or a folder under a name.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import translate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipe.data.images import IMAGE_BYTES_MAX, SIGNATURE_BYTES, format_of
from recipe.errors import UserError
from recipe.run.files import display_path

Rows = NDArray[np.void]  # fields: key, name (bytes), label, container, bytes (u4), offset (u8), changed_ns (i8)
ROWS_AT_ONCE = 10_000
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".avif", ".avifs"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
)
RAW_PHOTOGRAPHS = (  # not opened: they begin with a small preview, as a TIFF
    *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".orf", ".rw2", ".raf", ".pef", ".srw"),
    *(".3fr", ".iiq", ".erf", ".kdc", ".dcr", ".mrw", ".raw", ".thm"),
)
OTHER_SUFFIXES = (  # of files beside images, not opened
    *(".txt", ".csv", ".tsv", ".json", ".xml", ".yaml", ".md", ".html", ".npy", ".npz", ".zip", ".tar", ".mp4", ".mov"),
)
PICTURE_SUFFIXES = (  # an unused file with such a suffix counts as a lost image
    *(*IMAGE_SUFFIXES, *RAW_PHOTOGRAPHS, ".heic", ".heif", ".jxl", ".svg", ".eps", ".psd", ".xcf", ".ico", ".ppm"),
    *(".pgm", ".pbm", ".pnm", ".tga", ".exr", ".hdr", ".dds", ".pcx", ".qoi"),
)
SYSTEM_NAMES = (  # of an operating system, a network disk or an editor: skipped and not counted
    *("._*", ".DS_Store", "__MACOSX", ".AppleDouble", ".AppleDB", ".AppleDesktop", ".apdisk", ".localized", "Icon\r"),
    *(".Spotlight-V100", ".fseventsd", ".TemporaryItems", ".DocumentRevisions-V100", ".VolumeIcon.icns", ".Trash*"),
    *("Network Trash Folder", "Temporary Items"),
    *("$RECYCLE.BIN", "RECYCLER", "System Volume Information", "Thumbs.db", "ehthumbs.db", "ehthumbs_vista.db"),
    *("desktop.ini", "~$*"),
    *("lost+found", ".directory", ".thumbnails", ".~lock.*#", ".nfs*", ".fuse_hidden*", ".smbdelete*"),
    *("@eaDir", "@tmp", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", ".@__thumb", ".snapshot", ".zfs"),
    *(".dropbox", ".dropbox.attr", ".dropbox.cache", ".stfolder", ".stversions", ".sync"),
    *(".ipynb_checkpoints", "__pycache__"),
)
SYSTEM_NAME = re.compile("|".join(map(translate, SYSTEM_NAMES)), re.IGNORECASE)
USUAL_SUFFIX = re.compile(r"\.[a-z][a-z0-9_+-]{0,15}")
EXAMPLES_PER_REASON = 3  # of unused files, for each reason and each class
LOST_SHOWN = 10
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
    """A count with the first few names."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.examples) < EXAMPLES_PER_REASON:
            self.examples.append(name if name.isprintable() else repr(name))


@dataclass
class Raw:
    """The raw images of a data set. Rows refer to `containers`, the archives and folders, by number."""

    layout: str
    label_convention: str
    validation_split: str  # origin of the validation set
    keeps_png: bool  # PNG files with a .png name keep their bytes
    class_ids: list[str] = field(default_factory=list)  # in the order of the labels
    class_names: dict[str, str] = field(default_factory=dict)  # id -> name. Without an entry the id is the name
    rows: dict[str, Rows] = field(default_factory=dict)
    containers: list[Path] = field(default_factory=list)
    archives: list[Path] = field(default_factory=list)  # files whose hashes identify the raw data
    verified: set[str] = field(default_factory=set)  # names of archives with the published checksum
    raw_dir: Path = Path()
    left_out: dict[str, Tally] = field(default_factory=dict)  # reason -> unused files and folders
    lost_images: dict[str, Tally] = field(default_factory=dict)  # class (or split) -> unused files named like images

    def leave_out(self, entry: os.DirEntry[str], reason: str, class_id: str | None = None) -> None:
        """Count an unused file or folder. A file named like an image is counted as lost for its class."""
        path = os.path.relpath(entry, self.raw_dir)
        self.left_out.setdefault(HIDDEN if is_hidden(entry.name) else reason, Tally()).add(path)
        if class_id is not None and has_suffix(entry.name, PICTURE_SUFFIXES) and not entry.is_dir():
            self.lost_images.setdefault(class_id, Tally()).add(path)

    def leave_out_all(self, folder: Path, used: list[str], reason: str) -> None:
        """Count everything in a folder that is not `used`."""
        for entry in folder_entries(folder):
            if entry.name not in used:
                self.leave_out(entry, reason)


class Listing:
    """Collects the rows of one split."""

    def __init__(self, raw: Raw) -> None:
        self.raw = raw
        self.parts: list[Rows] = []

    def container(self, path: Path) -> int:
        """The number of `path` in the rows."""
        containers = self.raw.containers
        if not containers or containers[-1] != path:
            containers.append(path)
        return len(containers) - 1

    def add(self, entries: Iterable[Entry]) -> None:
        """Append images."""
        if entries := list(entries):
            self.parts.append(rows_of(entries))

    def add_members(self, path: Path, members: Iterable[tuple[str, int, int]], label_of: Labeller) -> None:
        """Append members of an archive, given as (key, offset, size)."""
        number = self.container(path)
        self.add(Entry(key, label_of(key), number, b"", offset, size, 0) for key, offset, size in members)

    def add_folder(self, folder: Path, class_id: str, naming: Naming, label_of: Labeller) -> None:
        """Append the images of one folder. `naming` gives the accepted file names and their keys."""
        number = self.container(folder)
        entries = folder_entries(folder)
        visible = [entry for entry in entries if not is_hidden(entry.name)]
        files = {entry.name: entry.stat() if entry.is_file() else None for entry in visible}
        for name, status in files.items():
            if status is not None and status.st_size > IMAGE_BYTES_MAX:
                raise UserError(f"{display_path(folder / name)} has {status.st_size:,} bytes; no image is that large")
        keys = naming(class_id, [name for name, status in files.items() if status and is_image(folder, name)])
        unreadable = [name for name, status in files.items() if not status and has_suffix(name, IMAGE_SUFFIXES)]
        for name in naming(class_id, unreadable):
            raise UserError(f"{display_path(folder / name)} is named like an image but is not a file that can be read")
        for entry in entries:
            if entry.is_dir() and not is_hidden(entry.name):
                check_no_images_below(folder / entry.name)
            if entry.name not in keys:
                kind = NESTED if entry.is_dir() else f"not an image of this layout ({suffix(entry.name)})"
                self.raw.leave_out(entry, kind, class_id or folder.name)
        self.add(
            Entry(key, label_of(key), number, os.fsencode(name), 0, status.st_size, status.st_mtime_ns)
            for name, key in keys.items()
            if (status := files[name]) is not None
        )

    def sorted_rows(self, where: str) -> Rows:
        """All images in the order of their keys. Raises `UserError` for equal keys."""
        if not self.parts:
            others = left_out_in_words(self.raw.left_out)
            raise UserError(f"no images were found in {where}" + (f", only {others}" if others else ""))
        rows = np.concatenate(self.parts)
        keys = rows["key"].copy()
        rows = rows[np.argsort(keys, kind="stable")]
        same = np.flatnonzero(rows["key"][1:] == rows["key"][:-1])
        if len(same):
            raise UserError(f"two images of {where} are called {rows['key'][same[0]].decode()}; rename or remove one")
        return rows


def rows_of(entries: list[Entry]) -> Rows:
    """Entries as a structured array. Byte strings are as wide as the longest one, and concatenation widens them."""
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
    """SHA-256 over the lines `split key label bytes` of raw images, without times of change and paths.

    Unlike a hash of all bytes, it can be computed again for a finished data set in a short time.
    """
    digest = hashlib.sha256()
    for split, split_rows in rows.items():
        for part in in_parts(split_rows):
            columns = (part[name].tolist() for name in ("key", "label", "bytes"))
            for key, label, size in zip(*columns, strict=True):
                digest.update(b"%s %s %d %d\n" % (split.encode(), key, label, size))
    return digest.hexdigest()


def in_parts(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Slices of an array as long as a data set, to convert elements to Python objects in parts."""
    for first in range(0, len(array), ROWS_AT_ONCE):
        yield array[first : first + ROWS_AT_ONCE]


# ---- which files are images -------------------------------------------------------------------------


def is_image(folder: Path, name: str) -> bool:
    """True if a file is an image by its suffix, or by its first bytes if the suffix is unknown or missing."""
    if is_hidden(name) or belongs_to_system(name):
        return False
    if has_suffix(name, IMAGE_SUFFIXES):
        return True
    if has_suffix(name, (*OTHER_SUFFIXES, *RAW_PHOTOGRAPHS)) or not (folder / name).is_file():
        return False
    with (folder / name).open("rb") as file:
        return format_of(file.read(SIGNATURE_BYTES)) is not None


def has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """True if the name ends in a suffix and has a stem."""
    return name[1:].lower().endswith(suffixes)


def check_no_images_below(folder: Path) -> None:
    """Raise `UserError` if a folder inside a class folder has images at any depth: they would be lost."""
    for path, folders, names in os.walk(folder, onerror=reraise):
        folders[:] = [name for name in folders if not (is_hidden(name) or belongs_to_system(name))]
        if any(is_image(Path(path), name) for name in names):
            raise UserError(
                f"{display_path(path)} has images inside a class folder; flatten it: move them up into "
                f"{display_path(folder.parent)}, or name the folders of the splits train/ and val/"
            )


def reraise(error: OSError) -> None:
    """The error handler of `os.walk`, which skips unreadable folders by default."""
    raise error


# ---- what is left out -------------------------------------------------------------------------------


def folder_entries(folder: Path) -> list[os.DirEntry[str]]:
    """Files and folders sorted by name, without those of the operating system."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not belongs_to_system(entry.name)), key=lambda entry: entry.name)


def belongs_to_system(name: str) -> bool:
    """True for names of an operating system: a Mac writes `._name.jpg` beside each file."""
    return SYSTEM_NAME.match(name) is not None


def is_hidden(name: str) -> bool:
    """True for names such as .git or .part.jpg."""
    return name.startswith(".")


def suffix(name: str) -> str:
    """The suffix for counts of unused files. Numbers and the like, of which there may be thousands, are one suffix."""
    lower = Path(name).suffix.lower()
    return (lower if USUAL_SUFFIX.fullmatch(lower) else "another suffix") if lower else "no suffix"


def left_out_in_words(left_out: Mapping[str, Tally]) -> str:
    """The five most frequent reasons with an example of each."""
    most = sorted(left_out.items(), key=lambda reason: -reason[1].count)[:5]
    return ", ".join(f"{tally.count:,} x {reason}, such as {tally.examples[0]}" for reason, tally in most)


def loss_lines(raw: Raw) -> Iterator[str]:
    """A warning for each of the first ten classes that lose images."""
    for number, (class_id, tally) in enumerate(raw.lost_images.items()):
        if number == LOST_SHOWN:
            yield f"warning: {len(raw.lost_images) - LOST_SHOWN:,} more classes lose images; the recipe counts them"
            return
        what = "class" if class_id in raw.class_ids else "folder"
        more = ", ..." if tally.count > len(tally.examples) else ""
        examples = ", ".join(tally.examples)
        yield f"warning: images of the {what} {class_id!r} that are left out: {tally.count:,} ({examples}{more})"
