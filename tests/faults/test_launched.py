"""Faults of processes, by either launch: a clear end for a person or a scheduler, and nothing lost."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from recipe.errors import SAVED
from recipe.run.directory import Run
from recipe.run.records import TrainingRecord
from tests.faults.launched import BOTH, OURS, TORCHRUN, finish, processes_of, start, steps_done, wait_until, weights_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # seconds on a quiet machine, minutes on a busy one
    pytest.mark.usefixtures("default_signals"),
]
ENDLESS = ("optimization.epochs=500", "trainer.log_every_steps=1")
SHORT = ("optimization.epochs=2",)


@pytest.fixture(scope="session")
def uninterrupted(data_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of two undisturbed processes."""
    directory = tmp_path_factory.mktemp("whole")
    output, _ = finish(start(directory, data_directory, *SHORT, "trainer.gpus=2"), 0)
    return weights_of(output)


@pytest.mark.parametrize("launch", BOTH)
def test_f01_a_killed_rank_is_restarted_and_ends_with_the_uninterrupted_weights(
    launch: str, data_directory: Path, tmp_path: Path, uninterrupted: str
) -> None:
    """Fault 1: rank 1 vanishes at step 13. The next attempt continues after the checkpoint of step 9."""
    launcher, words = BOTH[launch]
    restarts = ("trainer.max_restarts=1",) if launcher == OURS else ()
    launcher = (*launcher, "--max-restarts=1") if launcher == TORCHRUN else launcher
    process = start(tmp_path, data_directory, *SHORT, *words, *restarts, launcher=launcher, fault="kill@1:13")
    output, _ = finish(process, 0)
    assert weights_of(output) == uninterrupted
    record = Run(tmp_path / "x").read(TrainingRecord)
    assert record is not None
    assert [session.first_step for session in record.sessions] == [0, 9]


@pytest.mark.parametrize("launch", BOTH)
def test_f02_no_process_outlives_its_launcher(launch: str, data_directory: Path, tmp_path: Path) -> None:
    """Fault 2, and 14: the launcher is killed. The run directory is free again and the next command continues."""
    launcher, words = BOTH[launch]
    process = start(tmp_path, data_directory, *ENDLESS, *words, launcher=launcher)
    wait_until(lambda: steps_done(tmp_path) > 12)
    assert len(processes_of(tmp_path)) >= 3
    process.kill()
    process.communicate(timeout=10)
    wait_until(lambda: not processes_of(tmp_path), seconds=3)
    continued = start(tmp_path, data_directory, *ENDLESS, *words, launcher=OURS, fault="stop@0:20")
    if launch == "ours":
        assert "continuing in epoch" in finish(continued, SAVED)[1]
    else:
        continued.kill()
        continued.communicate(timeout=10)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_f03_a_signal_to_our_launcher_saves_the_step(number: int, data_directory: Path, tmp_path: Path) -> None:
    """Fault 3. SIGTERM comes below."""
    process = start(tmp_path, data_directory, *ENDLESS, "trainer.gpus=2", new_session=True)
    wait_until(lambda: steps_done(tmp_path) > 12)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # what a terminal does
    else:
        process.send_signal(number)
    _, errors = finish(process, SAVED)
    assert "saved at step" in errors
    assert "run the same command to continue" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("gpus", [1, 2])
def test_f03_a_terminal_that_closes_saves_the_step(gpus: int, data_directory: Path, tmp_path: Path) -> None:
    """SIGHUP to all processes of the terminal, twice as from its shell, while nothing can be written to it any more."""
    ours, theirs = pty.openpty()
    process = start(tmp_path, data_directory, *ENDLESS, f"trainer.gpus={gpus}", terminal=theirs)
    os.close(theirs)
    threading.Thread(target=read_until_closed, args=(ours,), daemon=True).start()
    wait_until(lambda: steps_done(tmp_path) > 12)
    os.close(ours)
    time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(100) == SAVED
    wait_until(lambda: not processes_of(tmp_path), seconds=10)
    _, errors = finish(start(tmp_path, data_directory, *ENDLESS, f"trainer.gpus={gpus}", fault="stop@0:20"), SAVED)
    assert "continuing in epoch 2 at step" in errors


