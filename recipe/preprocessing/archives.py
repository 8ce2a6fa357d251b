"""Untrusted archives: members are listed and read in place, never unpacked by name.

A tar can have links, devices, names outside of its folder, and two members of one name. Only regular members with names
of ILSVRC2012 are accepted. Others raise `UserError` with their name. Each image is listed with the offset and size of
its bytes, so that worker processes read with `os.pread` without parsing the tar.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from recipe.errors import UserError
from recipe.preprocessing import imagenet
from recipe.preprocessing.listing import belongs_to_system
from recipe.run.files import display_path, write_atomically
from recipe.run.progress import ProgressPrinter
from recipe.run.records import Archive

MEMBER_BYTES_MAX = 20_000_000  # the largest image of ILSVRC2012 has about 16 MB
CLASS_TAR_BYTES_MAX = 1_000_000_000  # the largest one has about 0.25 GB
DEVKIT_BYTES_MAX = 200_000_000  # unpacked, in memory. The real one has 3 MB
CHUNK_BYTES = 1 << 22
CLASS_TAR = re.compile(r"^(n\d{8})\.tar$", re.ASCII)
TRAIN_IMAGE = re.compile(r"^(n\d{8}_\d+)\.JPEG$", re.ASCII)
VALIDATION_IMAGE = re.compile(r"^(ILSVRC2012_val_\d{8})\.JPEG$", re.ASCII)
DEVKIT_FILES = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")


class Member(NamedTuple):
    """A regular member: the matched part of its name, and the place of its bytes in the file."""

    name: str
    offset: int
    size: int


def class_tars(handle: IO[bytes], where: str) -> list[Member]:
    """The class tars inside the training tar, sorted by WNID."""
    return sorted(members(handle, CLASS_TAR, CLASS_TAR_BYTES_MAX, where))


def members(handle: IO[bytes], pattern: re.Pattern[str], bytes_max: int, where: str) -> Iterator[Member]:
    """The regular members of the tar at the handle's position. Raises `UserError` for other names than `pattern`.

    Files of an operating system are skipped: a Mac's tar has `._name` before each file.
    """
    seen: set[str] = set()
    for member in tar_headers(handle, where):
        if any(map(belongs_to_system, member.name.split("/"))):
            continue
        matched = pattern.fullmatch(member.name)
        what = f"the member {member.name!r} of {where}"
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            raise UserError(f"{what} is not a regular file (a link, folder or device); refusing to read this archive")
        if matched is None:
            raise UserError(f"{what} is not named {pattern.pattern}; refusing to read this archive")
        if not 0 <= member.size <= bytes_max:
            raise UserError(f"{what} has {member.size} bytes, more than the {bytes_max} that are allowed")
        if matched[1] in seen:
            raise UserError(f"{what} occurs twice; refusing to read this archive")
        seen.add(matched[1])
        yield Member(matched[1], member.offset_data, member.size)


def tar_headers(handle: IO[bytes], where: str) -> Iterator[tarfile.TarInfo]:
    """All headers in order. Raises `UserError` for a damaged or cut archive."""
    try:
        archive = tarfile.TarFile(fileobj=handle)
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps every header: memory would grow with the archive
            yield member
        handle.seek(archive.offset)
        if handle.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            # for tarfile a damaged header or a cut between two members is the end
            raise tarfile.ReadError(f"no end-of-archive block at byte {archive.offset}")
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where} is not a complete tar archive ({error}); copy or download it again") from error


def devkit_files(raw_dir: Path) -> tuple[bytes, bytes]:
    """The contents of meta.mat and of the validation ground truth, from the devkit's archive or extracted folder."""
    archive, folder = raw_dir / imagenet.DEVKIT_ARCHIVE, raw_dir / imagenet.DEVKIT_FOLDER
    if archive.is_file():
        files = devkit_members(archive)
    else:
        files = {name: (folder / name).read_bytes() for name in DEVKIT_FILES if (folder / name).is_file()}
    missing = [name for name in DEVKIT_FILES if name not in files]
    if missing:
        raise UserError(
            f"the devkit is needed for the labels of the validation images, but {missing[0]} was found neither in "
            f"{imagenet.DEVKIT_ARCHIVE} nor in {imagenet.DEVKIT_FOLDER}/ in {display_path(raw_dir)}; "
            f"{imagenet.WHERE_TO_GET}"
        )
    return files[DEVKIT_FILES[0]], files[DEVKIT_FILES[1]]


def devkit_members(path: Path) -> dict[str, bytes]:
    """The two required files of the devkit, unpacked in memory."""
    where = display_path(path)
    try:
        with gzip.open(path) as packed:
            content = packed.read(DEVKIT_BYTES_MAX + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{where} is not a complete .tar.gz archive ({error}); copy or download it again") from error
    if len(content) > DEVKIT_BYTES_MAX:
        raise UserError(f"{where} unpacks to more than {DEVKIT_BYTES_MAX} bytes; this is not the ILSVRC2012 devkit")
    wanted = {f"{imagenet.DEVKIT_FOLDER}/{name}": name for name in DEVKIT_FILES}
    files: dict[str, bytes] = {}
    for member in tar_headers(io.BytesIO(content), where):
        name = wanted.get(member.name.removeprefix("./"))
        if name is not None and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse():
            files[name] = content[member.offset_data : member.offset_data + member.size]
    return files


def digests(paths: Sequence[Path], published_md5: Mapping[str, str], cache: Path) -> list[Archive]:
    """Size, md5 and sha256 of each archive. Stored in `cache` by name, size and time of change."""
    known: dict[str, tuple[str, str]] = json.loads(cache.read_bytes()) if cache.exists() else {}
    unread = sum(path.stat().st_size for path in paths if file_stamp(path) not in known)
    with ProgressPrinter("reading archives for their md5 and sha256", unread, "B", scale=1024) as progress:
        for path in paths:
            if file_stamp(path) not in known:
                known[file_stamp(path)] = md5_and_sha256(path, progress.add)
                write_atomically(cache, json.dumps(known, indent=1).encode())
    return [as_record(path, *known[file_stamp(path)], published_md5.get(path.name)) for path in paths]


def file_stamp(path: Path) -> str:
    """A key of a file's content: it changes when the file is written."""
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


def md5_and_sha256(path: Path, report: Callable[[int], None]) -> tuple[str, str]:
    """Both digests in one pass."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK_BYTES):
            md5.update(chunk)
            sha256.update(chunk)
            report(len(chunk))
    return md5.hexdigest(), sha256.hexdigest()


def as_record(path: Path, md5: str, sha256: str, published: str | None) -> Archive:
    """The entry of an archive in the record."""
    is_published = None if published is None else md5 == published
    return Archive(name=path.name, bytes=path.stat().st_size, md5=md5, sha256=sha256, is_published_md5=is_published)
