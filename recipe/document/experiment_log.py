"""Read the experiment log: the stages that ran under one name, from `runs/journal.jsonl`.

Each stage appends a line when it starts and another when it ends. Here the two are joined, and a training is compared
with its parent: the newest training before it with another configuration. The log may be long, cut off or edited: lines
that do not fit are counted and skipped, and the number of kept ones is bounded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec.structs import replace

from recipe.config.identity import differences
from recipe.errors import UserError
from recipe.run.directory import JOURNAL, Run, place_of
from recipe.run.files import is_elsewhere, opened, portable_path
from recipe.run.records import JournalEntry, JournalRecord

BYTES_READ_MAX = 16 * 2**20  # from the end of the log
ENTRIES_MAX = 200
CHANGES_MAX = 20
CHANGE_LENGTH_MAX = 200
ENDED, STOPPED, NO_END = "ended", "stopped", "no end was written"

Scalar = str | int | float | bool | None


class LogLine(msgspec.Struct, frozen=True):
    """The fields of a line that are used here."""

    time: str
    run: str
    stage: str
    event: str
    place: str | None = None  # from `place_of`; None in lines of older versions
    name: str | None = None
    step: int | None = None
    top1_accuracy: float | None = None  # of evaluate
    validation_top1_accuracy: float | None = None  # of train
    config_sha256: str | None = None
    config: dict[str, Scalar | list[Scalar]] | None = None  # pinned settings by their dotted keys, without descriptions


@dataclass
class Attempt:
    """A stage that was started, and its end."""

    start: LogLine
    end: LogLine | None = None

    def is_of(self, name: str | None, run: str, place: str | None) -> bool:
        """Whether it belongs to this name or to this run."""
        if name is not None and self.start.name == name:
            return True
        if self.start.place is None:  # an older line, which could be of any place outside the checkout
            return self.start.run == run and not is_elsewhere(run)
        return self.start.place == place


def update_log_record(run: Run, shown_run_dir: str) -> None:
    """Copy the log's entries of this run's name into the run's records, from which the document is rendered.

    The existing record stays where the log has no entry: it is another log, or was deleted.
    """
    config = run.read_config()
    name = str(config["name"]) if config else None
    record = read_log(JOURNAL, name, portable_path(run.directory), place_of(run.directory))
    if not record.entries:
        record = run.read(JournalRecord) or record
    run.write(replace(record, run_dir=shown_run_dir))


def read_log(log: Path, name: str | None, run: str, place: str | None = None) -> JournalRecord:
    """Every stage of the runs of this name, and of this run, oldest first."""
    lines, unreadable = read_lines(log)
    entries = list(journal_entries([attempt for attempt in attempts(lines) if attempt.is_of(name, run, place)]))
    return JournalRecord(
        name=name or "",
        entries=entries[-ENTRIES_MAX:],
        earlier_entries=max(0, len(entries) - ENTRIES_MAX),
        unreadable_lines=unreadable,
    )


def read_lines(log: Path) -> tuple[list[LogLine], int]:
    """The newest lines, and the number of those that could not be read. None where the file cannot be read."""
    try:
        with opened(log, str(log), sys.maxsize) as handle:
            size = handle.seek(0, 2)
            handle.seek(max(0, size - BYTES_READ_MAX))
            content = handle.read()
    except UserError:
        return [], 0
    if size > BYTES_READ_MAX:
        content = content.partition(b"\n")[2]
    lines: list[LogLine] = []
    unreadable = 0
    for line in filter(bytes.strip, content.split(b"\n")):
        try:
            lines.append(msgspec.json.decode(line, type=LogLine))
        except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
            unreadable += 1
    return lines, unreadable


def attempts(lines: list[LogLine]) -> list[Attempt]:
    """Starts joined with their ends, in the order of the starts."""
    started: list[Attempt] = []
    running: dict[tuple[str, str], Attempt] = {}
    for line in lines:
        stage = (line.place or line.run, line.stage)
        if line.event == "started":
            running[stage] = Attempt(line)
            started.append(running[stage])
        elif stage in running and line.event in (ENDED, STOPPED):
            running.pop(stage).end = line
    return started


def journal_entries(joined: list[Attempt]) -> Iterator[JournalEntry]:
    """Each attempt with its parent and the changes from it."""
    names = run_names([attempt.start for attempt in joined])
    trained: list[LogLine] = []
    for attempt in joined:
        start, end = attempt.start, attempt.end
        parent, changed = None, []
        if start.config is not None:
            parent = next((line for line in reversed(trained) if line.config_sha256 != start.config_sha256), None)
            trained.append(start)
        if parent is not None:
            changed = differences(parent.config or {}, start.config or {}) or ["descriptions only"]
        accuracies = (end.top1_accuracy, end.validation_top1_accuracy) if end else ()
        yield JournalEntry(
            time=start.time[:40],
            run=names[start.run, start.place],
            stage=start.stage[:40],
            outcome=end.event if end else NO_END,
            step=end.step if end else None,
            top1_accuracy=next((accuracy for accuracy in accuracies if accuracy is not None), None),
            config_sha256=start.config_sha256[:64] if start.config_sha256 else None,
            parent=names[parent.run, parent.place] if parent else None,
            changed=[change[:CHANGE_LENGTH_MAX] for change in changed[:CHANGES_MAX]],
            changes=len(changed),
        )


def run_names(lines: list[LogLine]) -> dict[tuple[str, str | None], str]:
    """(run, place) -> the run's recorded path, numbered where several places have the same one."""
    places: dict[str, list[str]] = {}
    names: dict[tuple[str, str | None], str] = {}
    for line in lines:
        known = places.setdefault(line.run, [])
        if line.place is not None and line.place not in known:
            known.append(line.place)
        number = known.index(line.place) + 1 if line.place is not None else 1
        names[line.run, line.place] = line.run[:CHANGE_LENGTH_MAX] + (f" ({number})" if number > 1 else "")
    return names
