"""Faults on demand, so that tests break the very code that runs in production.

`FAULT=<name>@<rank>:<step>` makes the process of that rank fail in that way once its run has completed that many steps;
a `+` at the end repeats it in every attempt of an elastic launch, else only the first attempt is struck. Where the
variable is unset, nothing happens. The names:

    kill          the process ends at once, as by SIGKILL
    stop          the process sends itself SIGTERM, as a scheduler would
    interrupt     the same with SIGINT
    hang          the process sleeps for an hour
    error         an exception that nobody expects
    nan           the weights of this process are no numbers any more
    validation    SIGTERM as the next validation begins
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from typing import Any

VARIABLE = "FAULT"
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
    for name, number in (("kill", signal.SIGKILL), ("stop", signal.SIGTERM), ("interrupt", signal.SIGINT)):
        if is_due(name, rank, step):
            os.kill(os.getpid(), number)
    if is_due("nan", rank, step):
        for tensor in weights:
            tensor.detach().fill_(float("nan"))
    if is_due("hang", rank, step):
        time.sleep(3600)
    if is_due("error", rank, step):
        raise RuntimeError(f"a fault that was asked for, at step {step}")


def strike_validation(rank: int, step: int) -> None:
    """What befalls a process that validates."""
    if is_due("validation", rank, step):
        os.kill(os.getpid(), signal.SIGTERM)
