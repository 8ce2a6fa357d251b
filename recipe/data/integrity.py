"""Damage of JPEG and PNG files that decoders do not report: missing pixels.

libjpeg fills in missing pixels and only warns. Pillow drops the warnings, and does not count the rows of a PNG.
simplejpeg reports only the first of libjpeg-turbo's warnings. So causes of harmless warnings are removed from the
bytes, in memory, until there is a warning that costs pixels or none. Changed bits that decode to other pixels, and
pixels lost before the file was written, are not detectable.
"""

from __future__ import annotations

import re
import struct
import zlib
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

STRAY = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
HARMLESS = {  # warnings of libjpeg (JWRN_* of its jerror.h) that cost no pixel, if they are the only ones
    "extraneous bytes before marker": "stray bytes in a JPEG",
    "Unknown Adobe color transform code": "unknown Adobe code in a JPEG",
    "unknown JFIF revision number": "unknown JFIF version in a JPEG",
    "Invalid SOS parameters for sequential JPEG": "unusual scan parameters in a JPEG",
    "bad ICC marker": "damaged colour profile in a JPEG",
    "Premature end of JPEG file": "JPEG without an end marker",
}
ZEROS_MAX = 16  # stray bytes that may be padding. More replace missing data
STRAY_PLACES_MAX = 20  # each costs a few times the decoding of the image
START, END = b"\xff\xd8", b"\xff\xd9"
SOS, EOI, DHT = 0xDA, 0xD9, 0xC4
SEQUENTIAL, PROGRESSIVE = (0xC0, 0xC1, 0xC9), (0xC2, 0xCA)
RESTARTS = range(0xD0, 0xD8)
WITHOUT_LENGTH = (0x01, 0xD8, EOI, *RESTARTS)
DESCRIBING = (*range(0xE0, 0xF0), 0xFE)  # APPn and comments
COEFFICIENTS = 64  # of a block
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
INFLATED_AT_ONCE = 1 << 20  # bytes


class Flaw(NamedTuple):
    """The damage of a file."""

    what: str
    loses_pixels: bool


class Segment(NamedTuple):
    """A marker of a JPEG and its parameters, as positions in the file."""

    marker: int
    start: int
    end: int


# ---- JPEG -------------------------------------------------------------------------------------------


def jpeg_flaw(content: bytes) -> Flaw | None:
    """The worst warning of libjpeg-turbo. Raises `ValueError` for an unsupported kind of JPEG."""
    warning = warning_of(content)
    if warning is None:
        return None if has_all_scans(content) else Flaw("it is truncated (its last scans are missing)", True)
    harmless = next((what for sign, what in HARMLESS.items() if sign in warning), None)
    if harmless is not None:
        content = bare(content)
        for _ in range(STRAY_PLACES_MAX):
            warning = warning_of(content)
            if warning is None or not STRAY.search(warning):
                break
            start, end = stray_bytes(content, warning)
            if end - start > ZEROS_MAX and not any(content[start:end]):
                return pixel_loss("zeros in the place of its end")  # a download cut short in a preallocated file
            content = content[:start] + content[end:]
        if warning is None and has_all_scans(content):
            return Flaw(harmless, False)
        if STRAY.search(warning or ""):
            return pixel_loss(f"stray bytes in more than {STRAY_PLACES_MAX} places")
    decode(content, strict=False)
    return pixel_loss(warning or "its last scans are missing")


def pixel_loss(warning: str) -> Flaw:
    """The flaw for a warning that costs pixels."""
    what = warning.removeprefix("Corrupt JPEG data: ")
    is_end = "premature end" in what.lower() or "missing" in what
    return Flaw(f"it is truncated ({what})" if is_end else f"its data are damaged ({what})", True)


def warning_of(content: bytes) -> str | None:
    """The first warning or the error of libjpeg-turbo. None for a clean image."""
    try:
        decode(content, strict=True)
    except ValueError as error:
        return str(error)
    return None


def clean_pixels(content: bytes, colours: str) -> NDArray[np.uint8] | None:
    """All pixels, uint8 [H, W, 3] or, of GRAY, [H, W, 1]. None for a JPEG with any warning."""
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, colours, strict=True)
    except ValueError:
        return None
    return pixels if has_all_scans(content) else None


def decode(content: bytes, strict: bool) -> None:
    """Decode every coefficient of every component, to an eighth of the size. The rest of decoding cannot fail."""
    simplejpeg.decode_jpeg(content, "GRAY", min_height=1, min_width=1, min_factor=8, strict=strict)


def segments(content: bytes) -> Iterator[Segment]:
    """The markers of a JPEG in order, scans of coefficients between them, up to the end marker."""
    position = 0
    while (start := next_marker(content, position)) is not None:
        marker, end = content[start + 1], start + 2
        if marker not in WITHOUT_LENGTH:
            end += int.from_bytes(content[end : end + 2])
        yield Segment(marker, start, end)
        if marker == EOI:
            return
        position = end


