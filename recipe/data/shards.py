"""The stored data set: tar shards in the WebDataset convention, an index of the images, a manifest.

    data/<name>/manifest.json                 counts, hashes, classes, settings, images that were converted or skipped
    data/<name>/train-00000.tar ...           <key>.jpg or .png, then <key>.cls with the label
    data/<name>/train.index.npy               shard, offset, bytes, label, width, height of each image
    data/<name>/train.keys.npy                its key
    (and the same for val)

The same raw images and settings give the same bytes of these files on any machine with the same Pillow. Bytes are read
with `os.pread`, not through a memory map: a page fault of a map blocks the GIL, and a failing disk ends the process
in place of raising an error.
"""

from __future__ import annotations

import hashlib
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipe.data.manifest import Manifest, Shard, read_manifest
from recipe.errors import UserError
from recipe.run.files import display_path

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
OTHER_OPEN_FILES = 512  # beside shards: libraries, sockets, pipes, logs


class Split:
    """Random access to one split: `read(i)` returns the stored bytes of image i. Thread-safe."""

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
        """The name of image i for an error message."""
        return f"shard {self.shards[int(self.index[i]['shard'])].name}, image {self.key(i)}"

    def is_intact(self, i: int) -> bool:
        """True if the shard of image i has the hash in the manifest. Reads all of it."""
        shard = self.shards[int(self.index[i]["shard"])]
        try:
            return is_file_with(self.directory / shard.name, shard.sha256)
        except OSError:
            return False

    def close(self) -> None:
        """Close the shards. The next `read` opens them again."""
        with self._opening:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __del__(self) -> None:
        if hasattr(self, "_opening"):
            self.close()

    def __reduce__(self) -> tuple[type[Split], tuple[Path, str, list[Shard]]]:
        """Pickle the directory and the name. Another process opens the files again."""
        return Split, (self.directory, self.name, self.shards)

    def _descriptor(self, shard: int) -> int:
        """The shard's file descriptor, opened at the first use and kept."""
        found = self._descriptors.get(shard)
        if found is None:
            with self._opening:
                found = self._descriptors.get(shard)
                if found is None:
                    found = os.open(self.directory / self.shards[shard].name, os.O_RDONLY | os.O_CLOEXEC)
                    self._descriptors[shard] = found
        return found


def mapped(path: Path) -> NDArray[Any]:
    """A memory map as a plain array: element access of numpy's class for maps is slow."""
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    return array


def open_split(directory: str | Path, name: str) -> Split:
    """Open a split of the data set in `directory`, after checking the sizes of its files."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    assert name in manifest.splits, f"{name} is none of {list(manifest.splits)}"
    for problem in problems(directory, manifest, name):
        raise UserError(f"{problem}; repair it with `python preprocess.py` and the same experiment")
    allow_open_files(sum(len(split.shards) for split in manifest.splits.values()))
    return Split(directory, name, manifest.splits[name].shards)


def allow_open_files(shards: int) -> None:
    """Raise the limit of open files: shards stay open, and ImageNet has 1,332, above the usual 1,024."""
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
    """Problems of the files of a split, one sentence each: sizes of shards, contents of the index."""
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
    """Bytes of a file. None if it does not exist."""
    return path.stat().st_size if path.is_file() else None


def is_file_with(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() == sha256
