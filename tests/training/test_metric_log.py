"""Lines of a training, warnings about lost time, and its measurement."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipe.run import progress
from recipe.run.directory import Run
from recipe.run.metric_rows import Row
from recipe.run.progress import ProgressPrinter, eta
from recipe.training.metric_log import DataWait, MetricLogger, StallProbe, lost_time


@pytest.fixture
def logger(tmp_path: Path) -> Iterator[MetricLogger]:
    logger = MetricLogger(
        Run(tmp_path), epochs=3, steps_per_epoch=2, log_every_steps=1, completed_steps=0, completed_epochs=0
    )
    yield logger
    logger.close()


def row(split: str, epoch: int, step: int, **values: float) -> Row:
    measured = {
        "images_seen": 0,
        "loss": 1.28123,
        "top1_accuracy": 0.77912,
        "top5_accuracy": 0.9,
        "learning_rate": 0.1,
        "images_per_second": 12345.6,
        "data_wait_fraction": 0.004,
        "seconds": 1.0,
    }
    return Row(split=split, epoch=epoch, step=step, **(measured | values))  # type: ignore[arg-type]


def test_the_lines_of_a_training(logger: MetricLogger, capsys: pytest.CaptureFixture[str]) -> None:
    for epoch in (1, 2, 3):
        logger.write(row("train", epoch, 2 * epoch))
        logger.write(row("validation", epoch, 2 * epoch, top1_accuracy=0.95208, loss=0.23204))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "epoch 1/3  step 2/6  loss 1.281  top-1 77.9%  12,346 img/s  ETA 0:00"
    assert lines[1] == "epoch 1/3  step 2/6  validation  loss 0.2320  top-1 95.21%  top-5 90.00%  ETA 0:00"
    assert "ETA" in lines[-2], "the last validation is left"
    assert "ETA" not in lines[-1]


def test_the_longest_line_fits_into_a_hundred_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = MetricLogger(Run(tmp_path), 90, 5004, 250, completed_steps=0, completed_epochs=0)
    logger.since -= 100 * 3600 / 90
    logger.write(row("train", 1, 5004, data_wait_fraction=0.99))
    logger.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "epoch  1/90  step   5004/450360  loss 1.281  top-1 77.9%  12,346 img/s  data wait 99%  ETA 98:"
    )
    assert len(line) <= 100


def test_lost_time_is_named_only_if_it_matters() -> None:
    assert lost_time(row("train", 1, 1, data_wait_fraction=0.01)) == ""
    assert lost_time(row("train", 1, 1, data_wait_fraction=0.12)) == "  data wait 12%"
    assert lost_time(row("train", 1, 1, stalled_fraction=0.1)) == ""
    assert lost_time(row("train", 1, 1, data_wait_fraction=0.02, stalled_fraction=0.6)) == "  stalled 60%"


def test_a_long_time_without_a_row_gets_a_line(
    logger: MetricLogger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger.step()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    logger.step()
    assert capsys.readouterr().out.startswith("epoch 1/3  step 2/6  ETA 0:0")


def test_long_work_prints_lines_even_where_nothing_is_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    with ProgressPrinter("comparing", 480, "images") as printer:
        time.sleep(0.1)
        printer.add(120)
        time.sleep(0.1)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "comparing  0/480 images  0 images/s"
    assert last.startswith("comparing  120/480 images  ")
    assert last.endswith("  ETA 0:00")
    assert [eta(seconds) for seconds in (4, 83, 3723)] == ["0:04", "1:23", "1:02:03"]


def test_waiting_is_warned_of_once(logger: MetricLogger, capsys: pytest.CaptureFixture[str]) -> None:
    logger.warn_of_waiting(1, 0.10, 0.10, 60.0)
    logger.warn_of_waiting(1, 0.99, 0.99, 3.0)
    assert capsys.readouterr().err == "", "a tenth may go unmentioned, and so may the first seconds"
    logger.warn_of_waiting(2, 0.11, 0.0, 60.0)
    logger.warn_of_waiting(3, 0.50, 0.0, 60.0)
    said = capsys.readouterr().err
    assert said.startswith("warning: 11% of the time of epoch 2 was spent waiting for images")
    assert said.count("\n") == 1


def test_stalls_are_warned_of_too(logger: MetricLogger, capsys: pytest.CaptureFixture[str]) -> None:
    """Decoding threads took the GIL, and a run at a third of its speed reported "waiting for data 1 %"."""
    logger.warn_of_waiting(2, 0.01, 0.66, 60.0)
    assert "stalled for 66% of its time in epoch 2 (loader.workers" in capsys.readouterr().err


def test_the_probe_sees_threads_that_hold_the_gil() -> None:
    """They compute in Python and never release the GIL by themselves. The probe's own operations do each time."""
    probe, done = StallProbe(), threading.Event()

    def compute() -> None:
        while not done.is_set():
            sum(range(2000))

    threads = [threading.Thread(target=compute) for _ in range(3)]
    for thread in threads:
        thread.start()
    while probe.processor_seconds < 20 * sys.getswitchinterval():
        probe.sample()
    done.set()
    for thread in threads:
        thread.join()
    assert probe.stalled() > 0.5
    assert probe.stalled() == 0.0


def test_waiting_and_stalls_are_measured_for_every_item() -> None:
    wait = DataWait(probe := StallProbe())

    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.02)
            yield number

    assert list(wait.timed(slow())) == [0, 1, 2]
    assert probe.seconds > 0
    assert wait.stalled_fraction() is not None
    assert probe.seconds == 0
    assert DataWait().stalled_fraction() is None
    seconds, waited = wait.lap()
    assert 0.06 <= waited <= seconds
