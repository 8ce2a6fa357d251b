"""Starts training as a user does, strikes it with a fault, and collects the result."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from recipe.run.directory import Run
from recipe.run.files import CHECKOUT
from tests.builders.configs import SMALL_DEMO

OURS = (sys.executable,)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
COMMON = [
    "experiment=smoke",
    *SMALL_DEMO,
    "optimization.batch_size=12",
    "run_dir=x",
    "trainer.timeout_seconds=60",
]
IN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
BOTH = {"ours": (OURS, ("trainer.gpus=2",)), "torchrun": (TORCHRUN, ())}


def start(
    directory: Path,
    data: Path,
    *words: str,
    launcher: tuple[str, ...] = OURS,
    fault: str | None = None,
    new_session: bool = False,
    terminal: int | None = None,
) -> subprocess.Popen[str]:
    """Start a training in `directory`, in the run `x` unless the words say otherwise. A fault goes through inject.py.

    With a `terminal` it runs and prints there, as in the foreground of its shell.
    """
    common = [*COMMON, f"data.directory={data}"]
    script = "tests/faults/inject.py" if fault else "train.py"
    if terminal is not None:
        launcher = (sys.executable, "-c", IN_TERMINAL, *launcher)
    return subprocess.Popen(
        [*launcher, str(CHECKOUT / script), *common, *words],
        cwd=directory,
        env=os.environ | ({"FAULT": fault} if fault else {}),
        text=True,
        stdin=terminal,
        stdout=subprocess.PIPE if terminal is None else terminal,
        stderr=subprocess.PIPE if terminal is None else terminal,
        start_new_session=new_session or terminal is not None,
    )


def finish(process: subprocess.Popen[str], code: int, seconds: float = 300) -> tuple[str, str]:
    """Its output, after it ended with this exit code."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == code, output + errors
    return output, errors


def weights_of(output: str) -> str:
    """The weights hash: the last line of training."""
    name, value = output.strip().splitlines()[-1].split()
    assert name == "weights_sha256"
    return value


def wait_until(condition: Callable[[], object], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_done(directory: Path) -> int:
    """The last step that the run has noted."""
    rows = Run(directory / "x").metric_rows()
    return rows[-1]["step"] if rows else 0


def processes_of(directory: Path) -> list[int]:
    """Every process that works in this directory."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            is_here = entry.name.isdigit() and (entry / "cwd").resolve() == directory.resolve()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0] if is_here else "Z"
        except OSError:  # it ended meanwhile
            continue
        if is_here and state != "Z" and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found
