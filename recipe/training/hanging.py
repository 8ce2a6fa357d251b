"""A process that hangs: where each process stood goes to the run directory before the others give up on it.

In a hang nobody can be asked: the process that hangs does not run Python, and those that wait for it wait inside a
collective operation. So each process sets an alarm at every step and every batch of validation; where none follows for
most of `trainer.timeout_seconds`, Python's own C thread writes the stack of every thread to
`hang/rank-<rank>.txt` in the run directory, without the interpreter's lock. A little later the operation times out in
the processes that wait, and what they say names these files.

Processes on other nodes write to their own file system where it is not shared; this is the one thing that processes
other than the first write.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from recipe.distributed import World
from recipe.errors import HangError, UserError, how_to_continue
from recipe.files import display_path
from recipe.run import Run

ALARM_SHARE = 0.8  # of the time-out: early enough to be written before the waiting processes end
BETWEEN_SHARE = 0.05  # setting an alarm starts a thread, 0.15 ms; nobody needs it more exact than this share
Item = TypeVar("Item")


class HangWatch:
    """The alarm of this process; silent where it is the only one."""

    def __init__(self, world: World, run: Run, timeout_seconds: float) -> None:
        self.is_on = world.size > 1
        self.timeout_seconds = timeout_seconds
        self.path = run.hangs / f"rank-{world.rank}.txt"
        self.set_at = float("-inf")
        self.file: IO[Any] | None = _opened(self.path) if self.is_on else None
        self.kept_bytes = self._bytes()  # stacks of earlier sessions stay

    def progressed(self) -> None:
        """A step or a batch is done: begin to wait anew."""
        now = time.monotonic()
        if self.is_on and now - self.set_at >= BETWEEN_SHARE * self.timeout_seconds:
            self._take_back()  # it was slow, but it did not hang
            self.set_at = now
            faulthandler.dump_traceback_later(ALARM_SHARE * self.timeout_seconds, file=self.file or sys.stderr)

    def watched(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items, each of them progress."""
        for item in items:
            yield item
            self.progressed()

    @property
    def has_fired(self) -> bool:
        """Whether a stack was written since the last progress."""
        return self._bytes() > self.kept_bytes

    def close(self, is_clean: bool) -> None:
        """No alarm any more; after a clean end nothing of this session is left, and no empty file."""
        faulthandler.cancel_dump_traceback_later()
        if self.file is None:
            return
        if is_clean:
            self._take_back()
        is_empty = self._bytes() == 0
        self.file.close()
        if is_empty:
            _remove(self.path)

    def _bytes(self) -> int:
        return os.fstat(self.file.fileno()).st_size if self.file is not None else 0

    def _take_back(self) -> None:
        if self.file is not None and self.has_fired:
            os.ftruncate(self.file.fileno(), self.kept_bytes)


@contextmanager
def hang_watch(world: World, run: Run, timeout_seconds: float) -> Iterator[HangWatch]:
    """Watch over what happens inside; raises `HangError` instead of what breaks in a process that waited in vain."""
    watch = HangWatch(world, run, timeout_seconds)
    is_clean = False
    try:
        watch.progressed()
        yield watch
        is_clean = True
    except SystemExit:  # all processes leave together
        is_clean = True
        raise
    except Exception as error:
        if watch.has_fired and not isinstance(error, UserError):
            raise HangError(_sentence(watch)) from error
        raise
    finally:
        watch.close(is_clean)


def _sentence(watch: HangWatch) -> str:
    return (
        f"a process did not answer for trainer.timeout_seconds={watch.timeout_seconds:g}; where each one stood is in "
        f"{display_path(watch.path.parent)}/rank-*.txt; {how_to_continue()}"
    )


def _opened(path: Path) -> IO[Any] | None:
    """For appending; None, which stands for the terminal, where this process cannot write there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab")
    except OSError as error:
        print(
            f"warning: stacks of a hang will go to the terminal: {display_path(path)}: {error.strerror}",
            file=sys.stderr,
        )
        return None


def _remove(path: Path) -> None:
    """The file, and its folder with the last one."""
    try:
        path.unlink(missing_ok=True)
        path.parent.rmdir()
    except OSError:  # others are still there, or the run directory is gone
        return
