"""Graceful shutdown: signal handlers set a flag, all ranks agree on it, training stops after the same step.

A scheduler that takes the machine back sends SIGTERM or a user signal, a closing terminal SIGHUP, a person Ctrl-C. All
processes poll after the same steps and add up their flags, so all of them stop at the same step even if only one got
the signal. The training loop then saves a checkpoint and exits with code 75.
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
from recipe.run.launcher import launched
from recipe.run.terminal import handlers_put_back, heeded, is_writable

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STEPS_BETWEEN_POLLS = 16  # of several processes with accelerators: each poll waits for the device
ECHO_SECONDS = 3.0  # a terminal's Ctrl-C reaches a launched process twice: directly, and handed on by its launcher
T = TypeVar("T")


class Stopped(Exception):  # noqa: N818 (a way out, not an error)
    """Raised on every process after the same step."""


class StopRequest:
    """The flag of this process, and the agreement of all of them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.is_launched = launched().is_elastic
        self.requested_at: float | None = None
        self.interrupted_at: float | None = None
        self.every = STEPS_BETWEEN_POLLS if world.size > 1 and world.device.type == "cuda" else 1

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. A second Ctrl-C stops at once."""
        now = time.monotonic()
        if number == signal.SIGINT:
            echo_seconds = ECHO_SECONDS if self.is_launched else 0.0
            if self.interrupted_at is not None and now - self.interrupted_at >= echo_seconds:
                raise KeyboardInterrupt
            self.interrupted_at = self.interrupted_at or now
        is_new, self.requested_at = self.requested_at is None, self.requested_at or now
        if is_new and self.world.is_rank0:
            text = f"{signal.Signals(number).name}: saving after this step; Ctrl-C (again) stops without\n"
            with suppress(OSError):  # the terminal may be gone
                if is_writable(2):
                    os.write(2, text.encode())  # print is not safe here: it may be interrupted print itself

    def poll(self, step: int) -> None:
        """Raise `Stopped` on all processes or on none. All of them poll at the same steps."""
        if step % self.every == 0 and self._is_agreed():
            raise Stopped

    def _is_agreed(self) -> bool:
        if self.world.size == 1:
            return self.requested_at is not None
        requests = torch.tensor([float(self.requested_at is not None)], device=self.world.device)
        return bool(self.world.sum(requests).item() > 0)

    def polled(self, items: Iterable[T], common: int) -> Iterator[T]:
        """The same items. Polls after each of the first `common`, as every process has so many, and at the end."""
        for number, item in enumerate(items, start=1):
            yield item
            if number <= common:
                self.poll(number)
        self.poll(0)


@contextmanager
def graceful_shutdown(world: World) -> Iterator[StopRequest]:
    """Handle signals inside. Enter this after the process group is there.

    While a process waits in C++ for the others to join, no Python handler runs: no signal could end it.
    """
    request = StopRequest(world)
    with handlers_put_back():
        for number in heeded(SIGNALS):
            signal.signal(number, request.on_signal)
        yield request
