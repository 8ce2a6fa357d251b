"""What stands in a JPEG before its pixels: found in the bytes, without a decoder.

TorchCodec applies the orientation of EXIF and cannot be told not to, so those segments are left out; the pixels stay
the same. And it decodes whole images only. But where a picture ends is what its header says: with a smaller height
there, a decoder stops early, and every row that a crop looks at stays the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

JPEG_START, EXIF_SEGMENT = b"\xff\xd8", 0xE1
SCAN, END, FILL = 0xDA, 0xD9, 0xFF
WITHOUT_LENGTH = (0x00, 0x01, *range(0xD0, 0xD8))  # stuffing, TEM, restart markers: no segment follows
SEQUENTIAL_FRAMES = (0xC0, 0xC1)  # baseline and extended, Huffman: rows of blocks one after the other
FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
HEIGHT_AT = 5  # bytes behind the frame segment's first
BLOCK_PIXELS = 8
CONTEXT_ROWS = 2  # that upsampling looks at below a row, when colour is stored at half the height


class Header(NamedTuple):
    """What the segments before the pixels say."""

    frame: int  # where the segment that holds the size begins, bytes
    height: int
    width: int
    rows_per_unit: int | None  # pixel rows that are stored together; None where rows do not simply follow one another


def read_header(content: bytes) -> Header | None:
    """The size of a JPEG and how its rows are stored; None where it cannot be told."""
    frame = colours = units = 0
    height = width = 0
    for marker, start, end in header_segments(content):
        if marker in FRAMES and not frame and end - start >= 10 and end <= len(content):
            frame, colours = start, content[start + 9]
            height, width = (int.from_bytes(content[start + at : start + at + 2]) for at in (5, 7))
            sampling = content[start + 11 : end : 3] if marker in SEQUENTIAL_FRAMES else b""
            units = max((factors & 15 for factors in sampling), default=0)
        if marker == SCAN and frame and height and width:
            together = units > 0 and content[start + 4 : start + 5] == bytes([colours])
            return Header(frame, height, width, units * BLOCK_PIXELS if together else None)
    return None


def upper_rows(content: bytes, header: Header, bottom: int) -> bytes:
    """A JPEG of which a decoder decodes little more than the rows above `bottom`, with the same pixels there.

    The height in the header says how far a decoder goes; the rows of blocks that nobody needs are left in the file and
    skipped. Two rows more are kept, since upsampling of colour looks at its neighbours.
    """
    if header.rows_per_unit is None:
        return content
    height = -(-(bottom + CONTEXT_ROWS) // header.rows_per_unit) * header.rows_per_unit
    if height >= header.height:
        return content
    at = header.frame + HEIGHT_AT
    return content[:at] + height.to_bytes(2) + content[at + 2 :]


def without_exif(content: bytes) -> bytes:
    """A JPEG without its EXIF segments (ITU T.81, annex B: a marker, then a big-endian length that counts itself)."""
    return left_out(content, [segment[1:] for segment in header_segments(content) if is_exif(content, *segment)])


def is_exif(content: bytes, marker: int, start: int, end: int) -> bool:
    """Whether a segment is EXIF."""
    return marker == EXIF_SEGMENT and content[start + 4 : start + 10] == b"Exif\x00\x00"


def left_out(content: bytes, spans: list[tuple[int, int]]) -> bytes:
    """The bytes without those spans."""
    if not spans:
        return content
    kept, copied = [], 0
    for start, end in spans:
        kept.append(content[copied:start])
        copied = end
    return b"".join([*kept, content[copied:]])


def header_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment up to the first scan's own, found as libjpeg's next_marker() does.

    It skips whatever stands between two segments (stray bytes, restart markers, fill bytes), so they hide no EXIF.
    """
    position = len(JPEG_START)
    while (position := content.find(b"\xff", position)) >= 0 and position + 4 <= len(content):
        marker = content[position + 1]
        if marker == END:
            return
        if marker == FILL or marker in WITHOUT_LENGTH:
            position += 1 if marker == FILL else 2
            continue
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4])
        yield marker, position, end
        if marker == SCAN:
            return
        position = end
