"""What a check finds: each finding with its level, its place and its mend; printed safely, or as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from recipe.document.formatting import on_one_line

FORMAT = "check/1"


class Level(str, Enum):
    """How deep a statement about the document was looked into."""

    present = "present"  # it is there
    well_formed = "well-formed"  # it can be read
    resolvable = "resolvable"  # what it names is there and agrees
    executed = "executed"  # it was measured again


class Kind(str, Enum):
    """What a finding means for the exit code: only `finding` fails a check."""

    finding = "finding"
    note = "note"  # missing, but not asked for by the guideline
    cannot_tell = "cannot tell"


@dataclass(frozen=True)
class Finding:
    """One sentence about one place."""

    level: Level
    place: str  # a file, with its section, line or field
    what: str
    mend: str = ""
    kind: Kind = Kind.finding


@dataclass
class Report:
    """Everything that one check found."""

    subject: str
    levels: list[Level]
    findings: list[Finding] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)

    def exit_code(self) -> int:
        """0: no finding; 1: findings."""
        return int(any(found.kind is Kind.finding for found in self.findings))

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "format": FORMAT,
            "subject": self.subject,
            "levels": [level.value for level in self.levels],
            "counts": self.counts(),
            "findings": [
                {key: getattr(value, "value", value) for key, value in asdict(found).items()} for found in self.findings
            ],
            "items": self.items,
        }

    def counts(self) -> dict[str, int]:
        """Kind -> findings."""
        found = Counter(finding.kind for finding in self.findings)
        return {kind.value: found[kind] for kind in Kind}

    def lines(self) -> list[str]:
        """For people: findings first, then what may be one."""
        order = list(Kind)
        ranked = sorted(self.findings, key=lambda found: order.index(found.kind))
        return [
            *(line for found in ranked for line in lines_of(found)),
            f"{printable(self.subject)}: {self.summary()}",
        ]

    def summary(self) -> str:
        """The last line."""
        present = sum(item["state"] == "present" for item in self.items)
        counted = ", ".join(f"{count} {plural(kind, count)}" for kind, count in self.counts().items())
        depth = ", ".join(level.value for level in self.levels)
        return f"{counted}; {present} of {len(self.items)} items present (checked: {depth})"


def plural(kind: str, count: int) -> str:
    return kind if count == 1 or kind == Kind.cannot_tell.value else f"{kind}s"


def lines_of(found: Finding) -> list[str]:
    """A finding in one line, and its mend in another."""
    line = f"{found.kind.value.upper()} [{found.level.value}] {printable(found.place)}: {printable(found.what)}"
    return [line, f"    mend: {printable(found.mend)}"] if found.mend else [line]


def printable(text: str, most: int = 600) -> str:
    """Words of a stranger on one line of a terminal: no control characters, no reordering, no end without measure."""
    line = on_one_line(text)
    return line if len(line) <= most else line[:most] + " ..."


def shortened(value: object, most: int = 60) -> str:
    """A value inside a sentence."""
    return printable(str(value), most)


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
