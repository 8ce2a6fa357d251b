"""The unit of work of preprocessing: one shard, from its rows of the raw listing to a tar and a note beside it.

Everything here runs in worker processes, which import neither torch nor a raw layout. A shard is finished when its note
(`.recipe-work/train-00000.json`) exists: it is written last, and carries the hash of the plan (settings, versions and
rows), so that a run that was killed continues with every shard whose note still fits. The parent merges nothing but
notes.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from recipe.data.images import (
    AS_PNG,
    RejectedImageError,
    Rules,
    StoredImage,
    silence_decoders,
    store,
)
from recipe.data.shards import Shard, shard_name, size_of, write_shard
from recipe.errors import UserError
from recipe.files import display_path, write_atomically
from recipe.records import Oddity, Record, from_json, to_json

WORK = ".recipe-work"  # the folder of notes, gone when all is finished


@dataclass(frozen=True)
class Task:
    """One shard to be made."""

    split: str
    number: int
    rows: NDArray[np.void]
    plan_sha256: str

    @property
    def name(self) -> str:
        """The shard's file."""
        return shard_name(self.split, self.number)


@dataclass(frozen=True)
class Workplace:
    """What all tasks share."""

    directory: Path
    containers: list[Path]
    rules: dict[str, Rules]  # of each split
    skips_corrupt: bool


class Note(Record, frozen=True, kw_only=True):
    """Facts of a finished shard. Columns hold one value for each stored image, in the order of the shard."""

    plan_sha256: str
    shard: Shard
    stored: list[int]  # positions of stored images among the rows; the others are rejected
    offsets: list[int]
    sizes: list[int]  # bytes
    widths: list[int]
    heights: list[int]
    raw_sha256: str  # of the original bytes of every row, 64 hexadecimal digits each
    grey_images: list[str]  # keys
    rotated_images: list[str]
    oddities: list[Oddity]
    rejected: list[Oddity]
    converted_bytes: int  # of the files that became PNG
    png_bytes: int  # that they have become


class StoppedError(Exception):
    """The parent asked the workers to stop."""


class Flag(Protocol):
    """What tells a worker to stop: an event between threads or processes."""

    def is_set(self) -> bool:
        """Whether it is to stop."""


class RawReader:
    """Reads original bytes by (container, offset, size); files of archives are opened once."""

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
        """An open archive."""
        if container not in self.descriptors:
            self.descriptors[container] = os.open(self.containers[container], os.O_RDONLY | os.O_CLOEXEC)
        return self.descriptors[container]

    def where(self, row: np.void) -> str:
        """A raw image for an error message."""
        container = self.containers[int(row["container"])]
        if name := bytes(row["name"]):
            return display_path(container / os.fsdecode(name))
        return f"{bytes(row['key']).decode()} in {display_path(container)} (at byte {int(row['offset'])})"


@dataclass
class Packer:
    """Makes one shard, noting facts as images pass by."""

    task: Task
    place: Workplace
    reader: RawReader
    stop: Flag
    stored: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    raw_sha256: list[str] = field(default_factory=list)
    grey_images: list[str] = field(default_factory=list)
    rotated_images: list[str] = field(default_factory=list)
    oddities: list[Oddity] = field(default_factory=list)
    rejected: list[Oddity] = field(default_factory=list)
    converted_bytes: int = 0
    png_bytes: int = 0

    def pack(self) -> Note:
        """Write the tar, then the note."""
        note_path(self.place.directory, self.task).unlink(missing_ok=True)  # it may vouch for another plan's shard
        shard, places = write_shard(self.place.directory / self.task.name, self.images())
        note = Note(
            plan_sha256=self.task.plan_sha256,
            shard=shard,
            stored=self.stored,
            offsets=[place.offset for place in places],
            sizes=[place.bytes for place in places],
            widths=self.widths,
            heights=self.heights,
            raw_sha256="".join(self.raw_sha256),
            grey_images=self.grey_images,
            rotated_images=self.rotated_images,
            oddities=self.oddities,
            rejected=self.rejected,
            converted_bytes=self.converted_bytes,
            png_bytes=self.png_bytes,
        )
        write_atomically(note_path(self.place.directory, self.task), to_json(note))
        return note

    def images(self) -> Iterator[tuple[str, str, bytes, int]]:
        """(key, extension, stored bytes, label) of every sound image."""
        rules = self.place.rules[self.task.split]
        for position, row in enumerate(self.task.rows):
            if self.stop.is_set():
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
                    "a smaller data.max_pixels with data.corrupt=skip"
                ) from error
            self.note(position, key, image)
            yield key, image.extension, image.content, int(row["label"])

    def reject(self, row: np.void, key: str, error: RejectedImageError) -> None:
        """Leave out an image where that was asked for, else stop with its name."""
        if not self.place.skips_corrupt:
            raise UserError(
                f"{self.reader.where(row)} {error.verdict}: {error}; {error.way_out}, or leave such images out (and "
                "list them in the recipe) with data.corrupt=skip"
            )
        self.rejected.append(Oddity(split=self.task.split, key=key, what=str(error), done="left out"))

    def note(self, position: int, key: str, image: StoredImage) -> None:
        """Remember the facts of a stored image."""
        self.stored.append(position)
        self.widths.append(image.width)
        self.heights.append(image.height)
        if image.is_grey:
            self.grey_images.append(key)
        if image.is_rotated:
            self.rotated_images.append(key)
        if image.oddity is not None:
            self.oddities.append(Oddity(split=self.task.split, key=key, what=image.oddity, done=image.done))
        if image.done == AS_PNG:
            self.converted_bytes += int(self.task.rows["bytes"][position])
            self.png_bytes += len(image.content)


def note_path(directory: Path, task: Task) -> Path:
    """Where the facts of a shard are kept until all shards are finished."""
    return directory / WORK / f"{task.split}-{task.number:05d}.json"


def finished(directory: Path, task: Task) -> Note | None:
    """The note of a shard that an earlier run finished by the same plan, if its tar still has its size."""
    path = note_path(directory, task)
    if not path.exists():
        return None
    try:
        note = from_json(path.read_bytes(), Note, path.name)
    except UserError:
        return None  # written by other code: make the shard again
    fits = note.plan_sha256 == task.plan_sha256 and size_of(directory / task.name) == note.shard.bytes
    return note if fits else None


# ---- the life of a worker process -------------------------------------------------------------------

_worker: tuple[Workplace, RawReader, Flag]


def start_worker(place: Workplace, stop: Flag) -> None:
    """Runs once in each worker process."""
    global _worker
    threading.Thread(target=end_with_parent, daemon=True).start()
    silence_decoders()
    _worker = (place, RawReader(place.containers), stop)


def end_with_parent() -> None:
    """A parent that was killed cannot stop its workers, so they watch it and end by themselves."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def pack_here(task: Task, place: Workplace) -> Note:
    """Make one shard in this process; Ctrl-C ends it as it ends any program."""
    return Packer(task, place, RawReader(place.containers), threading.Event()).pack()


def run_task(task: Task) -> Note:
    """Make one shard in this worker process."""
    place, reader, stop = _worker
    return Packer(task, place, reader, stop).pack()
