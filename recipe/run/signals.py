"""Signals from outside: of a scheduler, of a terminal that closes, Ctrl-C.

What was ignored when the process started, SIGHUP under nohup or SIGINT in a script's background job, stays ignored.
"""

from __future__ import annotations

import atexit
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

from recipe.errors import Interrupted

FROM_OUTSIDE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def heeded(numbers: Iterable[signal.Signals]) -> list[signal.Signals]:
    """Those that are not ignored; none outside of the main thread, where Python handles no signal."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Interrupted` inside, where they would end the process at once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number))

    with handlers_put_back():
        for number in heeded((signal.SIGTERM, signal.SIGHUP)):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, interrupt)
        yield


@contextmanager
def handlers_put_back() -> Iterator[None]:
    """Undo what the block does to the handlers; where the process is leaving, signals do nothing from then on.

    A signal often comes twice: from a terminal that closes and from its shell, from a scheduler to a process group and
    from the launcher in it. The second one must not change the exit code of a process that has saved.
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
    """Unlike SIG_IGN, this is not inherited by processes that are started afterwards."""


def _ignore(numbers: tuple[signal.Signals, ...]) -> None:
    """As the interpreter ends it puts Python's handlers back to the default, which would end it by the signal."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def blocked(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """A process that is started inside never sees these signals; one that comes to this process meanwhile waits."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_resource_tracker() -> None:
    """Start multiprocessing's process that removes semaphores, so that no signal to all of a terminal's ends it.

    It ends when this process does. One that was ended by SIGHUP leaves tracebacks on the terminal.
    """
    with blocked(FROM_OUTSIDE):
        resource_tracker.ensure_running()