def read_until_closed(descriptor: int) -> None:
    """As a terminal does, which would otherwise be full one day."""
    with suppress(OSError):
        while os.read(descriptor, 2**16):
            pass


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_f03_what_was_ignored_at_the_start_stays_ignored(
    number: int, gpus: int, data_directory: Path, tmp_path: Path
) -> None:
    """SIGHUP under nohup, SIGINT in a background job, sent to the process group: launcher and processes."""
    before = signal.signal(number, signal.SIG_IGN)
    process = start(tmp_path, data_directory, *ENDLESS, f"trainer.gpus={gpus}", new_session=True)
    signal.signal(number, before)
    wait_until(lambda: steps_done(tmp_path) > 3)
    done = steps_done(tmp_path)
    os.killpg(process.pid, number)
    wait_until(lambda: steps_done(tmp_path) > done + 9)
    process.terminate()
    _, errors = finish(process, SAVED)
    assert "SIGTERM: saving after this step" in errors


def test_f03_a_hang_up_of_torchrun_saves_the_step(data_directory: Path, tmp_path: Path) -> None:
    """Its exit code is torchrun's own."""
    process = start(tmp_path, data_directory, *ENDLESS, launcher=TORCHRUN)
    wait_until(lambda: steps_done(tmp_path) > 12)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=120)
    assert "saved at step" in errors


def two_agents(directory: Path, data: Path, *words: str, fault: str | None = None) -> list[subprocess.Popen[str]]:
    """Two "nodes" of one process each, on this machine, that meet at one of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d", "--rdzv-id=two"]
    options += [f"--rdzv-endpoint=localhost:{port}", "--local-addr=localhost"]
    launcher = (sys.executable, "-m", "torch.distributed.run", *options)
    return [start(directory, data, *words, launcher=launcher, fault=fault) for _ in range(2)]


def test_f01_a_killed_process_of_two_nodes_is_restarted_and_ends_with_the_weights_of_one_node(
    data_directory: Path, tmp_path: Path, uninterrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the export that training asks for if torch needs it. Both agents start their process again."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    agents = two_agents(tmp_path, data_directory, *SHORT, fault="kill@1:13")
    ended = [finish(agent, 0) for agent in agents]
    (output,) = (output for output, _ in ended if "weights_sha256" in output)
    assert weights_of(output) == uninterrupted
    record = Run(tmp_path / "x").read(TrainingRecord)
    assert record is not None
    first_steps = [session.first_step for session in record.sessions]
    assert first_steps in ([0, 9], [0, 9, 9])  # each agent counts restarts for itself, so the fault may strike both


STOPS = (
    ("joining-launcher@1:0", "stopped before the start"),
    ("beginning-launcher@1:0", "saved at step 0,"),
    ("stop-launcher@1:0", "saved at step 1,"),
    ("validation-launcher@0:9", "saved at step 9,"),
    ("stop-group@1:13", "saved at step 14,"),
    ("validation-group@1:18", "saved at step 18,"),
)


def test_f03_signals_to_launcher_and_group_save_wherever_they_come(
    data_directory: Path, tmp_path: Path, uninterrupted: str
) -> None:
    """Before and in the first step, in an epoch, in validation. Each command continues the one before."""
    words = (*SHORT, "trainer.gpus=2")
    for fault, said in STOPS:
        process = start(tmp_path, data_directory, *words, fault=fault, new_session=True)
        _, errors = finish(process, SAVED)
        assert said in errors, fault
        assert "run the same command to continue" in errors, fault
        assert "Traceback" not in errors, fault
    output, _ = finish(start(tmp_path, data_directory, *words), 0)
    assert weights_of(output) == uninterrupted
    record = Run(tmp_path / "x").read(TrainingRecord)
    assert record is not None
    assert [(session.first_step, session.is_exact) for session in record.sessions] == [
        (0, None),
        *((step, True) for step in (0, 1, 9, 14, 18)),
    ]


def test_f18_a_fault_at_every_start_ends_after_the_restarts(data_directory: Path, tmp_path: Path) -> None:
    """Fault 18."""
    words = (*SHORT, "trainer.gpus=2", "trainer.max_restarts=1")
    process = start(tmp_path, data_directory, *words, fault="kill@0:0+")
    _, errors = finish(process, 137)
    assert "SIGKILL" in errors
