"""Standard streams that cannot end the work: what they cannot write is dropped.

The reader of a pipe may leave, a terminal close, the disk under a log fill up, a word not fit the stream's encoding,
or the stream be closed from the start. Progress is a convenience: training goes on and saves all the same.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class LossyFile(io.FileIO):
    """A file whose `write` never fails; `failure` is the last error that it kept to itself."""

    failure: OSError | None = None

    def write(self, content: ReadableBuffer) -> int:
        """Write what can be written; returns the number of bytes that the caller is rid of."""
        try:
            written = super().write(content)
        except OSError as error:
            self.failure = error
            written = None
        return memoryview(content).nbytes if written is None else written  # None: a full pipe that does not block


def protect_streams() -> None:
    """Put lossy streams in place of this process's own; those that a caller has redirected stay.

    A stream that was closed from the start becomes os.devnull, for child processes too: the next file that is opened
    would get its descriptor, and whatever a library prints.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number: this one
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if sys.stdout is sys.__stdout__:
        sys.stdout = _lossy(sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lossy(sys.stderr)


def _lossy(stream: TextIO | None) -> TextIO:
    file = LossyFile(os.devnull, "w") if stream is None else LossyFile(stream.fileno(), "w", closefd=False)
    encoding = "utf-8" if stream is None else stream.encoding
    return io.TextIOWrapper(io.BufferedWriter(file), encoding, "backslashreplace", line_buffering=True)


def output_failure() -> OSError | None:
    """Why not all that was printed to a protected `sys.stdout` has arrived."""
    sys.stdout.flush()
    file = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return file.failure if isinstance(file, LossyFile) else None
