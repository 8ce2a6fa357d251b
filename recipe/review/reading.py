"""Read the records of a recipe one by one, so that a broken file does not hide another (level *well-formed*)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from recipe.document.facts import Facts, gather
from recipe.errors import UserError
from recipe.records import (
    EnergyRecord,
    EvaluationRecord,
    Fingerprint,
    InferenceRecord,
    JournalRecord,
    PreprocessingRecord,
    SerializationRecord,
    TimingRecord,
    TrainingRecord,
    from_json,
)
from recipe.review.findings import Finding, Level
from recipe.run import RECORD_FILES, Run, recorded_path

Value = TypeVar("Value")
LARGEST_INTEGER = 2**63


class RecordReader:
    """Reads the files of a run; an unreadable one is a finding."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.findings: list[Finding] = []

    def facts(self) -> Facts:
        """The facts of all readable files; the others are None or empty."""
        facts = self._facts_by_file()
        if self.findings:
            return facts
        try:
            return gather(self.run, recorded_path(self.run.directory))  # with whatever else a document is made of
        except (UserError, OSError) as error:
            self.findings.append(unreadable("records", str(error)))
            return facts

    def _facts_by_file(self) -> Facts:
        run = self.run
        config = self._read(run.config, run.read_config)
        by_kind = {kind: self._read(run.records / name, partial(run.read, kind)) for kind, name in FILES}
        return Facts(
            name=str(config["name"]) if config else run.directory.absolute().name,
            run_dir=recorded_path(run.directory),
            config=config,
            metrics=self._read(run.metrics, run.metric_rows) or [],
            other_evaluations=self._read_all(run.other_evaluations, EvaluationRecord),
            timing=self._read_all(run.timing, TimingRecord),
            **{name: by_kind[kind] for kind, name in FACTS.items()},
        )

    def _read(self, path: Path, read: Callable[[], Value]) -> Value | None:
        """One file; None where it is absent, or unreadable, which is a finding."""
        if not os.path.lexists(path):
            return None
        try:
            value = read()
            refuse_impossible_numbers(value)
        except (UserError, OSError, ValueError, RecursionError) as error:
            self.findings.append(unreadable(self.name_of(path), str(error)))
            return None
        return value

    def _read_all(self, folder: Path, kind: Any) -> list[Any]:
        found = [self._read(path, partial(self._record, path, kind)) for path in sorted(folder.glob("*.json"))]
        return [record for record in found if record is not None]

    def _record(self, path: Path, kind: Any) -> Any:
        return from_json(self.run.content(path), kind, self.name_of(path))

    def name_of(self, path: Path) -> str:
        return path.relative_to(self.run.directory).as_posix()


FACTS: dict[Any, str] = {
    PreprocessingRecord: "preprocessing",
    TrainingRecord: "training",
    EvaluationRecord: "evaluation",
    SerializationRecord: "serialization",
    InferenceRecord: "inference",
    JournalRecord: "journal",
    Fingerprint: "fingerprint",
    EnergyRecord: "energy",
}
FILES = [(kind, RECORD_FILES[kind]) for kind in FACTS]


def unreadable(place: str, why: str) -> Finding:
    return Finding(
        Level.well_formed, place, f"it cannot be read: {why}", "take it from version control, or run its stage again"
    )


def refuse_impossible_numbers(value: Any) -> None:
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
