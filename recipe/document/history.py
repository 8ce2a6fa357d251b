"""The Journal section: what was tried under one name, read from `runs/journal.jsonl`.

Each stage leaves a line when it starts and another when it ends; here the two are joined, and a training is compared
with its parent, the newest one before it whose configuration was another. The journal may be long, cut off or edited:
a line that does not fit is counted and passed over, and what is kept is bounded.
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
from recipe.files import opened
from recipe.records import JournalEntry, JournalRecord
from recipe.run import JOURNAL, Run, is_elsewhere, place_of, recorded_path

NEWEST_BYTES = 16 * 2**20  # of the journal that are read
ENTRIES_KEPT = 200
CHANGES_KEPT = 20
LONGEST_CHANGE = 200
ENDED, STOPPED, NO_END = "ended", "stopped", "no end was written"
ACCURACIES = ("top1_accuracy", "validation_top1_accuracy")  # of the lines of evaluate and train

Scalar = str | int | float | bool | None


class Line(msgspec.Struct, frozen=True):
    """One line of the journal, as far as it is used here."""

    time: str
    run: str
    stage: str
    event: str
    place: str | None = None  # what `place_of` gave; None in lines of older versions
    name: str | None = None
    step: int | None = None
    top1_accuracy: float | None = None
    validation_top1_accuracy: float | None = None
    config_sha256: str | None = None
    config: dict[str, Scalar | list[Scalar]] | None = None  # pinned settings by their dotted keys, without descriptions


@dataclass
class Attempt:
    """A stage that was started, and how it ended."""

    start: Line
    end: Line | None = None

    def is_of(self, name: str | None, run: str, place: str | None) -> bool:
        """Whether it belongs to this name or to this run."""
        if name is not None and self.start.name == name:
            return True
        if self.start.place is None:  # an older line, which could be of any place outside the checkout
            return self.start.run == run and not is_elsewhere(run)
        return self.start.place == place


def keep_history(run: Run, shown_run_dir: str) -> None:
    """Copy what the journal says about this run's name into the run's records, where the document takes it from.

    What was copied before stays where the journal has nothing: it is another one, or was thrown away.
    """
    config = run.read_config()
    found = history(
        JOURNAL, str(config["name"]) if config else None, recorded_path(run.directory), place_of(run.directory)
    )
    kept = found if found.entries else run.read(JournalRecord) or found
    run.write(replace(kept, run_dir=shown_run_dir))


def history(journal: Path, name: str | None, run: str, place: str | None = None) -> JournalRecord:
    """Every stage of the runs of this name, and of this run, oldest first."""
    lines, unreadable = read_lines(journal)
    found = [attempt for attempt in attempts(lines) if attempt.is_of(name, run, place)]
    entries = list(entries_of(found))
    return JournalRecord(
        name=name or "",
        entries=entries[-ENTRIES_KEPT:],
        earlier_entries=max(0, len(entries) - ENTRIES_KEPT),
        unreadable_lines=unreadable,
    )


def read_lines(journal: Path) -> tuple[list[Line], int]:
    """The newest lines, and how many could not be read."""
    lines: list[Line] = []
    unreadable = 0
    for content in newest(journal).split(b"\n"):
        if not content.strip():
            continue
        try:
            lines.append(msgspec.json.decode(content, type=Line))
        except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
            unreadable += 1
    return lines, unreadable


def newest(journal: Path) -> bytes:
    """The end of the file, from the beginning of a line; nothing where it cannot be read."""
    try:
        with opened(journal, str(journal), sys.maxsize) as handle:
            size = handle.seek(0, 2)
            handle.seek(max(0, size - NEWEST_BYTES))
            content = handle.read()
    except UserError:
        return b""
    return content.partition(b"\n")[2] if size > NEWEST_BYTES else content


def attempts(lines: list[Line]) -> list[Attempt]:
    """Starts joined with their ends, in the order of the starts."""
    found: list[Attempt] = []
    running: dict[tuple[str, str], Attempt] = {}
    for line in lines:
        stage = (line.place or line.run, line.stage)
        if line.event == "started":
            running[stage] = Attempt(line)
            found.append(running[stage])
        elif stage in running and line.event in (ENDED, STOPPED):
            running.pop(stage).end = line
    return found


def entries_of(found: list[Attempt]) -> Iterator[JournalEntry]:
    """Each attempt beside its parent."""
    names = run_names([attempt.start for attempt in found])
    trained: list[Line] = []
    for attempt in found:
        start = attempt.start
        parent, changed = None, []
        if start.config is not None:
            parent = next((line for line in reversed(trained) if line.config_sha256 != start.config_sha256), None)
            trained.append(start)
        if parent is not None:
            changed = differences(parent.config or {}, start.config or {}) or ["descriptions only"]
        yield entry_of(attempt, names, parent, changed)


def run_names(lines: list[Line]) -> dict[tuple[str, str | None], str]:
    """(run, place) -> the name of a run here: its recorded path, numbered where an earlier place has the same."""
    places: dict[str, list[str]] = {}
    names: dict[tuple[str, str | None], str] = {}
    for line in lines:
        known = places.setdefault(line.run, [])
        if line.place is not None and line.place not in known:
            known.append(line.place)
        number = known.index(line.place) + 1 if line.place is not None else 1
        names[line.run, line.place] = line.run[:LONGEST_CHANGE] + (f" ({number})" if number > 1 else "")
    return names


def entry_of(
    attempt: Attempt, names: dict[tuple[str, str | None], str], parent: Line | None, changed: list[str]
) -> JournalEntry:
    start, end = attempt.start, attempt.end
    accuracies = [value for name in ACCURACIES if end and (value := getattr(end, name)) is not None]
    return JournalEntry(
        time=start.time[:40],
        run=names[start.run, start.place],
        stage=start.stage[:40],
        outcome=end.event if end else NO_END,
        step=end.step if end else None,
        top1_accuracy=accuracies[0] if accuracies else None,
        config_sha256=start.config_sha256[:64] if start.config_sha256 else None,
        parent=names[parent.run, parent.place] if parent else None,
        changed=[change[:LONGEST_CHANGE] for change in changed[:CHANGES_KEPT]],
        changes=len(changed),
    )
