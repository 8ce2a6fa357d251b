"""What stands in a JPEG before its pixels: found in the bytes, without a decoder.

TorchCodec applies the orientation of EXIF and cannot be told not to, so those segments are left out; the pixels stay
the same. And it decodes whole images only. But where a picture ends is what its header says: with a smaller height
there, a decoder stops early, and every row that a crop looks at stays the same to the last bit. Where restart markers
divide the picture, more can be left out: `recipe.data.restarts`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

JPEG_START, EXIF_SEGMENT, EXIF = b"\xff\xd8", 0xE1, b"Exif\x00\x00"
MARKER_AND_LENGTH, HEIGHT_AND_WIDTH = struct.Struct(">BBH"), struct.Struct(">HH")
SCAN, END, FILL = 0xDA, 0xD9, 0xFF
WITHOUT_LENGTH = frozenset((0x00, 0x01, *range(0xD0, 0xD8)))  # stuffing, TEM, restart markers: no segment follows
SEQUENTIAL_FRAMES = (0xC0, 0xC1)  # baseline and extended, Huffman: rows of blocks one after the other
FRAMES = frozenset((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
RESTART_INTERVAL = 0xDD
SIZE_AT = 5  # bytes behind the frame segment's first: height, then width, two bytes each
BLOCK_PIXELS = 8
KINDS_KEPT = 64  # of sampling factors: nearly all pictures have the same few
CONTEXT_PIXELS = 2  # that upsampling looks at beside a pixel, when colour is stored at half the height or width

Content = bytes | bytearray  # a decoder takes over what can be written to, and copies what cannot


class Header(NamedTuple):
    """What the segments before the pixels say."""

    frame: int  # where the segment that holds the size begins, bytes
    height: int
    width: int
    unit: tuple[int, int] | None  # rows and columns stored together; None where units do not simply follow one another
    scan: int  # where the pixels begin, bytes
    restart_interval: int  # units between two restart markers; 0: there are none


def read_header(content: bytes) -> Header | None:
    """The size of a JPEG and how its pixels are stored; None where it cannot be told."""
    frame = height = width = interval = 0
    sampling = b""
    for marker, start, end in header_segments(content):
        if marker in FRAMES and not frame and end - start >= 10 and end <= len(content):
            frame = start
            height, width = HEIGHT_AND_WIDTH.unpack_from(content, start + SIZE_AT)
            sampling = content[start + 11 : end : 3] if marker in SEQUENTIAL_FRAMES else b""
        elif marker == RESTART_INTERVAL:
            interval = int.from_bytes(content[start + 4 : end])
        elif marker == SCAN and frame and height and width:
            together = content[start + 4 : start + 5] == content[frame + 9 : frame + 10]  # all colours in this scan
            return Header(frame, height, width, unit_pixels(sampling) if together else None, end, interval)
    return None


@lru_cache(KINDS_KEPT)
def unit_pixels(sampling: bytes) -> tuple[int, int] | None:
    """Rows and columns of pixels that are stored together, by the sampling factors of each colour."""
    if len(sampling) == 1:  # one colour alone: its blocks simply follow one another, whatever its factors
        return BLOCK_PIXELS, BLOCK_PIXELS
    down = max((factors & 15 for factors in sampling), default=0)
    across = max((factors >> 4 for factors in sampling), default=0)
    return (down * BLOCK_PIXELS, across * BLOCK_PIXELS) if down and across else None


def upper_rows(content: bytes, header: Header, bottom: int) -> Content:
    """A JPEG of which a decoder decodes little more than the rows above `bottom`, with the same pixels there.

    The height in the header says how far a decoder goes; the rows of blocks that nobody needs are left in the file and
    skipped. Two rows more are kept, since upsampling of colour looks at its neighbours.
    """
    if header.unit is None:
        return content
    rows = header.unit[0]
    height = -(-(bottom + CONTEXT_PIXELS) // rows) * rows
    if height >= header.height:
        return content
    cut = bytearray(content)
    at = header.frame + SIZE_AT
    cut[at : at + 2] = height.to_bytes(2)
    return cut


def without_exif(content: Content) -> Content:
    """A JPEG without its EXIF segments (ITU T.81, annex B: a marker, then a big-endian length that counts itself)."""
    segments = [segment[1:] for segment in header_segments(content) if segment[0] == EXIF_SEGMENT]
    return left_out(content, [(start, end) for start, end in segments if content[start + 4 : start + 10] == EXIF])


def left_out(content: Content, spans: list[tuple[int, int]]) -> Content:
    """The bytes without those spans."""
    if not spans:
        return content
    kept, copied = [], 0
    for start, end in spans:
        kept.append(content[copied:start])
        copied = end
    return b"".join([*kept, content[copied:]])


def header_segments(content: Content) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment up to the first scan's own, found as libjpeg's next_marker() does.

    It skips whatever stands between two segments (stray bytes, restart markers, fill bytes), so they hide no EXIF.
    """
    position, end_of_content = len(JPEG_START), len(content)
    while position + 4 <= end_of_content:
        first, marker, length = MARKER_AND_LENGTH.unpack_from(content, position)
        if first != 0xFF:
            position = content.find(b"\xff", position)
            if position < 0:
                return
            continue
        if marker == END:
            return
        if marker == FILL or marker in WITHOUT_LENGTH:
            position += 1 if marker == FILL else 2
            continue
        yield marker, position, position + 2 + length
        if marker == SCAN:
            return
        position += 2 + length
