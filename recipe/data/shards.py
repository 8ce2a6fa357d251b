"""The stored data set: tar shards that any reader opens, an index that finds an image at once, a manifest of it all.

    data/<name>/manifest.json                 what is in it: counts, hashes, classes, everything that was not usual
    data/<name>/train-00000.tar ...           <key>.jpg or .png, then <key>.cls with the label, as WebDataset has it
    data/<name>/train.index.npy               shard, offset, bytes, label, width, height of each image
    data/<name>/train.keys.npy                its key
    (and the same for val)

The same raw images and settings give the same bytes of all of these on any machine with the same Pillow: no clock, no
path, no user. Bytes are read with `os.pread`, not through a memory map: slicing a cold map page-faults with the GIL
held, and a read that fails says so where a map ends the process.
"""

from __future__ import annotations

import hashlib
import io
import os
import resource
import tarfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipe.errors import UserError
from recipe.files import disk_errors, display_path, temporary_sibling
from recipe.records import ClassName, Oddity, Record, Setting, from_json

SPLITS = ("train", "val")
INDEX = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("bytes", "<u4"),
        ("label", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
    ]
)
MANIFEST = "manifest.json"
TAR_RECORD_BYTES = tarfile.RECORDSIZE
EMPTY = tarfile.TarInfo().tobuf()  # the header of no name and no size; bytes 148 to 154 are its sum in octal
EMPTY_CHECKSUM = int(EMPTY[148:154], 8)
OTHER_OPEN_FILES = 512  # beside shards: libraries, sockets, pipes, logs


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
    grey_images: list[str]  # keys of images that decoders turn into RGB
    rotated_images: list[str]  # keys of those whose EXIF orientation is not applied


class Manifest(Record, frozen=True, kw_only=True):
    """The data set's identity: its hash is what training checks and records."""

    format: str = "manifest/1"
    name: str
    settings: dict[str, Setting]  # all that shaped the bytes
    listing_sha256: str  # of the raw images' names, labels and sizes
    is_ilsvrc2012: bool
    label_convention: str
    classes: list[ClassName]
    splits: dict[str, ManifestSplit]
    oddities: list[Oddity]
    rejected: list[Oddity]


# ---- writing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where an image's bytes lie in its shard."""

    offset: int
    bytes: int


class ShardWriter:
    """Writes one tar of equal bytes for equal images, hashing as it goes."""

    def __init__(self, handle: io.BufferedWriter) -> None:
        self.handle = handle
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def add(self, key: str, extension: str, content: bytes, label: int) -> Place:
        """Append an image and its label."""
        place = self.member(f"{key}.{extension}", content)
        self.member(f"{key}.cls", str(label).encode("ascii"))
        return place

    def member(self, name: str, content: bytes) -> Place:
        """One regular file, of nobody and at time 0."""
        self.write(tar_header(name, len(content)))
        place = Place(self.bytes, len(content))
        self.write(content)
        self.write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return place

    def close(self) -> None:
        """The end-of-archive blocks, filled up as tar does, and everything on the disk."""
        self.write(bytes(2 * tarfile.BLOCKSIZE))
        self.write(bytes(-self.bytes % TAR_RECORD_BYTES))
        self.handle.flush()
        os.fsync(self.handle.fileno())

    def write(self, content: bytes) -> None:
        """Append raw bytes."""
        self.handle.write(content)
        self.sha256.update(content)
        self.bytes += len(content)


def tar_header(name: str, size: int) -> bytes:
    """What tarfile writes, byte for byte, in a tenth of its time; plain ustar unless a long name needs a pax header."""
    if len(name) > tarfile.LENGTH_NAME or not name.isascii():
        header = tarfile.TarInfo(name)
        header.size = size
        return header.tobuf(tarfile.PAX_FORMAT)
    named, sized = name.encode(), b"%011o" % size
    checksum = EMPTY_CHECKSUM + sum(named) + sum(sized) - 11 * ord("0")
    return b"%b%b%b\0%b%06o%b" % (
        named.ljust(tarfile.LENGTH_NAME, b"\0"),
        EMPTY[100:124],
        sized,
        EMPTY[136:148],
        checksum,
        EMPTY[154:],
    )


def write_shard(path: Path, images: Iterable[tuple[str, str, bytes, int]]) -> tuple[Shard, list[Place]]:
    """Write (key, extension, content, label) of each image under a temporary name, then give it its own."""
    with disk_errors(path), temporary_sibling(path) as temporary:
        with temporary.open("wb") as handle:
            writer = ShardWriter(handle)
            places = [writer.add(*image) for image in images]
            writer.close()
        temporary.replace(path)
    return Shard(name=path.name, images=len(places), bytes=writer.bytes, sha256=writer.sha256.hexdigest()), places


def shard_name(split: str, number: int) -> str:
    """`train-00000.tar`."""
    return f"{split}-{number:05d}.tar"


