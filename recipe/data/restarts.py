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

from recipe.data.jpeg import BLOCK_PIXELS, CONTEXT_PIXELS, END, SIZE_AT, Header

NUMBERS = bytes(range(0xD0, 0xD8))  # second bytes of the markers, over and over
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
    edges = interval_edges(content, header.scan, down * across)
    if edges is None:
        return None
    at = header.frame + SIZE_AT
    head = b"".join((content[:at], size[0].to_bytes(2), size[1].to_bytes(2), content[at + 4 : header.scan]))
    rows = [edges[row * across + first_column : row * across + last_column + 1] for row in range(first_row, last_row)]
    return Excerpt(joined(content, head, rows), top, left)


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


def interval_edges(content: bytes, scan: int, count: int) -> list[int] | None:
    """Where the first interval begins and each one ends, its marker included; None where markers are not of so many."""
    if scan >= len(content):
        return None
    data = np.frombuffer(content, np.uint8, offset=scan)
    found = (data[:-1] == 0xFF).nonzero()[0]
    kinds = data[found + 1]
    markers = kinds.nonzero()[0][:count]  # 0xFF in the pixels themselves is followed by 0
    if len(markers) < count or kinds[markers].tobytes() != numbers_of(count):
        return None
    return [scan, *(found[markers] + (scan + MARKER_BYTES)).tolist()]


@lru_cache(COUNTS_KEPT)
def numbers_of(count: int) -> bytes:
    """The second bytes of the markers behind so many intervals; the first is always 0xFF."""
    return (NUMBERS * (count // len(NUMBERS) + 1))[: count - 1] + bytes([END])


def joined(content: bytes, head: bytes, rows: list[list[int]]) -> bytearray:
    """A JPEG of these rows of intervals, given by their edges; of each row, one slice."""
    pixels = memoryview(content)
    part = bytearray().join([head, *[pixels[edges[0] : edges[-1]] for edges in rows]])
    position, numbers = len(head) - 1, iter(numbers_of(len(rows) * (len(rows[0]) - 1)))
    for edges in rows:
        shift = position - edges[0]
        for edge in edges[1:]:
            part[edge + shift] = next(numbers)
        position = edges[-1] + shift
    return part


def interval_for(width: int, unit_pixels: int) -> int:
    """Units between two markers, for a picture to be cut well: a divisor of those in a row, so that columns align."""
    across = -(-width // unit_pixels)
    return max(units for units in range(1, COLUMN_PIXELS // unit_pixels + 1) if across % units == 0)
