"""Watchdog: writes the stacks of all processes when one of them hangs.

A hung rank cannot report itself: it may be stuck in C code while the others block in a collective. So each process sets
an alarm at every step and every batch of validation. If none follows for most of `trainer.timeout_seconds`, Python's
own C thread writes the stack of every thread to `hang/rank-<rank>.txt` in the run directory, without the GIL. A little
later the collective times out in the processes that wait, and their error names these files.

These files are the only ones that processes other than rank 0 write. On another node they go to its own file system if
that is not shared.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

from recipe.distributed import World
from recipe.errors import HangError, UserError, how_to_continue
from recipe.run.directory import Run
from recipe.run.files import display_path

ALARM_SHARE = 0.8  # of the time-out: early enough to be written before the waiting processes end
RESET_SHARE = 0.05  # of the time-out between two resets: setting an alarm starts a thread, 0.15 ms
T = TypeVar("T")


class Watchdog:
    """The alarm of this process, as a context manager. Off if it is the only process.

    Raises `HangError` in place of the error of a process that waited for a hung one.
    """

    def __init__(self, world: World, run: Run, timeout_seconds: float) -> None:
        self.is_on = world.size > 1
        self.timeout_seconds = timeout_seconds
        self.path = run.hangs / f"rank-{world.rank}.txt"
        self.set_at = float("-inf")
        self.file: IO[Any] | None = _opened(self.path) if self.is_on else None
        self.kept_bytes = self._bytes()  # stacks of earlier sessions stay

    def __enter__(self) -> Self:
        self.progressed()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        has_hung = self.has_fired and isinstance(error, Exception) and not isinstance(error, UserError)
        self.close(is_clean=error is None or isinstance(error, SystemExit))  # all processes exit together
        if has_hung:
            raise HangError(
                f"a process did not answer for trainer.timeout_seconds={self.timeout_seconds:g}; all stacks are in "
                f"{display_path(self.path.parent)}/rank-*.txt; {how_to_continue()}"
            ) from error

    def progressed(self) -> None:
        """Reset the alarm after a step or a batch."""
        now = time.monotonic()
        if self.is_on and now - self.set_at >= RESET_SHARE * self.timeout_seconds:
            self._drop_stacks()  # it was slow, but it did not hang
            self.set_at = now
            faulthandler.dump_traceback_later(ALARM_SHARE * self.timeout_seconds, file=self.file or sys.stderr)

    def watched(self, items: Iterable[T]) -> Iterator[T]:
        for item in items:
            yield item
            self.progressed()

    @property
    def has_fired(self) -> bool:
        """Whether a stack was written since the last progress."""
        return self._bytes() > self.kept_bytes

    def close(self, is_clean: bool) -> None:
        """Cancel the alarm. A clean end drops the stacks of this session and removes an empty file."""
        faulthandler.cancel_dump_traceback_later()
        if self.file is None:
            return
        if is_clean:
            self._drop_stacks()
        is_empty = self._bytes() == 0
        self.file.close()
        if is_empty:
            with suppress(OSError):  # other files are still there, or the run directory is gone
                self.path.unlink(missing_ok=True)
                self.path.parent.rmdir()

    def _bytes(self) -> int:
        return os.fstat(self.file.fileno()).st_size if self.file is not None else 0

    def _drop_stacks(self) -> None:
        if self.file is not None and self.has_fired:
            os.ftruncate(self.file.fileno(), self.kept_bytes)


def _opened(path: Path) -> IO[Any] | None:
    """Open for appending. None, which stands for the terminal, if this process cannot write there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab")
    except OSError as error:
        print(
            f"warning: stacks of a hang will go to the terminal: {display_path(path)}: {error.strerror}",
            file=sys.stderr,
        )
        return None
