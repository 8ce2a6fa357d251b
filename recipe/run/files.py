"""Atomic writing, locks, reading untrusted files, and paths for messages and records.

Untrusted files can be FIFOs or devices, which block the reader, sparse files of terabytes, and links or names that
lead out of their folder.
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
ELSEWHERE = "..."  # replaces the folders of a path outside the checkout
RECORD_BYTES_MAX = 256 * 2**20  # of a record, a log or a JSON file of a run. Those of ImageNet have 10 MB
WEIGHTS_BYTES_MAX = 16 * 2**30  # torchvision's largest classifier with an average and Adam's moments has 10 GB
FILE_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,199}")
# A slash where a path can begin (not in a word or a URL, and single after a colon), and the folders after it.
ABSOLUTE_PATH = re.compile(r"(?:(?<=file:)//+|(?<![\w.$}:/])/+|(?<=:)/(?!/))(?:[\w.+@%~-]+/+)+")


# Writing


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name, flush to the disk, rename. The final name never has a partial file."""
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
    """Raise `DiskError` for a full, read-only or vanished disk."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        hint = f"free some space, then {how_to_continue()}" if error.errno == errno.ENOSPC else "give another place"
        raise DiskError(f"cannot write {display_path(path)}: {reason}; {hint}") from error


@contextmanager
def exclusive_lock(file: Path, busy: str, key: str) -> Iterator[None]:
    """Lock `file`. Raises `UserError` at once if another process has the lock or the file system has no locks.

    `busy` completes the sentence "<folder> is ... by another process". `key` names the setting of another folder.
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
    """Open a regular file of at most `bytes_max` bytes, inside `folder` if given. Raises `UserError` otherwise."""
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
    """An opener that does not wait for the other end of a FIFO or take over a terminal."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def read_file(path: Path, where: str, bytes_max: int, folder: Path | None = None) -> bytes:
    """The content of a file that `opened` accepts."""
    with opened(path, where, bytes_max, folder) as handle, reading_errors(where):
        return handle.read(os.fstat(handle.fileno()).st_size)


@contextmanager
def reading_errors(where: str) -> Iterator[None]:
    """Turn errors of the file system into `UserError`."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def is_inside(path: Path, folder: Path) -> bool:
    """True if a path, with links followed, is inside a folder. False for an impossible path."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except (OSError, ValueError):
        return False


def file_name(text: str, what: str) -> str:
    """`text`, if it can name a file. Raises `UserError` for paths, hidden names and characters special to shells."""
    if not FILE_NAME.fullmatch(text):
        raise UserError(
            f"{what} {text[:80]!r} cannot name a file: it must be at most 200 letters, digits and . _ + -, and not "
            "begin with a dot"
        )
    return text


# Paths as text


def display_path(path: str | Path) -> str:
    """A path for messages: relative to the checkout or the current directory if inside, else unchanged."""
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
    """True if a portable path is outside the checkout, so that commands cannot name it."""
    return Path(portable).parts[:1] == (ELSEWHERE,)


def redact_paths(text: str) -> str:
    """Cut every absolute path to its last part, for records without folder, host or user names."""
    return ABSOLUTE_PATH.sub(".../", text.replace(f"{CHECKOUT}/", ""))


def printable(name: str) -> str:
    """A file name with bytes that are not UTF-8 written as \\xff, since records and documents are text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
