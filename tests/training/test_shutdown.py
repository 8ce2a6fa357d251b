"""Stop requests: noting a signal, polling on all processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from recipe.distributed import World
from recipe.errors import SAVED
from recipe.run.files import CHECKOUT
from recipe.training.shutdown import ECHO_SECONDS, SIGNALS, STEPS_BETWEEN_POLLS, Stopped, StopRequest, graceful_shutdown
from tests.builders.ranks import torchrun_environment

pytestmark = pytest.mark.usefixtures("default_signals")


def world(size: int = 1, kind: str = "cpu") -> World:
    return World(0, size, 0, size, torch.device(kind), "none")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_noted_and_the_handlers_are_put_back(number: int) -> None:
    before = signal.getsignal(number)
    with graceful_shutdown(world()) as request:
        request.poll(1)
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped):
            request.poll(2)
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once() -> None:
    with graceful_shutdown(world()):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_echoed_by_a_launcher_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in torchrun_environment(0, 1).items():
        monkeypatch.setenv(name, value)
    clock = [100.0]
    monkeypatch.setattr("recipe.training.shutdown.time.monotonic", lambda: clock[0])
    request = StopRequest(world())
    request.on_signal(signal.SIGINT, None)
    clock[0] += 0.3
    request.on_signal(signal.SIGINT, None)
    clock[0] += ECHO_SECONDS
    with pytest.raises(KeyboardInterrupt):
        request.on_signal(signal.SIGINT, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_what_was_ignored_stays_ignored(number: int) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with graceful_shutdown(world()) as request:
            os.kill(os.getpid(), number)
            request.poll(1)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_request_is_noted_also_where_it_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal that sends SIGHUP is gone."""
    request = StopRequest(world())

    def gone(descriptor: int, content: bytes) -> int:
        assert request.requested_at is not None
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("recipe.training.shutdown.os.write", gone)
    request.on_signal(signal.SIGHUP, None)
    with pytest.raises(Stopped):
        request.poll(1)


def test_a_process_that_has_saved_does_not_end_by_the_next_signal() -> None:
    def save_and_leave() -> None:
        with graceful_shutdown(world()):
            os.kill(os.getpid(), signal.SIGHUP)
            raise SystemExit(SAVED)

    with pytest.raises(SystemExit):
        save_and_leave()
    for number in SIGNALS:
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) is not signal.SIG_IGN, "a child process would ignore it from its start"


LATE = """
import os, signal
from recipe.run.terminal import report_user_errors
from recipe.run.terminal import handlers_put_back

class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGTERM):
        kill(process, number)

late = Late()  # deleted after the interpreter has put back all handlers
with report_user_errors(), handlers_put_back():
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    raise {ending}
"""


@pytest.mark.process
@pytest.mark.parametrize(("ending", "code"), [("SystemExit(75)", 75), ("KeyboardInterrupt", 130)])
def test_a_signal_while_the_interpreter_ends_changes_no_exit_code(ending: str, code: int) -> None:
    words = [sys.executable, "-c", LATE.format(ending=ending)]
    assert subprocess.run(words, cwd=CHECKOUT, capture_output=True, check=False).returncode == code


def test_several_accelerators_are_not_waited_for_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    request = StopRequest(world(8, "cuda"))
    asked: list[int] = []
    monkeypatch.setattr(StopRequest, "_is_agreed", lambda self: bool(asked.append(1)))
    for step in range(1, 10 * STEPS_BETWEEN_POLLS + 1):
        request.poll(step)
    assert len(asked) == 10


@pytest.mark.parametrize("images", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_process_polls_equally_often_while_it_validates(images: int, processes: int) -> None:
    """Some processes have one batch more. An additional poll of theirs would wait forever."""
    batches = len(np.array_split(np.arange(images), np.arange(4, images, 4)))
    common = batches // processes
    polls = []
    for rank in range(processes):
        request = StopRequest(world())
        request.poll = lambda count, counts=(counts := []): counts.append(count)  # type: ignore[method-assign,misc]
        assert len(list(request.polled(range(rank, batches, processes), common))) in (common, common + 1)
        polls.append(counts)
    assert all(counts == polls[0] for counts in polls)