def next_marker(content: bytes, position: int) -> int | None:
    """The position of the next marker. In a scan 0xFF may also be followed by 0 or a restart marker."""
    while 0 <= (position := content.find(b"\xff", position)) < len(content) - 1:
        following = content[position + 1]
        if following not in (0x00, 0xFF, *RESTARTS):
            return position
        position += 1 if following == 0xFF else 2
    return None


def bare(content: bytes) -> bytes:
    """The JPEG without metadata and bytes between segments, with an end marker."""
    parts, end, is_scan, is_sequential = [], 0, False, False
    for segment in segments(content):
        if is_scan:
            parts.append(content[end : segment.start])
        body = content[segment.start : segment.end]
        is_scan, end = segment.marker == SOS, segment.end
        is_sequential = is_sequential or segment.marker in SEQUENTIAL
        if is_scan and is_sequential:
            body = body[:-3] + bytes([0, COEFFICIENTS - 1, 0])
        if segment.marker not in (*DESCRIBING, EOI):
            parts.append(body)
    if is_scan:
        parts.append(content[end:])
    return b"".join(parts) + END


def stray_bytes(content: bytes, warning: str) -> tuple[int, int]:
    """Start and end of the stray bytes of the first warning of a JPEG. (0, 0) if not found.

    The warning names the marker after them, which may occur often. The right one is the first up to which the file has
    to be read for this warning.
    """
    match = STRAY.search(warning)
    assert match is not None
    count, marker = int(match[1]), int(match[2], 16)
    places = [match.start() for match in re.finditer(re.escape(bytes([0xFF, marker])), content)]

    def warns(place: int) -> bool:
        end = place + 2
        if marker not in WITHOUT_LENGTH:
            end += int.from_bytes(content[end : end + 2])
        return warning_of(content[:end] + END) == warning

    number = bisect_left(places, True, key=warns)
    if number == len(places):
        return 0, 0
    return places[number] - count, places[number]


def has_all_scans(content: bytes) -> bool:
    """True if each coefficient of each component has its last bit. libjpeg does not warn of missing scans."""
    unsent: dict[int, list[int]] = {}  # component -> lowest missing bit of each coefficient
    is_progressive = False
    for segment in segments(content):
        body = content[segment.start + 4 : segment.end]
        if segment.marker in (*SEQUENTIAL, *PROGRESSIVE):
            is_progressive = segment.marker in PROGRESSIVE
            unsent = {body[6 + 3 * number]: [1] * COEFFICIENTS for number in range(body[5])}
        elif segment.marker == SOS:
            first, last, bits = body[-3:] if is_progressive else (0, COEFFICIENTS - 1, 0)
            for number in range(body[0]):
                if (lowest := unsent.get(body[1 + 2 * number])) is not None:
                    lowest[first : last + 1] = [bits & 0x0F] * (last + 1 - first)
            if not any(map(any, unsent.values())):
                return True
    return not unsent  # other kinds of frames are not checked


# ---- PNG --------------------------------------------------------------------------------------------


def png_flaw(content: bytes) -> Flaw | None:
    """A wrong checksum of a critical chunk, missing rows, or a missing end."""
    position, inflate, rows, wanted = len(PNG_START), zlib.decompressobj(), 0, 0
    while True:
        if position + 12 > len(content):
            return Flaw("it is truncated (it has no IEND chunk)", True)
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        if end > len(content):
            return Flaw(f"it is truncated (inside its {kind.decode('latin-1')} chunk)", True)
        is_critical = not kind[0] & 0x20
        if is_critical and zlib.crc32(content[position + 4 : end - 4]) != int.from_bytes(content[end - 4 : end]):
            return Flaw(f"the checksum of its {kind.decode('latin-1')} chunk is wrong", True)
        body = content[position + 8 : end - 4]
        if kind == b"IHDR":
            wanted = bytes_of_rows(body)
        elif kind == b"IDAT" and rows <= wanted:  # further rows are not shown, and could be endless
            try:
                rows += inflated_bytes(inflate, body)
            except zlib.error as error:
                return Flaw(f"its data are damaged ({str(error).rpartition(': ')[2]})", True)
        elif kind == b"IEND":
            return None if rows >= wanted else Flaw(f"it is truncated ({rows} of {wanted} bytes of its rows)", True)
        position = end


def bytes_of_rows(header: bytes) -> int:
    """Bytes of the rows of a PNG before compression, each with the byte of its filter."""
    width, height, depth, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    total = 0
    for left, top, across, down in passes:
        columns, lines = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and lines > 0:
            total += lines * (1 + (columns * depth * PNG_CHANNELS[colour_type] + 7) // 8)
    return total


def inflated_bytes(inflate: zlib._Decompress, packed: bytes) -> int:
    """The number of bytes after decompression, with few in memory at a time."""
    total = 0
    while packed and not inflate.eof:
        total += len(inflate.decompress(packed, INFLATED_AT_ONCE))
        packed = inflate.unconsumed_tail
    return total
