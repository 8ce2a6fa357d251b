"""Makes a shard: a tar from rows of the raw listing, and a note of its facts.

Runs in worker processes, without torch. A shard is finished when its note (`.recipe-work/train-00000.json`) exists. The
note is written last and has the hash of the plan (settings, versions and rows). A run that continues a killed one keeps
shards with a note of the same plan. At the end the notes of a split are merged into its index and its facts.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import parent_process
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipe.data.images import AS_PNG, RejectedImageError, Rules, StoredImage, silence_decoders, store
from recipe.data.manifest import Shard
from recipe.data.shards import INDEX, size_of
from recipe.errors import UserError
from recipe.preprocessing.listing import Rows, in_parts
from recipe.run.files import disk_errors, display_path, temporary_sibling, write_atomically
from recipe.run.records import Record, UnusualImage, from_json, to_json

WORK = ".recipe-work"  # the folder of notes, removed when all shards are finished
TAR_RECORD_BYTES = tarfile.RECORDSIZE
EMPTY = tarfile.TarInfo().tobuf()  # a header without name and size. Bytes 148 to 154 are its sum in octal
EMPTY_CHECKSUM = int(EMPTY[148:154], 8)


@dataclass(frozen=True)
class Task:
    """One shard to make."""

    split: str
    number: int
    rows: Rows
    plan_sha256: str

    @property
    def name(self) -> str:
        """The shard's file: `train-00000.tar`."""
        return f"{self.split}-{self.number:05d}.tar"


@dataclass(frozen=True)
class WriterSettings:
    """The settings of all tasks."""

    directory: Path
    containers: list[Path]
    rules: dict[str, Rules]  # of each split
    skips_corrupt: bool


@dataclass
class UnusualImages:
    """The unusual images of a shard or a split."""

    grey: list[str] = field(default_factory=list)  # keys
    rotated: list[str] = field(default_factory=list)
    converted: list[UnusualImage] = field(default_factory=list)
    rejected: list[UnusualImage] = field(default_factory=list)
    converted_bytes: int = 0  # of the files that became PNG
    png_bytes: int = 0  # of the PNG files


class Note(Record, frozen=True, kw_only=True):
    """Facts of a finished shard. Columns have one value for each stored image, in the order of the shard."""

    plan_sha256: str
    shard: Shard
    stored: list[int]  # positions of stored images among the rows. Others are rejected
    offsets: list[int]
    sizes: list[int]  # bytes
    widths: list[int]
    heights: list[int]
    raw_sha256: str  # of the original bytes of every row, 64 hexadecimal digits each
    unusual: UnusualImages


class StoppedError(Exception):
    """The parent asked the workers to stop."""


class RawReader:
    """Reads original bytes by (container, offset, size). Archives are opened once."""

    def __init__(self, containers: list[Path]) -> None:
        self.containers = containers
        self.descriptors: dict[int, int] = {}

    def read(self, row: np.void) -> bytes:
        """The original bytes of one image."""
        container, size = int(row["container"]), int(row["bytes"])
        try:
            if name := bytes(row["name"]):
                content = (self.containers[container] / os.fsdecode(name)).read_bytes()
            else:
                content = os.pread(self.descriptor(container), size, int(row["offset"]))
        except OSError as error:
            raise UserError(f"cannot read {self.where(row)}: {os.strerror(error.errno or 0)}") from error
        if len(content) != size:
            raise UserError(f"{self.where(row)} changed or was cut off while it was being read")
        return content

    def descriptor(self, container: int) -> int:
        """The descriptor of an open archive."""
        if container not in self.descriptors:
            self.descriptors[container] = os.open(self.containers[container], os.O_RDONLY | os.O_CLOEXEC)
        return self.descriptors[container]

    def where(self, row: np.void) -> str:
        """The name of a raw image for an error message."""
        container = self.containers[int(row["container"])]
        if name := bytes(row["name"]):
            return display_path(container / os.fsdecode(name))
        return f"{bytes(row['key']).decode()} in {display_path(container)} (at byte {int(row['offset'])})"


