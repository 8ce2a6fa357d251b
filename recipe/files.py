"""Files that may come from a stranger, and names that may: the one place where either meets the file system.

A FIFO or a device would keep a reader waiting for ever, a sparse file claims terabytes, a link leads to files that the
folder does not hold, and a name with a slash or dots leads out of it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from recipe.errors import UserError

RECORD_BYTES_MAX = 256 * 2**20  # a record, the rows or the twin of one run; those of ImageNet have 10 MB
WEIGHTS_BYTES_MAX = 16 * 2**30  # torchvision's largest classifier with an average and Adam's moments has 10 GB
FILE_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,199}")


def file_name(text: str, what: str) -> str:
    """`text` where it can name a file; raises `UserError` for a path, a hidden name and characters that shells mind."""
    if not FILE_NAME.fullmatch(text):
        raise UserError(
            f"{what} {text[:80]!r} cannot name a file: it must be at most 200 letters, digits and . _ + -, and not "
            "begin with a dot"
        )
    return text


@contextmanager
def opened(path: Path, where: str, bytes_max: int, folder: Path | None = None) -> Iterator[BufferedReader]:
    """A regular file of at most `bytes_max` bytes, inside `folder` where one is given; raises `UserError` otherwise."""
    if folder is not None and not is_inside(path, folder):
        raise UserError(f"{where} is a link that leaves its folder; put the file in its place")
    with reading_errors(where):
        handle = open(path, "rb", opener=at_once)  # noqa: SIM115 - closed below
    with handle:
        status = os.fstat(handle.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{where} cannot be read: it is a pipe or a device, not a regular file")
        if status.st_size > bytes_max:
            raise UserError(f"{where} has {status.st_size:,} bytes; at most {bytes_max:,} are read")
        yield handle


def at_once(path: str, flags: int) -> int:
    """A FIFO opens without anybody at its other end, a terminal stays another's."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def read_file(path: Path, where: str, bytes_max: int, folder: Path | None = None) -> bytes:
    """The content of a file that `opened` accepts."""
    with opened(path, where, bytes_max, folder) as handle, reading_errors(where):
        return handle.read(os.fstat(handle.fileno()).st_size)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, its links followed, ends inside a folder; a path that no file can have does not."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except (OSError, ValueError):
        return False


@contextmanager
def reading_errors(where: str) -> Iterator[None]:
    """Turn what the file system says about reading into one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error
