"""Metrics of a run while it trains: metrics.jsonl, TensorBoard's events, the terminal.

The rows of `metrics.jsonl` are the source, the events are made from them. A continued run first cuts both back to its
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
from recipe.run.progress import LinePace, eta

T = TypeVar("T")
PROBE_OPERATIONS = 64
WAITING_SHOWN = 0.01  # share of the time from which a line names it
WAITING_LIMIT = 0.1  # share of the time from which a session warns
SECONDS_TO_JUDGE = 10.0  # an epoch shorter than this is mostly its own start


class MetricLogger:
    """Writes and prints rows, on rank 0."""

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
        self.first_step = self.completed_steps = completed_steps
        self.has_warned = False
        self.pace = LinePace()
        self.since = time.perf_counter()  # of the last row
        self.spent_seconds = {"train": 0.0, "validation": 0.0}  # in this session, up to the last row
        self.validations, self.validated_epochs = 0, completed_epochs
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
        """Keep the planned rows before the checkpoint. Returns the missing ones, in words.

        The others come again: later steps, and the validation of an epoch that was saved before it. A row that is there
        twice is kept once.
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
        """Print a row, append it to the file and to TensorBoard's events. Rows that the disk refuses are retried."""
        self._print_row(row)
        self.buffered.append(row)
        try:
            self.flush()
        except DiskError as error:
            if not self.has_disk_error:
                self._print(f"warning: {error}; training goes on, rows wait until they can be written", sys.stderr)
            self.has_disk_error = True

    def flush(self, durably: bool = False) -> None:
        """Write the buffered rows. Raises `DiskError` and keeps them if the disk refuses."""
        lines, events = as_lines(self.buffered), as_records(map(as_event, self.buffered))
        append(self.run.metrics, lines, self.written_bytes, durably)
        append(self.events, events, self.event_bytes, durably)
        self.written_bytes, self.event_bytes = self.written_bytes + len(lines), self.event_bytes + len(events)
        if self.has_disk_error:
            self._print(f"{len(self.buffered)} rows that had waited for the disk are written", sys.stderr)
        self.buffered, self.has_disk_error = [], False

    def _print_row(self, row: Row) -> None:
        """Above the bar on a terminal, as a plain line elsewhere."""
        now = time.perf_counter()
        self.spent_seconds[row.split] += now - self.since
        self.since = now
        self.validations += row.split == "validation"
        self.validated_epochs = row.epoch - (row.split == "train")
        self.pace.printed()
        if row.split == "validation":
            measured = f"loss {row.loss:.4f}  top-1 {row.top1_accuracy:.2%}  top-5 {row.top5_accuracy:.2%}"
            self._print(f"{self._place(row.step, row.epoch)}  validation  {measured}{self._eta(row.step)}", sys.stdout)
            return
        speed = f"{row.images_per_second:,.0f} img/s{lost_time(row)}"
        measured = f"loss {row.loss:.3f}  top-1 {row.top1_accuracy:.1%}"
        self._print(f"{self._place(row.step, row.epoch)}  {measured}  {speed}{self._eta(row.step)}", sys.stdout)
        self.bar.set_postfix_str(f"loss {row.loss:.3f}, {speed}")

    def _place(self, step: int, epoch: int) -> str:
        """`epoch 3/6  step 111/222`, aligned over all lines of a run."""
        steps = str(self.epochs * self.steps_per_epoch)
        return f"epoch {epoch:{len(str(self.epochs))}}/{self.epochs}  step {step:{len(steps)}}/{steps}"

    def _print(self, line: str, file: TextIO) -> None:
        if self.bar.disable:
            print(line, file=file, flush=True)
        else:
            self.bar.write(line, file=file)

    def _eta(self, step: int) -> str:
        """The remaining time at the speed of this session. Validations count once one was measured."""
        training = self.spent_seconds["train"] + time.perf_counter() - self.since
        steps, done = self.epochs * self.steps_per_epoch - step, step - self.first_step
        seconds = training / max(1, done) * steps
        seconds += self.spent_seconds["validation"] / max(1, self.validations) * (self.epochs - self.validated_epochs)
        return f"  ETA {eta(seconds)}" if done and seconds else ""

    def warn_of_waiting(self, epoch: int, data_wait_fraction: float, stalled: float, seconds: float) -> None:
        """Warn once a session if the device waits for images or the main thread. Short epochs are not judged."""
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
        """Count a step. Without a bar, print a line if no row was printed for a while."""
        self.completed_steps += 1
        self.bar.update()
        if self.bar.disable and self.pace.wait_seconds() <= 0:
            epoch = (self.completed_steps - 1) // self.steps_per_epoch + 1
            self._print(f"{self._place(self.completed_steps, epoch)}{self._eta(self.completed_steps)}", sys.stdout)
            self.pace.printed()

    def close(self) -> None:
        self.bar.close()


def lost_time(row: Row) -> str:
    """The larger of data wait and stalls, if worth naming."""
    waited, stalled = row.data_wait_fraction or 0.0, row.stalled_fraction or 0.0
    if stalled > max(WAITING_LIMIT, waited):
        return f"  stalled {stalled:.0%}"
    return f"  data wait {waited:.0%}" if waited > WAITING_SHOWN else ""


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
    """Write `content` after the first `at` bytes of a file. Cuts off the rest of a failed attempt."""
    with disk_errors(path), path.open("r+b", buffering=0) as handle:
        handle.truncate(at)
        handle.seek(at)
        while content:
            content = content[handle.write(content) :]
        if durably:
            os.fsync(handle.fileno())


class StallProbe:
    """Estimates how often this thread is stalled: times a tiny workload and compares wall with CPU time.

    Each operation of torch releases the GIL and takes it again, as launching a kernel does. Wall time beyond CPU time
    was spent waiting for the GIL (taken by decoding threads) or for a core. Such a loop is slow without waiting for
    data. The GIL changes hands every 5 ms or so: a few samples say little, those of an epoch are reliable.
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
        """The stalled share of the wall time of all samples since the last call."""
        share = 1 - self.processor_seconds / self.seconds if self.seconds else 0.0
        self.seconds = self.processor_seconds = 0.0
        return max(0.0, share)


class DataWait:
    """Measures the wall time that a loop waits for its next item and, with a probe, how often it is stalled.

    The probe is for loops that launch work on a GPU: on a CPU the thread that computes competes with its own kernels.
    """

    def __init__(self, probe: StallProbe | None = None) -> None:
        self.waited_seconds = 0.0
        self.since = time.perf_counter()
        self.probe = probe

    def timed(self, items: Iterator[T]) -> Iterator[T]:
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
        """Since the last call. None without a probe."""
        return None if self.probe is None else round(self.probe.stalled(), 4)

    def so_far(self) -> tuple[float, float]:
        """(seconds since the last lap, seconds of it spent waiting). The lap goes on."""
        return time.perf_counter() - self.since, self.waited_seconds

    def continue_from(self, seconds: float, waited_seconds: float) -> None:
        """Set the lap to `so_far()` of a moment ago: the time since then does not count."""
        self.since, self.waited_seconds = time.perf_counter() - seconds, waited_seconds

    def lap(self) -> tuple[float, float]:
        """(seconds since the last call, seconds of it spent waiting)."""
        now = time.perf_counter()
        elapsed, waited = now - self.since, self.waited_seconds
        self.since, self.waited_seconds = now, 0.0
        return elapsed, waited