@dataclass
class ShardMaker:
    """Makes one shard and collects its facts. `should_stop` is asked before each image."""

    task: Task
    settings: WriterSettings
    reader: RawReader
    should_stop: Callable[[], bool]
    stored: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    raw_sha256: list[str] = field(default_factory=list)
    unusual: UnusualImages = field(default_factory=UnusualImages)

    def make(self) -> Note:
        """Write the tar, then the note."""
        path = note_path(self.settings.directory, self.task)
        path.unlink(missing_ok=True)  # it may be of another plan's shard
        shard, places = write_shard(self.settings.directory / self.task.name, self.images())
        note = Note(
            plan_sha256=self.task.plan_sha256,
            shard=shard,
            stored=self.stored,
            offsets=[place.offset for place in places],
            sizes=[place.bytes for place in places],
            widths=self.widths,
            heights=self.heights,
            raw_sha256="".join(self.raw_sha256),
            unusual=self.unusual,
        )
        write_atomically(path, to_json(note))
        return note

    def images(self) -> Iterator[tuple[str, str, bytes, int]]:
        """(key, extension, stored bytes, label) of every accepted image."""
        rules = self.settings.rules[self.task.split]
        for position, row in enumerate(self.task.rows):
            if self.should_stop():
                raise StoppedError
            content, key = self.reader.read(row), bytes(row["key"]).decode("ascii")
            self.raw_sha256.append(hashlib.sha256(content).hexdigest())
            try:
                image = store(content, bytes(row["name"]).lower().endswith(b".png"), rules)
            except RejectedImageError as error:
                self.reject(row, key, error)
                continue
            except MemoryError as error:
                raise UserError(
                    f"there is not enough memory to decode {self.reader.where(row)}; give fewer data.processes, or "
                    "a smaller data.max_pixels with data.on_corrupt=skip"
                ) from error
            self.stored.append(position)
            self.widths.append(image.width)
            self.heights.append(image.height)
            self.note_unusual(key, image, len(content))
            yield key, image.extension, image.content, int(row["label"])

    def reject(self, row: np.void, key: str, error: RejectedImageError) -> None:
        """Skip an image if data.on_corrupt=skip, else raise `UserError` with its name."""
        if not self.settings.skips_corrupt:
            raise UserError(
                f"{self.reader.where(row)} {error.verdict}: {error}; {error.way_out}, or leave such images out (and "
                "list them in the recipe) with data.on_corrupt=skip"
            )
        self.unusual.rejected.append(UnusualImage(split=self.task.split, key=key, what=str(error), done="left out"))

    def note_unusual(self, key: str, image: StoredImage, raw_bytes: int) -> None:
        """Note the unusual property of a stored image."""
        if image.is_grey:
            self.unusual.grey.append(key)
        if image.is_rotated:
            self.unusual.rotated.append(key)
        if image.unusual is not None:
            self.unusual.converted.append(
                UnusualImage(split=self.task.split, key=key, what=image.unusual, done=image.done)
            )
        if image.done == AS_PNG:
            self.unusual.converted_bytes += raw_bytes
            self.unusual.png_bytes += len(image.content)


def note_path(directory: Path, task: Task) -> Path:
    """The path of a shard's note."""
    return directory / WORK / f"{task.split}-{task.number:05d}.json"


def finished(directory: Path, task: Task) -> Note | None:
    """The note of a shard that an earlier run finished with the same plan, if its tar has the noted size."""
    path = note_path(directory, task)
    if not path.exists():
        return None
    try:
        note = from_json(path.read_bytes(), Note, path.name)
    except UserError:
        return None  # written by other code: make the shard again
    fits = note.plan_sha256 == task.plan_sha256 and size_of(directory / task.name) == note.shard.bytes
    return note if fits else None


# ---- the tar ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredBytes:
    """The place of an image's bytes in its shard."""

    offset: int
    bytes: int


class ShardWriter:
    """Writes a tar and its SHA-256, with equal bytes for equal images."""

    def __init__(self, handle: io.BufferedWriter) -> None:
        self.handle = handle
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def add(self, key: str, extension: str, content: bytes, label: int) -> StoredBytes:
        """Append an image and its label."""
        place = self.member(f"{key}.{extension}", content)
        self.member(f"{key}.cls", str(label).encode("ascii"))
        return place

    def member(self, name: str, content: bytes) -> StoredBytes:
        """Append a regular file without owner, at time 0."""
        self.write(tar_header(name, len(content)))
        place = StoredBytes(self.bytes, len(content))
        self.write(content)
        self.write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return place

    def close(self) -> None:
        """Append the end-of-archive blocks and flush everything to the disk."""
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
    """The header of tarfile, in a tenth of its time. Plain ustar unless a long name needs a pax header."""
    if len(name) > tarfile.LENGTH_NAME or not name.isascii():
        header = tarfile.TarInfo(name)
        header.size = size
        return header.tobuf(tarfile.PAX_FORMAT)
    name_bytes, size_bytes = name.encode(), b"%011o" % size
    checksum = EMPTY_CHECKSUM + sum(name_bytes) + sum(size_bytes) - 11 * ord("0")
    return b"%b%b%b\0%b%06o%b" % (
        name_bytes.ljust(tarfile.LENGTH_NAME, b"\0"),
        EMPTY[100:124],
        size_bytes,
        EMPTY[136:148],
        checksum,
        EMPTY[154:],
    )


