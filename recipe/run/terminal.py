"""Signals, standard streams, and the end of a command.

Signals come from a scheduler, a closing terminal or Ctrl-C. Signals that were ignored at the start of the process, such
as SIGHUP under nohup or SIGINT in a background job, stay ignored.

Errors of standard streams do not stop the work. Output is dropped if the reader of a pipe has left, the terminal is
closed, the disk of a log is full, the encoding lacks a character, or the stream was closed from the start.
"""

from __future__ import annotations

import atexit
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from recipe.errors import CONTROLS, Interrupted, UserError, how_to_continue

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PATIENCE_SECONDS = 1.0
FROM_OUTSIDE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class LossyFile(io.FileIO):
    """A file with a `write` that neither fails nor waits for long. `failure` is the last suppressed error."""

    failure: OSError | None = None
    patience_seconds: float | None = PATIENCE_SECONDS  # None: as long as it takes
    is_stuck = False

    def write(self, content: ReadableBuffer) -> int:
        """Write as many bytes as possible. Returns the full number, as if all were written."""
        rest = memoryview(content).cast("B")
        count = rest.nbytes
        try:
            while rest:
                self.is_stuck = not is_writable(self.fileno(), 0.0 if self.is_stuck else self.patience_seconds)
                written = None if self.is_stuck else super().write(rest[: select.PIPE_BUF])
                if written is None:  # the reader does not read: a paused pager, Ctrl-S
                    break
                rest = rest[written:]
        except OSError as error:
            self.failure = error
        return count


def is_writable(descriptor: int, seconds: float | None = 0.0) -> bool:
    """True if `select.PIPE_BUF` bytes can be written without waiting, within `seconds`."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(None if seconds is None else 1000 * seconds))


def protect_streams(patience_seconds: float | None = PATIENCE_SECONDS) -> None:
    """Replace the standard streams of this process by lossy ones, except those that a caller has redirected.

    If the reader does not read for `patience_seconds`, lines are dropped until it reads again. None: wait for it.

    A stream that was closed from the start becomes os.devnull, for child processes too. Otherwise the next opened file
    would get its descriptor, and everything that a library prints.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free descriptor: this one
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if sys.stdout is sys.__stdout__:
        sys.stdout = _lossy(sys.stdout, patience_seconds)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _lossy(sys.stderr, patience_seconds)


def _lossy(stream: TextIO | None, patience_seconds: float | None) -> TextIO:
    file = LossyFile(os.devnull, "w") if stream is None else LossyFile(stream.fileno(), "w", closefd=False)
    file.patience_seconds = patience_seconds
    encoding = "utf-8" if stream is None else stream.encoding
    return io.TextIOWrapper(io.BufferedWriter(file), encoding, "backslashreplace", line_buffering=True)


def output_failure() -> OSError | None:
    """The error that lost output of a protected `sys.stdout`, or None."""
    sys.stdout.flush()
    file = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return file.failure if isinstance(file, LossyFile) else None


# ---- the end of a command ---------------------------------------------------------------------------


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Print a `UserError` as one line and exit with its code. Leave every other exception alone.

    Every command enters this first. It also protects the standard streams.
    """
    protect_streams()
    try:
        yield
    except UserError as error:
        print(f"error: {CONTROLS.sub('�', str(error))}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt as stop:
        print(f"stopped by {str(stop) or 'Ctrl-C'}; {how_to_continue()}", file=sys.stderr, flush=True)
        raise SystemExit(stop.exit_code if isinstance(stop, Interrupted) else 130) from None


# ---- signals ----------------------------------------------------------------------------------------


def heeded(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """The signals that are not ignored. Empty outside of the main thread, where Python handles no signals."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise `Interrupted` in the block, instead of ending the process at once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number))

    with handlers_put_back():
        for number in heeded((signal.SIGTERM, signal.SIGHUP)):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, interrupt)
        yield


@contextmanager
def handlers_put_back() -> Iterator[None]:
    """Restore the signal handlers after the block. If the process is exiting, signals are ignored from then on.

    A signal often comes twice, from a terminal and its shell or from a scheduler and the launcher. The second one must
    not change the exit code of a process that has saved.
    """
    handlers: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in heeded(FROM_OUTSIDE)}
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        handlers = dict.fromkeys(handlers, _pass_over)
        atexit.register(_ignore, tuple(handlers))
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _pass_over(number: int, frame: FrameType | None) -> None:
    """Do nothing. Unlike SIG_IGN, this is not inherited by child processes."""


def _ignore(numbers: tuple[signal.Signals, ...]) -> None:
    """Ignore signals at exit, as the interpreter restores the default handlers: they would change the exit code."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def blocked(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Block signals for processes that are started in the block. Signals to this process wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_resource_tracker() -> None:
    """Start multiprocessing's resource tracker with signals blocked, so that no signal of a terminal ends it.

    It ends with this process. A tracker that was ended by SIGHUP prints tracebacks.
    """
    with blocked(FROM_OUTSIDE):
        resource_tracker.ensure_running()
