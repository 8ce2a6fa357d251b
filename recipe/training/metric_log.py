"""Metrics of a run while it trains: metrics.jsonl, TensorBoard's events, the terminal.

The rows of `metrics.jsonl` are the source; the events are made from them. A continued run first cuts both back to its
checkpoint. Rows are rare, so a GPU is seldom waited for.

Rows that cannot be written are buffered and retried. A checkpoint is saved only after its rows (`flush`), so a resumed
run has them all.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO, TypeVar

import msgspec
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from recipe.errors import DiskError
from recipe.run.directory import Run
from recipe.run.files import disk_errors, write_atomically
from recipe.run.metric_rows import Place, Row, missing_rows, planned_places

T = TypeVar("T")
PROBE_OPERATIONS = 64
WAITING_LIMIT = 0.1  # share of the time that may go unmentioned
SECONDS_TO_JUDGE = 10.0  # an epoch shorter than this is mostly its own start


class MetricLogger:
    """Writes and prints rows, on the first process."""

    def __init__(
        self,
        run: Run,
        epochs: int,
        steps_per_epoch: int,
        log_every_steps: int,
        completed_steps: int,
        completed_epochs: int,
    ) -> None:
        self.run = run
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.first_step = completed_steps
        self.has_warned = False
        self.started = time.perf_counter()
        self.buffered: list[Row] = []  # not written yet
        self.has_disk_error = False
        self.events = run.tensorboard / "events.out.tfevents.0.recipe"
        planned = planned_places(completed_steps, steps_per_epoch, log_every_steps, completed_epochs)
        self.missing = self._cut(list(planned))
        self.bar = tqdm(
            total=epochs * steps_per_epoch,
            initial=completed_steps,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def _cut(self, planned: list[Place]) -> str | None:
        """Keep the planned rows, those before the checkpoint; returns which of them are missing, in words.

        The others come again: later steps, and the validation of an epoch that was saved before it. A row that is
        there twice is kept once.
        """
        stored = {row.place: row for row in reversed([Row(**row) for row in self.run.metric_rows()])}
        rows = [stored[place] for place in planned if place in stored]
        content = as_lines(rows)
        write_atomically(self.run.metrics, content)
        self.written_bytes = len(content)
        self._make_events(rows)
        missing = missing_rows(set(stored), planned)
        if missing:
            print(f"warning: {missing}; training goes on, and the document will say so", file=sys.stderr, flush=True)
        return missing

    def _make_events(self, rows: list[Row]) -> None:
        """Replace TensorBoard's file by one with the events of these rows."""
        begin = Event(wall_time=time.time(), file_version="brain.Event:2")
        content = as_records([begin, *map(as_event, rows)])
        with disk_errors(self.run.tensorboard):
            for old in self.run.tensorboard.glob("events*"):
                old.unlink()
        write_atomically(self.events, content)
        self.event_bytes = len(content)

    def write(self, row: Row) -> None:
        """Print a row, append it to the file and to TensorBoard's events; a row that the disk refuses is retried."""
        self._print_row(row)
        self.buffered.append(row)
        try:
            self.flush()
        except DiskError as error:
            if not self.has_disk_error:
                self._print(f"warning: {error}; training goes on, rows wait until they can be written", sys.stderr)
            self.has_disk_error = True

    def flush(self, durably: bool = False) -> None:
        """Write the buffered rows; raises `DiskError` and keeps them where the disk refuses."""
        lines, events = as_lines(self.buffered), as_records(map(as_event, self.buffered))
        append(self.run.metrics, lines, self.written_bytes, durably)
        append(self.events, events, self.event_bytes, durably)
        self.written_bytes, self.event_bytes = self.written_bytes + len(lines), self.event_bytes + len(events)
        if self.has_disk_error:
            self._print(f"{len(self.buffered)} rows that had waited for the disk are written", sys.stderr)
        self.buffered, self.has_disk_error = [], False

    def _print_row(self, row: Row) -> None:
        """Above the bar on a terminal, as a plain line elsewhere."""
        speed = f"{row.images_per_second:,.0f} images/s"
        waiting = "" if row.data_wait_fraction is None else f"  waiting for data {row.data_wait_fraction:.0%}"
        waiting += f"  stalled {row.stalled_fraction:.0%}" if (row.stalled_fraction or 0) > WAITING_LIMIT else ""
        line = (
            f"epoch {row.epoch}/{self.epochs}  step {row.step}  {row.split:<10}  loss {row.loss:.4f}  "
            f"top-1 {row.top1_accuracy:.2%}  {speed}{waiting}{self._remaining(row)}"
        )
        self._print(line, sys.stdout)
        if not self.bar.disable:
            self.bar.set_postfix_str(f"loss {row.loss:.3f}, {speed}{waiting}")

    def _print(self, line: str, file: TextIO) -> None:
        if self.bar.disable:
            print(line, file=file, flush=True)
        else:
            self.bar.write(line, file=file)

    def _remaining(self, row: Row) -> str:
        """The remaining time at the speed of this session."""
        done = row.step - self.first_step
        left = self.epochs * self.steps_per_epoch - row.step
        if not (done and left):
            return ""
        return f"  ETA {tqdm.format_interval((time.perf_counter() - self.started) / done * left)}"

    def warn_of_waiting(self, epoch: int, data_wait_fraction: float, stalled: float, seconds: float) -> None:
        """Warn once a session of what keeps a device from being busy; a few seconds are too short to judge."""
        if self.has_warned or seconds < SECONDS_TO_JUDGE or max(data_wait_fraction, stalled) <= WAITING_LIMIT:
            return
        self.has_warned = True
        reason = (
            f"{data_wait_fraction:.0%} of the time of epoch {epoch} was spent waiting for images"
            if data_wait_fraction > WAITING_LIMIT
            else f"the main thread was stalled for {stalled:.0%} of its time in epoch {epoch} "
            "(loader.workers takes decoding out of its process)"
        )
        print(
            f"warning: {reason}; `python -m recipe doctor` says what bounds this experiment",
            file=sys.stderr,
            flush=True,
        )

    def step(self) -> None:
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def as_lines(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(msgspec.structs.asdict(row)) + "\n" for row in rows).encode()


