"""Read the records of a recipe one by one, so that a broken file does not hide another (level *well-formed*)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from recipe.document.run_data import RunData, load
from recipe.errors import UserError
from recipe.review.findings import Finding, Level
from recipe.run.directory import Run
from recipe.run.files import portable_path
from recipe.run.records import EnergyRecord, EvaluationRecord, SerializationRecord, TrainingRecord

LARGEST_INTEGER = 2**63


class RecordReader:
    """Reads the files of a run; an unreadable one is a finding."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.findings: list[Finding] = []

    def facts(self) -> RunData:
        """The facts of all readable files; the others are None or empty."""
        return load(self.run, portable_path(self.run.directory), self._read)

    def _read(self, path: Path, read: Callable[[], Any]) -> Any:
        """One file; None where it is absent, or unreadable, which is a finding."""
        if not os.path.lexists(path):
            return None
        try:
            value = read()
            check_numbers(value)
        except (UserError, OSError, ValueError, RecursionError) as error:
            self.findings.append(unreadable(self.name_of(path), str(error)))
            return None
        return value

    def name_of(self, path: Path) -> str:
        return path.relative_to(self.run.directory).as_posix()


def unreadable(place: str, why: str) -> Finding:
    return Finding(
        Level.well_formed, place, f"it cannot be read: {why}", "take it from version control, or run its stage again"
    )


def check_numbers(value: Any) -> None:
    """Raise `UserError` for numbers that no run has: readers divide by some of them."""
    plain = msgspec.to_builtins(value)
    json.dumps(plain, allow_nan=False)  # msgspec would let infinity through, as 1e999
    if any(isinstance(number, int) and abs(number) >= LARGEST_INTEGER for number in numbers_in(plain)):
        raise UserError("it holds an integer that nothing here counts to")
    if isinstance(value, TrainingRecord) and (value.schedule.steps_per_epoch < 1 or value.schedule.steps < 1):
        raise UserError("it holds a training without steps")
    if isinstance(value, EvaluationRecord | SerializationRecord) and value.images < 1:
        raise UserError("it holds a count over no image")
    if isinstance(value, EnergyRecord) and (value.seconds <= 0 or value.joules < 0):
        raise UserError("it holds an energy of no time, or a negative one")


def numbers_in(value: Any) -> Iterator[int | float]:
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(entry)
    elif isinstance(value, int | float):
        yield value
