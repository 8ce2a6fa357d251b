"""Warnings about lost time, and their measurement."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipe.run.directory import Run
from recipe.training.metric_log import DataWait, MetricLogger, StallProbe


@pytest.fixture
def logger(tmp_path: Path) -> Iterator[MetricLogger]:
    logger = MetricLogger(
        Run(tmp_path), epochs=3, steps_per_epoch=2, log_every_steps=1, completed_steps=0, completed_epochs=0
    )
    yield logger
    logger.close()


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
    """Threads that decoded took the lock, and a run that went at a third of its speed said "waiting for data 1 %"."""
    logger.warn_of_waiting(2, 0.01, 0.66, 60.0)
    assert "stalled for 66% of its time in epoch 2 (loader.workers" in capsys.readouterr().err


def test_the_probe_sees_threads_that_hold_the_gil() -> None:
    """They compute in Python and never let go by themselves; the probe's own operations let go each time."""
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
