"""The part of a JPEG that a crop looks at, as a smaller JPEG of its own.

At a restart marker a decoder starts afresh: what follows does not depend on what came before. So a picture that they
divide can be cut by slicing its bytes: those intervals that hold the crop and what upsampling of colour looks at
beside it, with the size in the header and the markers' numbers made to fit. The pixels stay the same to the last bit.
Where anything is not as it should be (markers that are missing, too many or out of turn) there is no such part.
This runs once an image: it makes few, plain steps.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recipe.data.jpeg import BLOCK_PIXELS, CONTEXT_PIXELS, END, SIZE_AT, Header

FIRST_MARKER, MARKERS = 0xD0, 8  # they count from 0 to 7, over and over
MARKER_BYTES = 2
COLUMN_PIXELS = 64  # between two markers of a re-encoded image, at most: 1.8 % more bytes; see benchmarks/README.md
COUNTS_KEPT = 256  # numbers of intervals whose markers are remembered: as many as there are shapes of pictures


class Excerpt(NamedTuple):
    """A JPEG that shows a part of another one."""

    content: bytearray
    top: int  # where the part begins, in pixels of the whole
    left: int


def excerpt(content: bytes, header: Header, top: int, left: int, height: int, width: int) -> Excerpt | None:
    """The smallest JPEG between restart markers that has this part of the picture; None where that is none or all."""
    if header.unit is None or header.restart_interval == 0 or (grid := grid_of(header)) is None:
        return None
    first_row, last_row = intervals(top, height, header.height, grid[0])
    first_column, last_column = intervals(left, width, header.width, grid[1])
    top, left = first_row * grid[0], first_column * grid[1]
    size = min(last_row * grid[0], header.height) - top, min(last_column * grid[1], header.width) - left
    if size == (header.height, header.width):
        return None
    across, down = -(-header.width // grid[1]), -(-header.height // grid[0])
    begins = interval_begins(content, header.scan, down * across)
    if begins is None:
        return None
    numbered = bytearray(content)
    numbered[header.frame + SIZE_AT : header.frame + SIZE_AT + 4] = size[0].to_bytes(2) + size[1].to_bytes(2)
    behind = begins.reshape(down, across)[first_row:last_row, first_column:last_column].ravel()  # each kept interval
    np.frombuffer(numbered, np.uint8)[behind - 1] = markers_of(len(behind))[1]
    rows = [(row * across + first_column, row * across + last_column) for row in range(first_row, last_row)]
    return Excerpt(joined(numbered, header.scan, begins, rows), top, left)


def grid_of(header: Header) -> tuple[int, int] | None:
    """Height and width in pixels of the picture's part between two markers; None where those are no rectangles."""
    assert header.unit is not None, "a picture whose units do not simply follow one another is not divided"
    height, width = header.unit
    across, units = -(-header.width // width), header.restart_interval
    if units % across == 0:
        return height * (units // across), header.width
    return (height, width * units) if across % units == 0 else None


def intervals(start: int, size: int, end: int, pixels: int) -> tuple[int, int]:
    """The first interval and the last (not included) that hold these pixels with their context, in one direction.

    libjpeg upsamples colour in another way where it is at most two samples wide, so no part is as narrow as that.
    """
    first = max(0, min(start - CONTEXT_PIXELS, end - BLOCK_PIXELS)) // pixels
    return first, -(-min(start + size + CONTEXT_PIXELS, end) // pixels)


def interval_begins(content: bytes, scan: int, count: int) -> NDArray[np.int64] | None:
    """Where the byte behind the marker of each interval is; None where the markers are not those of so many."""
    if scan >= len(content):
        return None
    data = np.frombuffer(content, np.uint8, offset=scan)
    found = (data[:-1] == 0xFF).nonzero()[0]
    kinds = data[found + 1]
    markers = kinds.nonzero()[0][:count]  # 0xFF in the pixels themselves is followed by 0
    if len(markers) < count or kinds[markers].tobytes() != markers_of(count)[0]:
        return None
    begins: NDArray[np.int64] = found[markers] + (scan + MARKER_BYTES)
    return begins


@lru_cache(COUNTS_KEPT)
def markers_of(count: int) -> tuple[bytes, NDArray[np.uint8]]:
    """The markers behind so many intervals, without their first byte, which is always 0xFF."""
    numbers = bytes(FIRST_MARKER + number for number in range(MARKERS)) * (count // MARKERS + 1)
    markers = numbers[: count - 1] + bytes([END])
    return markers, np.frombuffer(markers, np.uint8)


def joined(content: bytearray, scan: int, begins: NDArray[np.int64], rows: list[tuple[int, int]]) -> bytearray:
    """What is before the pixels and these rows of intervals, of which each is one slice."""
    pixels, edges = memoryview(content), [scan, *begins.tolist()]
    return bytearray().join([pixels[:scan], *[pixels[edges[first] : edges[last]] for first, last in rows]])


def interval_for(width: int, unit_pixels: int) -> int:
    """Units between two markers, for a picture to be cut well: a divisor of those in a row, so that columns align."""
    across = -(-width // unit_pixels)
    return max(units for units in range(1, COLUMN_PIXELS // unit_pixels + 1) if across % units == 0)
