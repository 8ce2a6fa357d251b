"""Errors for users, each with an exit code (sysexits.h) for schedulers and scripts.

A person who sees one of these reads one sentence that names the value and the way out. A programming error
keeps its traceback. The codes follow sysexits.h.
"""

from __future__ import annotations

import re
import signal
import sys

# Control characters with which untrusted text could move, colour or reorder lines of a terminal. Tab and newline stay.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
SAVED = 75  # stopped from outside, saved, and continued by the same command (EX_TEMPFAIL)


class UserError(ValueError):
    """An error that the user can fix: a wrong value, a missing file, a machine without the requested feature."""

    exit_code = 2


class NonFiniteError(UserError):
    """The loss or the weights are no longer finite (EX_DATAERR)."""

    exit_code = 65


class DiskError(UserError):
    """A file could not be written: the disk is full, read-only or gone (EX_IOERR)."""

    exit_code = 74


class HangError(UserError):
    """Another process of the run did not answer in time (EX_UNAVAILABLE)."""

    exit_code = 69


class WorkerError(UserError):
    """A process of the run stopped. `exit_code` is that process's own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(KeyboardInterrupt):
    """A signal that stops the work as Ctrl-C does."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.exit_code = 128 + number


def how_to_continue() -> str:
    """The advice after an interruption."""
    restarts = any(word.startswith("trainer.start_over=") for word in sys.argv)
    return "run the same command to continue" + (", without trainer.start_over" if restarts else "")
