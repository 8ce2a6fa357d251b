"""Level *well-formed*: every file of a recipe can be read, each on its own, so that one broken file hides no other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from recipe.document.run_data import RunData, load
from recipe.errors import UserError
from recipe.files import portable_path
from recipe.records import EnergyRecord, EvaluationRecord, ProjectionRecord, SerializationRecord, TrainingRecord
from recipe.review.findings import Finding, Level
from recipe.run import Run

LARGEST_INTEGER = 2**63


class Reader:
    """Reads the files of a run and remembers what is wrong with them."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.findings: list[Finding] = []

    def facts(self) -> RunData:
        """The files that can be read; one that cannot is None or left out, and a finding."""
        return load(self.run, portable_path(self.run.directory), self._read)

    def _read(self, path: Path, read: Callable[[], Any]) -> Any:
        if not os.path.lexists(path):
            return None
        try:
            value = read()
            refuse_impossible_numbers(value)
        except (UserError, OSError, ValueError, RecursionError) as error:
            self.findings.append(unreadable(self.name_of(path), str(error)))
            return None
        return value

    def name_of(self, path: Path) -> str:
        """A file's name inside the recipe."""
        return path.relative_to(self.run.directory).as_posix()


def unreadable(place: str, why: str) -> Finding:
    return Finding(
        Level.well_formed, place, f"it cannot be read: {why}", "take it from version control, or run its stage again"
    )


def refuse_impossible_numbers(value: Any) -> None:
    """Records hold numbers that a run can have; others stop whoever divides by them. Raises `UserError`."""
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
    if isinstance(value, ProjectionRecord):
        require_possible(value)


def require_possible(record: ProjectionRecord) -> None:
    """Factors that can be divided by, and rows that point at one of the steps."""
    divisors = [step.images_per_second for step in record.steps]
    divisors += [found.images_per_second for found in (record.evaluation, record.loading) if found is not None]
    counts = [record.batch_size, record.epochs, *(row.accelerators for row in record.rows)]
    counts += [record.loading.cores] if record.loading is not None else []
    if not record.steps or min(divisors) <= 0 or min(counts) < 1:
        raise UserError("it holds a projection from a factor that is zero, or from none")
    if any(not 0 <= row.step < len(record.steps) for row in record.rows):
        raise UserError("it holds a projection from a step that it does not have")


def numbers_in(value: Any) -> Iterator[int | float]:
    """Every number of a nested value."""
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(entry)
    elif isinstance(value, int | float):
        yield value
