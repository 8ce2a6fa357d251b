"""A wish to stop: noted when a signal comes, agreed on by all processes, acted on between two steps.

A scheduler that takes the machine back sends SIGTERM or one of the user signals, a terminal that closes sends SIGHUP, a
person presses Ctrl-C. The handler only notes it. All processes look at the same steps and add up what they noted, so
that all of them leave at the same step even where only one got the signal; what follows (a checkpoint, exit code 75) is
the training loop's business.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

import torch

from recipe.distributed import World
from recipe.launcher import launched
from recipe.signals import handlers_put_back, heeded
from recipe.streams import is_writable

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STEPS_BETWEEN_LOOKS = 16  # of several processes with accelerators: the host waits for the device to look
ECHO_SECONDS = 3.0  # a terminal's Ctrl-C reaches a launched process twice: directly, and handed on by its launcher
Item = TypeVar("Item")


class Stopped(Exception):  # noqa: N818 (a way out, no error)
    """Raised on every process after the same step."""


class StopWish:
    """What this process was told, and how all of them agree."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.is_launched = launched().is_elastic
        self.noted_at: float | None = None
        self.interrupted_at: float | None = None
        self.every = STEPS_BETWEEN_LOOKS if world.size > 1 and world.device.type == "cuda" else 1

    def note(self, number: int, frame: FrameType | None) -> None:
        """The signal handler; a second Ctrl-C does not wait for anything."""
        now = time.monotonic()
        if number == signal.SIGINT:
            echo_seconds = ECHO_SECONDS if self.is_launched else 0.0
            if self.interrupted_at is not None and now - self.interrupted_at >= echo_seconds:
                raise KeyboardInterrupt
            self.interrupted_at = self.interrupted_at or now
        is_news, self.noted_at = self.noted_at is None, self.noted_at or now
        if is_news and self.world.is_first:
            text = f"{signal.Signals(number).name}: saving after this step; Ctrl-C (again) stops without\n"
            with suppress(OSError):  # the terminal may be gone
                if is_writable(2):
                    os.write(2, text.encode())  # print is not safe here: it may be interrupted print itself

    def look(self, count: int) -> None:
        """Raise `Stopped` on all processes or on none; all of them look at the same counts."""
        if count % self.every == 0 and self._is_agreed():
            raise Stopped

    def _is_agreed(self) -> bool:
        if self.world.size == 1:
            return self.noted_at is not None
        noted = torch.tensor([float(self.noted_at is not None)], device=self.world.device)
        return bool(self.world.sum(noted).item() > 0)

    def watched(self, items: Iterable[Item], common: int) -> Iterator[Item]:
        """The same items with a look after each of the first `common`, which every process has, and one at the end."""
        for number, item in enumerate(items, start=1):
            yield item
            if number <= common:
                self.look(number)
        self.look(0)


@contextmanager
def stop_wish(world: World) -> Iterator[StopWish]:
    """Note signals instead of dying of them; to be entered after the process group is there.

    While a process waits in C++ for the others to join, no Python handler runs: it could not be ended by a signal.
    """
    wish = StopWish(world)
    with handlers_put_back():
        for number in heeded(SIGNALS):
            signal.signal(number, wish.note)
        yield wish
