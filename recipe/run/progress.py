"""Progress of long work: a bar with rate and remaining time on a terminal, occasional plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY_SECONDS = 30.0


class ProgressPrinter:
    """Counts towards `total`. The rate leaves out the units that are already `done`."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0, scale: int = 1000) -> None:
        self.what, self.total, self.unit, self.scale = what, total, unit, scale
        self.count = self.initial = done
        self.started = self.spoke = time.perf_counter()
        self.bar = tqdm(
            desc=what,
            total=total,
            unit=unit,
            unit_scale=True,
            unit_divisor=scale,
            initial=done,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def __enter__(self) -> ProgressPrinter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def add(self, amount: int) -> None:
        """Count `amount` more units."""
        self.count += amount
        self.bar.update(amount)
        if self.bar.disable and time.perf_counter() - self.spoke > LINE_EVERY_SECONDS:
            self.spoke = time.perf_counter()
            print(self.line(), file=sys.stderr, flush=True)

    def reach(self, count: int) -> None:
        """Set the count of finished units."""
        self.add(count - self.count)

    def line(self) -> str:
        rate = (self.count - self.initial) / max(time.perf_counter() - self.started, 1e-9)
        remaining = tqdm.format_interval((self.total - self.count) / rate) if rate > 0 else "?"
        count, total, speed = (tqdm.format_sizeof(n, "", self.scale) for n in (self.count, self.total, rate))
        return f"{self.what}: {count} of {total} {self.unit}, {speed} {self.unit}/s, {remaining} left"
