"""File work: atomic writing, locks, reading files from others, and paths as people and records see them.

Files of others are read with care: a FIFO or a device blocks its reader, a sparse file claims terabytes, a link or a
name with slashes leads out of its folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from recipe.errors import DiskError, UserError, how_to_continue

CHECKOUT = Path(__file__).resolve().parents[2]
ELSEWHERE = "..."  # stands for the folders of a place outside the checkout
RECORD_BYTES_MAX = 256 * 2**20  # of a record, the log or the JSON file of one run; those of ImageNet have 10 MB
WEIGHTS_BYTES_MAX = 16 * 2**30  # torchvision's largest classifier with an average and Adam's moments has 10 GB
FILE_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,199}")
# A slash where a path can begin (not in a word or a URL; after a colon a single one), and the folders after it.
ABSOLUTE_PATH = re.compile(r"(?:(?<=file:)//+|(?<![\w.$}:/])/+|(?<=:)/(?!/))(?:[\w.+@%~-]+/+)+")


# Writing


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name, flush to the disk, rename: the final name never holds half a file."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(path) as temporary:
            with temporary.open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)


@contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, removed at the end."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise `DiskError`, one sentence with exit code 74, for a full, read-only or vanished disk."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        hint = f"free some space, then {how_to_continue()}" if error.errno == errno.ENOSPC else "give another place"
        raise DiskError(f"cannot write {display_path(path)}: {reason}; {hint}") from error


@contextmanager
def exclusive_lock(file: Path, busy: str, key: str) -> Iterator[None]:
    """Hold `file`; a second process is refused at once, and so is a file system without locks.

    `busy` completes the sentence "<folder> is ... by another process"; `key` names the setting of another folder.
    """
    with disk_errors(file):
        handle = file.open("a")
    folder = display_path(file.parent)
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is {busy} by another process; wait for it or give another {key}") from None
        except OSError as error:
            raise UserError(
                f"the file system of {folder} cannot lock files ({error.strerror}); give a {key} on another one"
            ) from error
        yield


# Reading files that may come from others


@contextmanager
def opened(path: Path, where: str, bytes_max: int, folder: Path | None = None) -> Iterator[BufferedReader]:
    """Open a regular file of at most `bytes_max` bytes, inside `folder` where one is given; else raise `UserError`."""
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
    """Opener that does not wait for the other end of a FIFO and takes over no terminal."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def read_file(path: Path, where: str, bytes_max: int, folder: Path | None = None) -> bytes:
    """The content of a file that `opened` accepts."""
    with opened(path, where, bytes_max, folder) as handle, reading_errors(where):
        return handle.read(os.fstat(handle.fileno()).st_size)


@contextmanager
def reading_errors(where: str) -> Iterator[None]:
    """Raise `UserError` for what the file system refuses to read."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, its links followed, ends inside a folder; a path that no file can have does not."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except (OSError, ValueError):
        return False


def file_name(text: str, what: str) -> str:
    """`text`, if it can name a file; raises `UserError` for paths, hidden names and characters special to shells."""
    if not FILE_NAME.fullmatch(text):
        raise UserError(
            f"{what} {text[:80]!r} cannot name a file: it must be at most 200 letters, digits and . _ + -, and not "
            "begin with a dot"
        )
    return text


# Paths as text


def display_path(path: str | Path) -> str:
    """A path for messages: relative to the checkout or the current directory where it is inside, else as it is."""
    portable = portable_path(path)
    return printable(str(path)) if is_elsewhere(portable) else portable


def portable_path(path: str | Path) -> str:
    """A path for records: relative to the checkout or the current directory, else `.../` and its last part."""
    absolute = Path(os.path.normpath(Path(path).absolute()))
    for base in (CHECKOUT, Path.cwd()):
        if absolute.is_relative_to(base):
            return printable(str(absolute.relative_to(base)) or ".")
    return printable(str(Path(ELSEWHERE, *absolute.parts[1:][-1:])))


def is_elsewhere(portable: str) -> bool:
    """Whether a portable path is outside the checkout, where commands cannot name it."""
    return Path(portable).parts[:1] == (ELSEWHERE,)


def redact_paths(text: str) -> str:
    """Cut every absolute path to its last part: records hold no path, host or user name."""
    return ABSOLUTE_PATH.sub(".../", text.replace(f"{CHECKOUT}/", ""))


def printable(name: str) -> str:
    """A file name with bytes that are not UTF-8 written as \\xff, since records and documents hold text only."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