def write_shard(path: Path, images: Iterable[tuple[str, str, bytes, int]]) -> tuple[Shard, list[StoredBytes]]:
    """Write (key, extension, content, label) of each image to a temporary file, then rename it."""
    with disk_errors(path), temporary_sibling(path) as temporary:
        with temporary.open("wb") as handle:
            writer = ShardWriter(handle)
            places = [writer.add(*image) for image in images]
            writer.close()
        temporary.replace(path)
    return Shard(name=path.name, images=len(places), bytes=writer.bytes, sha256=writer.sha256.hexdigest()), places


def npy_bytes(array: NDArray[Any]) -> bytes:
    """The array as a .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=False)
    return stream.getvalue()


# ---- from the notes of a split to its index and facts -----------------------------------------------


@dataclass(frozen=True)
class Part:
    """The note of a shard as arrays, since lists of Python numbers take several times the memory."""

    rows: Rows  # all raw images of the shard, rejected ones included
    shard: Shard
    stored: NDArray[np.uint32]  # positions among the rows
    index: NDArray[np.void]
    raw_sha256: bytes  # 32 for each row
    unusual: UnusualImages


@dataclass(frozen=True)
class Merged:
    """All shards of one split."""

    index: NDArray[np.void]
    keys: NDArray[np.bytes_]
    shards: list[Shard]
    raw_sha256: str
    unusual: UnusualImages


def part_of(task: Task, note: Note) -> Part:
    """Convert a note to arrays."""
    stored = np.array(note.stored, dtype=np.uint32)
    index = np.zeros(len(stored), dtype=INDEX)
    index["shard"] = task.number
    index["label"] = task.rows["label"][stored]
    columns = (("offset", note.offsets), ("bytes", note.sizes), ("width", note.widths), ("height", note.heights))
    for name, values in columns:
        index[name] = values
    return Part(task.rows, note.shard, stored, index, bytes.fromhex(note.raw_sha256), note.unusual)


def merge_parts(parts: Sequence[Part]) -> Merged:
    """Merge the shards of a split in their order."""
    unusual = [part.unusual for part in parts]
    return Merged(
        index=np.concatenate([part.index for part in parts]),
        keys=np.concatenate([part.rows["key"][part.stored] for part in parts]),
        shards=[part.shard for part in parts],
        raw_sha256=raw_sha256(parts),
        unusual=UnusualImages(
            grey=sorted(key for images in unusual for key in images.grey),
            rotated=sorted(key for images in unusual for key in images.rotated),
            converted=sorted((image for images in unusual for image in images.converted), key=lambda image: image.key),
            rejected=sorted((image for images in unusual for image in images.rejected), key=lambda image: image.key),
            converted_bytes=sum(images.converted_bytes for images in unusual),
            png_bytes=sum(images.png_bytes for images in unusual),
        ),
    )


def raw_sha256(parts: Sequence[Part]) -> str:
    """SHA-256 over the lines `key label sha256` of all raw images, sorted by key: equal for archives and folders."""
    keys = np.concatenate([part.rows["key"] for part in parts])
    labels = np.concatenate([part.rows["label"] for part in parts])
    content = b"".join(part.raw_sha256 for part in parts)
    digest = hashlib.sha256()
    for piece in in_parts(np.argsort(keys, kind="stable")):
        for i, key, label in zip(piece.tolist(), keys[piece].tolist(), labels[piece].tolist(), strict=True):
            digest.update(b"%b %d %b\n" % (key, label, content[32 * i : 32 * i + 32].hex().encode()))
    return digest.hexdigest()


# ---- a worker process -------------------------------------------------------------------------------

_worker: tuple[WriterSettings, RawReader, Event]


def start_worker(settings: WriterSettings, stop: Event) -> None:
    """Initialise a worker process."""
    global _worker
    threading.Thread(target=end_with_parent, daemon=True).start()
    silence_decoders()
    _worker = (settings, RawReader(settings.containers), stop)


def end_with_parent() -> None:
    """End this worker if its parent ends, since a killed parent cannot stop its workers."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def run_task(task: Task) -> Note:
    """Make one shard in this worker process."""
    settings, reader, stop = _worker
    return ShardMaker(task, settings, reader, stop.is_set).make()
