"""One finding of a check, and text from a recipe made safe for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from recipe.document.formatting import on_one_line

LINE_LENGTH_MAX = 600
CANNOT_TELL = "CANNOT TELL"  # a verdict of watch, a level of reproduce


class Level(str, Enum):
    """The depth of the check of a statement."""

    present = "present"  # it is there
    well_formed = "well-formed"  # it can be read
    resolvable = "resolvable"  # the files that it names are there and agree
    executed = "executed"  # it was measured again


class Kind(str, Enum):
    """The weight of a finding for the exit code: only `finding` fails a check."""

    finding = "finding"
    note = "note"  # missing, but not asked for by the guideline
    cannot_tell = "cannot tell"


@dataclass(frozen=True)
class Finding:
    level: Level
    place: str  # a file, with its section, line or field
    what: str
    mend: str = ""
    kind: Kind = Kind.finding

    def lines(self) -> list[str]:
        """The finding on one line, its remedy on another."""
        place, what, mend = (shorten(text, LINE_LENGTH_MAX) for text in (self.place, self.what, self.mend))
        line = f"{self.kind.value.upper()} [{self.level.value}] {place}: {what}"
        return [line, f"    mend: {mend}"] if mend else [line]


def shorten(value: object, length: int = 60) -> str:
    """A value on one line of a terminal: no control characters, no reordering, not longer than `length`."""
    line = on_one_line(str(value))
    return line if len(line) <= length else line[:length] + " ..."


def first_few(names: Sequence[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
