"""Faults on demand, so that tests break the very code that runs in production.

`FAULT=<name>@<rank>:<step>` makes the process of that rank fail in that way once its run has completed that many steps;
a `+` at the end repeats it in every attempt of an elastic launch, else only the first attempt is struck. Where the
variable is unset, nothing happens. The names:

    kill          the process ends at once, as by SIGKILL
    stop          the process gets SIGTERM, as from a scheduler
    interrupt     the same with SIGINT
    hang          the process sleeps for an hour
    error         an exception that nobody expects
    nan           the weights of this process are no numbers any more
    joining       SIGTERM before the processes have found one another
    beginning     SIGTERM when they have, before anything is built; of joining and beginning the step is 0
    naming        SIGKILL when a file is written and has not got its name yet; the step counts such files of a process
    validation    SIGTERM as the next validation begins

`stop`, `joining`, `beginning` and `validation` with `-launcher` behind them strike the parent process instead, with
`-group` the whole process group; this process goes on when it has heard of it.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

VARIABLE = "FAULT"
_files = itertools.count()  # written so far by this process
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"


def is_due(name: str, rank: int, step: int) -> bool:
    """Whether the fault of this name is to strike here and now."""
    fault = os.environ.get(VARIABLE)
    if fault is None or not fault.startswith(f"{name}@"):
        return False
    is_repeated = fault.endswith("+")
    if not is_repeated and os.environ.get(ATTEMPT, "0") != "0":
        return False
    return fault.rstrip("+") == f"{name}@{rank}:{step}"


def strike(rank: int, step: int, weights: Iterable[Any]) -> None:
    """What befalls a whole process between two steps."""
    for name, number in (("kill", signal.SIGKILL), ("interrupt", signal.SIGINT)):
        if is_due(name, rank, step):
            os.kill(os.getpid(), number)
    stop("stop", rank, step)
    if is_due("nan", rank, step):
        for tensor in weights:
            tensor.detach().fill_(float("nan"))
    if is_due("hang", rank, step):
        time.sleep(3600)
    if is_due("error", rank, step):
        raise RuntimeError(f"a fault that was asked for, at step {step}")


def strike_file() -> None:
    """What befalls a process that writes a file."""
    if VARIABLE in os.environ and is_due("naming", int(os.environ.get("RANK", "0")), next(_files)):
        os.kill(os.getpid(), signal.SIGKILL)


def stop(place: str, rank: int, step: int) -> None:
    """SIGTERM at this place, to this process, its launcher or its group."""
    if is_due(place, rank, step):
        os.kill(os.getpid(), signal.SIGTERM)
    if is_due(f"{place}-launcher", rank, step):
        _send_and_hear(lambda: os.kill(os.getppid(), signal.SIGTERM))
    if is_due(f"{place}-group", rank, step):
        _send_and_hear(lambda: os.killpg(0, signal.SIGTERM))


def _send_and_hear(send: Callable[[], None]) -> None:
    """Send SIGTERM to others and wait until it was handed on to this process, which may end by it."""
    handler, heard = signal.getsignal(signal.SIGTERM), [False]

    def noting(number: int, frame: FrameType | None) -> None:
        heard[0] = True
        if callable(handler):
            handler(number, frame)

    if handler is not signal.SIG_DFL:
        signal.signal(signal.SIGTERM, noting)
    send()
    while not heard[0]:
        time.sleep(0.01)
    signal.signal(signal.SIGTERM, handler)