def npy_bytes(array: NDArray[Any]) -> bytes:
    """The array as a .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=False)
    return stream.getvalue()


# ---- reading ----------------------------------------------------------------------------------------


class Split:
    """Random access to one split: `read(i)` gives the stored bytes of image i. Threads may share one."""

    def __init__(self, directory: Path, name: str, shards: list[Shard]) -> None:
        self.directory, self.name, self.shards = directory, name, shards
        self.index: NDArray[np.void] = mapped(directory / f"{name}.index.npy")
        self.keys: NDArray[np.bytes_] = mapped(directory / f"{name}.keys.npy")
        self._descriptors: dict[int, int] = {}
        self._opening = threading.Lock()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> NDArray[np.uint32]:
        """Class indices, u4[images]."""
        labels: NDArray[np.uint32] = self.index["label"]
        return labels

    def read(self, i: int) -> bytes:
        """The stored file of image i: a JPEG or PNG."""
        shard, offset, size = (int(self.index[i][field]) for field in ("shard", "offset", "bytes"))
        try:
            content = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise UserError(f"cannot read {self.where(i)}: {os.strerror(error.errno or 0)}") from error
        if len(content) != size:
            raise UserError(f"{self.where(i)} is cut off; repair it with `python preprocess.py`")
        return content

    def key(self, i: int) -> str:
        """The name of image i: n01440764_10026, or class/name."""
        return bytes(self.keys[i]).decode("ascii")

    def where(self, i: int) -> str:
        """Image i for an error message."""
        return f"shard {self.shards[int(self.index[i]['shard'])].name}, image {self.key(i)}"

    def is_intact(self, i: int) -> bool:
        """Whether the shard of image i still is what the manifest names; reads all of it."""
        shard = self.shards[int(self.index[i]["shard"])]
        try:
            return is_file_with(self.directory / shard.name, shard.sha256)
        except OSError:
            return False

    def close(self) -> None:
        """Close the shards; the next `read` opens them again."""
        with self._opening:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __del__(self) -> None:
        if hasattr(self, "_opening"):
            self.close()

    def __reduce__(self) -> tuple[type[Split], tuple[Path, str, list[Shard]]]:
        """Pickled as its name: another process opens its own."""
        return Split, (self.directory, self.name, self.shards)

    def _descriptor(self, shard: int) -> int:
        """The shard's file descriptor, opened at its first use and kept."""
        found = self._descriptors.get(shard)
        if found is None:
            with self._opening:
                found = self._descriptors.get(shard)
                if found is None:
                    found = os.open(self.directory / self.shards[shard].name, os.O_RDONLY | os.O_CLOEXEC)
                    self._descriptors[shard] = found
        return found


def mapped(path: Path) -> NDArray[Any]:
    """A memory map as a plain array: numpy's own class for maps makes every access to an element slow."""
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    return array


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of the data set in `directory`; says how to make one where there is none."""
    path = Path(directory) / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"there is no preprocessed data set in {display_path(directory)}; "
            "make it with `python preprocess.py experiment=...` and the same experiment, "
            "or name its folder with data.directory="
        ) from None
    try:
        return from_json(content, Manifest, display_path(path))
    except UserError as error:
        raise UserError(f"{error}; delete that file and run `python preprocess.py` again") from error


def manifest_sha256(directory: str | Path) -> str:
    """The identity of a data set, as records name it."""
    read_manifest(directory)
    return hashlib.sha256((Path(directory) / MANIFEST).read_bytes()).hexdigest()


def open_split(directory: str | Path, name: str) -> Split:
    """A split of the data set in `directory`, after a look at the size of each of its files."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    assert name in manifest.splits, f"{name} is none of {list(manifest.splits)}"
    for problem in problems(directory, manifest, name):
        raise UserError(f"{problem}; repair it with `python preprocess.py` and the same experiment")
    allow_open_files(sum(len(split.shards) for split in manifest.splits.values()))
    return Split(directory, name, manifest.splits[name].shards)


def allow_open_files(shards: int) -> None:
    """Shards stay open, one descriptor each, and the usual limit of 1,024 is less than ImageNet's 1,332."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = shards + OTHER_OPEN_FILES
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise UserError(
            f"the data set has {shards} shards, but this system allows {hard} open files: raise it with "
            f"`ulimit -n {wanted}`, or preprocess with more data.images_per_shard"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def problems(directory: Path, manifest: Manifest, name: str) -> Iterator[str]:
    """What is wrong with the files of a split, one sentence each; sizes of shards only, contents of the index."""
    split = manifest.splits[name]
    for file, sha256 in ((f"{name}.index.npy", split.index_sha256), (f"{name}.keys.npy", split.keys_sha256)):
        if not is_file_with(directory / file, sha256):
            yield f"{display_path(directory / file)} is missing or differs from the manifest"
    for shard in split.shards:
        found = size_of(directory / shard.name)
        if found != shard.bytes:
            what = "is missing" if found is None else f"has {found:,} bytes instead of {shard.bytes:,}"
            yield f"{display_path(directory / shard.name)} {what}"


def size_of(path: Path) -> int | None:
    """Bytes of a file, None where there is none."""
    return path.stat().st_size if path.is_file() else None


def is_file_with(path: Path, sha256: str) -> bool:
    """Whether the file is there with this content."""
    if not path.is_file():
        return False
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() == sha256
