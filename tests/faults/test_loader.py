"""Faults of decoding processes: none outlives its training, and a training without its decoder says so."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipe.errors import SAVED
from tests.faults.launched import finish, processes_of, start, steps_done, wait_until

WORDS = ("loader.workers=2", "loader.threads=2", "optimization.epochs=1000", "trainer.log_every_steps=1")
SECONDS_TO_START = 240  # torch is imported twice, one after the other, on a machine that may be busy
TRAINING_AND_LOADING = 4  # the training process, the one that divided, and the two that decode


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """A failing test must not leave an endless training."""
    yield
    for pid in processes_of(tmp_path):
        os.kill(pid, signal.SIGKILL)


def decoding(directory: Path) -> list[int]:
    """The processes that decode and the one that they came from."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes_of(directory)}
    return [pid for pid, command in commands.items() if b"recipe.data.worker" in command]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["training", "divider"])
def test_f02_no_decoding_process_outlives_a_kill(victim: str, data_directory: Path, tmp_path: Path) -> None:
    process = start(tmp_path, data_directory, *WORDS)
    wait_until(lambda: steps_done(tmp_path) > 2, SECONDS_TO_START)
    assert len(processes_of(tmp_path)) == TRAINING_AND_LOADING
    if victim == "training":
        process.kill()
        process.communicate(timeout=10)
    else:
        os.kill(min(decoding(tmp_path)), signal.SIGKILL)
        _, errors = finish(process, 128 + signal.SIGKILL, seconds=30)
        assert "a process that decodes images was ended by SIGKILL" in errors
        assert "Traceback" not in errors
    wait_until(lambda: not processes_of(tmp_path), seconds=10)


@pytest.mark.slow
@pytest.mark.usefixtures("default_signals")
def test_f03_a_signal_to_the_process_group_saves_the_step(data_directory: Path, tmp_path: Path) -> None:
    """Ctrl-C on a terminal, and torchrun's closing signal, reach the processes that decode as well."""
    process = start(tmp_path, data_directory, *WORDS, new_session=True)
    wait_until(lambda: steps_done(tmp_path) > 2, SECONDS_TO_START)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = finish(process, SAVED, seconds=150)
    assert "saved at step" in errors
    assert "Traceback" not in errors
    wait_until(lambda: not processes_of(tmp_path), seconds=10)