def as_event(row: Row) -> Event:
    values = {name: value for name, value in msgspec.structs.asdict(row).items() if isinstance(value, float)}
    summary = Summary(
        value=[Summary.Value(tag=f"{row.split}/{name}", simple_value=value) for name, value in values.items()]
    )
    return Event(wall_time=time.time(), step=row.step, summary=summary)


def as_records(events: Iterable[Event]) -> bytes:
    """Events in the framing of TensorBoard's files."""
    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()


def append(path: Path, content: bytes, at: int, durably: bool) -> None:
    """Write `content` after the first `at` bytes of a file; cuts off what a failed attempt left there."""
    with disk_errors(path), path.open("r+b", buffering=0) as handle:
        handle.truncate(at)
        handle.seek(at)
        while content:
            content = content[handle.write(content) :]
        if durably:
            os.fsync(handle.fileno())


class StallProbe:
    """Estimates how often this thread is stalled: times a tiny workload and compares wall with CPU time.

    Each operation of torch releases the GIL and takes it again, as launching a kernel does. Wall time that is not CPU
    time was spent waiting for the GIL, which decoding threads may hold, or for a core: such a loop does not wait for
    data and is slow nevertheless. The GIL changes hands every 5 ms or so: a few samples tell little, those of an epoch
    tell it well.
    """

    def __init__(self) -> None:
        self.number = torch.zeros(8)
        self.seconds = self.processor_seconds = 0.0

    def sample(self) -> None:
        """Run the workload once, some 100 microseconds."""
        clock, processor = time.perf_counter(), time.thread_time()
        for _ in range(PROBE_OPERATIONS):
            self.number.add_(1)
        self.processor_seconds += time.thread_time() - processor
        self.seconds += time.perf_counter() - clock

    def stalled(self) -> float:
        """The share of the wall time of all samples since the last call in which this thread did not run."""
        share = 1 - self.processor_seconds / self.seconds if self.seconds else 0.0
        self.seconds = self.processor_seconds = 0.0
        return max(0.0, share)


class DataWait:
    """Measures the wall time that a loop waits for its next item; with a probe, also how often it is stalled.

    The probe is for loops that launch work on a GPU: on a CPU the thread that computes competes with its own kernels.
    """

    def __init__(self, probe: StallProbe | None = None) -> None:
        self.waited_seconds = 0.0
        self.since = time.perf_counter()
        self.probe = probe

    def timed(self, items: Iterator[T]) -> Iterator[T]:
        """The same items."""
        while True:
            before = time.perf_counter()
            item = next(items, None)
            self.waited_seconds += time.perf_counter() - before
            if item is None:
                return
            if self.probe is not None:
                self.probe.sample()
            yield item

    def stalled_fraction(self) -> float | None:
        """Since the last call; None without a probe."""
        return None if self.probe is None else round(self.probe.stalled(), 4)

    def so_far(self) -> tuple[float, float]:
        """(seconds since the last lap, of which waited); the lap goes on."""
        return time.perf_counter() - self.since, self.waited_seconds

    def continue_from(self, seconds: float, waited_seconds: float) -> None:
        """Set the lap to `so_far()` of a moment ago: the time since then does not count."""
        self.since, self.waited_seconds = time.perf_counter() - seconds, waited_seconds

    def lap(self) -> tuple[float, float]:
        """(seconds since the last call, of which waited)."""
        now = time.perf_counter()
        elapsed, waited = now - self.since, self.waited_seconds
        self.since, self.waited_seconds = now, 0.0
        return elapsed, waited
