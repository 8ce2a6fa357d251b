"""From the notes of all shards of a split to its index, its keys and the facts of the record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recipe.data.listing import Rows, in_parts
from recipe.data.packing import Note, Task
from recipe.data.shards import INDEX, Shard
from recipe.records import Oddity


@dataclass(frozen=True)
class Merged:
    """One split, whole."""

    index: NDArray[np.void]
    keys: NDArray[np.bytes_]
    shards: list[Shard]
    raw_sha256: str
    grey_images: list[str]  # keys
    rotated_images: list[str]
    oddities: list[Oddity]
    rejected: list[Oddity]
    converted_bytes: int  # of the files that became PNG
    png_bytes: int  # that they have become


@dataclass(frozen=True)
class Part:
    """One shard's note as arrays: a list of Python numbers would take several times the room, for every image."""

    rows: Rows  # all raw images of the shard, rejected ones included
    shard: Shard
    stored: NDArray[np.uint32]  # positions among the rows
    index: NDArray[np.void]
    raw_sha256: bytes  # 32 for each row
    grey_images: list[str]  # keys
    rotated_images: list[str]
    oddities: list[Oddity]
    rejected: list[Oddity]
    converted_bytes: int
    png_bytes: int


def part_of(task: Task, note: Note) -> Part:
    """Compact a note as soon as it arrives."""
    stored = np.array(note.stored, dtype=np.uint32)
    index = np.zeros(len(stored), dtype=INDEX)
    index["shard"] = task.number
    index["label"] = task.rows["label"][stored]
    columns = (("offset", note.offsets), ("bytes", note.sizes), ("width", note.widths), ("height", note.heights))
    for field, values in columns:
        index[field] = values
    return Part(
        task.rows,
        note.shard,
        stored,
        index,
        bytes.fromhex(note.raw_sha256),
        note.grey_images,
        note.rotated_images,
        note.oddities,
        note.rejected,
        note.converted_bytes,
        note.png_bytes,
    )


def merge(parts: Sequence[Part]) -> Merged:
    """Put the shards of a split together, in their order."""
    return Merged(
        index=np.concatenate([part.index for part in parts]),
        keys=np.concatenate([part.rows["key"][part.stored] for part in parts]),
        shards=[part.shard for part in parts],
        raw_sha256=raw_sha256(parts),
        grey_images=sorted(key for part in parts for key in part.grey_images),
        rotated_images=sorted(key for part in parts for key in part.rotated_images),
        oddities=by_key(oddity for part in parts for oddity in part.oddities),
        rejected=by_key(oddity for part in parts for oddity in part.rejected),
        converted_bytes=sum(part.converted_bytes for part in parts),
        png_bytes=sum(part.png_bytes for part in parts),
    )


def raw_sha256(parts: Sequence[Part]) -> str:
    """Over the lines `key label sha256` of all raw images, sorted by key: the same for archives and folders."""
    keys = np.concatenate([part.rows["key"] for part in parts])
    labels = np.concatenate([part.rows["label"] for part in parts])
    content = b"".join(part.raw_sha256 for part in parts)
    digest = hashlib.sha256()
    for part in in_parts(np.argsort(keys, kind="stable")):
        for i, key, label in zip(part.tolist(), keys[part].tolist(), labels[part].tolist(), strict=True):
            digest.update(b"%b %d %b\n" % (key, label, content[32 * i : 32 * i + 32].hex().encode()))
    return digest.hexdigest()


def by_key(found: Iterable[Oddity]) -> list[Oddity]:
    """Oddities in the order of their keys."""
    return sorted(found, key=lambda oddity: oddity.key)
