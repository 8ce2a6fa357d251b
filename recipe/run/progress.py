"""Progress of long work: a bar with rate and remaining time on a terminal, plain lines at intervals elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from threading import Event, Thread
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

LINE_SECONDS = 8.0  # with what a step takes, no pause is longer than ten seconds
LINE_SHARE = 1 / 60  # of the time so far: a line a minute after an hour
BAR_DELAY_SECONDS = 1.0  # shorter work shows no bar
T = TypeVar("T")


class LinePace:
    """Paces lines of progress: one every 8 seconds, fewer after eight minutes."""

    def __init__(self) -> None:
        self.started = self.printed_at = time.perf_counter()

    def wait_seconds(self) -> float:
        """Until the next line, which is due at zero."""
        now = time.perf_counter()
        return self.printed_at + max(LINE_SECONDS, LINE_SHARE * (now - self.started)) - now

    def printed(self) -> None:
        """Start to wait again."""
        self.printed_at = time.perf_counter()


class ProgressPrinter:
    """Counts towards `total`. Units that were `done` before do not count for the rate.

    A thread prints the lines and moves the clock of the bar, so that one unit may take minutes.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0, scale: int = 1000, shows: bool = True) -> None:
        self.what, self.total, self.unit, self.scale = what, total, unit, scale
        self.count = self.initial = done
        self.started = time.perf_counter()
        self.bar = tqdm(
            desc=what,
            total=total,
            unit=f" {unit}",
            unit_scale=scale == 1024,
            unit_divisor=scale,
            initial=done,
            disable=not (shows and sys.stderr.isatty()),
            dynamic_ncols=True,
            leave=None,  # unless it is inside another bar
            delay=BAR_DELAY_SECONDS,
        )
        self.ended = Event()
        self.thread = Thread(target=self._keep_alive, daemon=True)
        if shows:
            self.thread.start()

    def __enter__(self) -> ProgressPrinter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()
        self.bar.close()

    def add(self, amount: int) -> None:
        """Count `amount` more units."""
        self.count += amount
        self.bar.update(amount)

    def counted(self, items: Iterable[T]) -> Iterator[T]:
        """The same items. Each counts when the next is asked for."""
        for item in items:
            yield item
            self.add(1)

    def reach(self, count: int) -> None:
        """Set the count."""
        self.add(count - self.count)

    def line(self) -> str:
        rate = (self.count - self.initial) / max(time.perf_counter() - self.started, 1e-9)
        remaining = f"  ETA {eta((self.total - self.count) / rate)}" if rate > 0 else ""
        count, total, speed = (self._number(n) for n in (self.count, self.total, rate))
        return f"{self.what}  {count}/{total} {self.unit}  {speed} {self.unit}/s{remaining}"

    def _number(self, value: float) -> str:
        if self.scale == 1024:
            return str(tqdm.format_sizeof(value, "", self.scale))
        return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"

    def _keep_alive(self) -> None:
        pace = LinePace()
        while not self.ended.wait(pace.wait_seconds()):
            pace.printed()
            if self.bar.disable:
                print(self.line(), file=sys.stderr, flush=True)
            self.bar.refresh()


def eta(seconds: float) -> str:
    """Seconds as 1:23 or 1:02:03."""
    return str(tqdm.format_interval(seconds)).removeprefix("0")
