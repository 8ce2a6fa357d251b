"""Level *present*: which items of the guideline a document holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from recipe.review.check.checklist import EXTENSION, ITEMS, Item
from recipe.review.check.page import Line, Page
from recipe.review.findings import Finding, Kind, Level

UNKNOWN, NOT_MEASURED = "*unknown*", re.compile(r"Not measured yet: run (?:`([^`\n]{1,400})`|<code>(.{1,400}?)</code>)")
READ_CHARACTERS = 2**20  # of a foreign document, and of each of its lines:
READ_LINE_CHARACTERS = 1000
HEADINGS = {
    "raw_data": "Data / Raw data",
    "processing_methods": "Data / Processing methods",
    "optimization_methods": "Training / Optimization methods",
    "dynamics": "Training / Dynamics",
    "outputs": "Training / Outputs",
    "performance_metrics": "Training / Performance metrics",
    "inference": "Inference",
    "miscellaneous": "Miscellaneous",
    "recipe": "The recipe for programs",
    "run_again": "How to run it again",
    "summary": "the summary",
    "legend": "the legend",
}
BLOCKS = tuple(HEADINGS)
SUBSECTIONS = {  # of the block that three commands write
    "timing": "### Timing information",
    "serialization": "### Serialization",
    "parity of the exported model": "### Serialization",
}


@dataclass(frozen=True)
class Seen:
    """One item in one document: `present`, `unknown` (the document says so), `not measured` or `missing`."""

    item: Item
    state: str
    where: str = ""
    command: str = ""  # that would measure it

    def as_json(self) -> dict[str, Any]:
        return {
            "section": self.item.section,
            "item": self.item.name,
            "source": self.item.source,
            "required": self.item.required,
            "state": self.state,
            "where": self.where,
        }


# Documents of this pipeline


def own_items(page: Page) -> list[Seen]:
    """Every item, looked for in the generated block that holds it."""
    return [own_item(page, item) for item in ITEMS]


def own_item(page: Page, item: Item) -> Seen:
    block = page.blocks.get(item.block)
    if block is None:
        return Seen(item, "missing")
    content = block.content.replace("\r\n", "\n")
    row = re.search(item.row, content, re.MULTILINE)
    if row is None:
        command = NOT_MEASURED.search(content, max(content.find(SUBSECTIONS.get(item.name, "")), 0))
        words = (command[1] or command[2]) if command else ""
        return Seen(item, "not measured" if command else "missing", page.place(item.block), words)
    line = content[row.start() :].partition("\n")[0]
    is_unknown = UNKNOWN in line or "spread unknown" in line
    return Seen(item, "unknown" if is_unknown else "present", page.place(item.block))


def own_findings(page: Page, seen: list[Seen]) -> list[Finding]:
    """Blocks that are gone, stages that were not run, and what nobody declared."""
    gone = [block_id for block_id in BLOCKS if block_id not in page.blocks]
    found = [
        Finding(
            Level.present,
            f"{page.name}, section {HEADINGS[block_id]}",
            f"the generated block {block_id!r} is not there",
            "run a stage of this run again: it writes missing blocks anew, where they belong",
        )
        for block_id in gone
    ]
    return found + not_measured(page, seen) + [said(one) for one in seen if says_nothing(one, gone)]


def says_nothing(one: Seen, gone: list[str]) -> bool:
    return one.state == "unknown" or (one.state == "missing" and one.item.block not in gone)


def not_measured(page: Page, seen: list[Seen]) -> list[Finding]:
    """One finding for each command that has not run; a note where the guideline does not ask for its items."""
    commands: dict[str, list[Seen]] = {}
    for one in seen:
        if one.state == "not measured":
            commands.setdefault(one.command, []).append(one)
    return [
        Finding(
            Level.present,
            ones[0].where,
            "not measured yet: " + ", ".join(dict.fromkeys(f"{one.item.section}: {one.item.name}" for one in ones)),
            f"run `{command}`",
            Kind.finding if any(one.item.required for one in ones) else Kind.note,
        )
        for command, ones in commands.items()
    ]


def said(one: Seen) -> Finding:
    """An item that the document itself calls unknown, or whose row is not there."""
    what = f"{one.item.section}: {one.item.name} is {'*unknown*' if one.state == 'unknown' else 'missing'}"
    mend = MENDS.get(one.item.name, "say it under a `description` key of the configuration, and run the stage again")
    return Finding(Level.present, one.where, what, mend, Kind.finding if one.item.required else Kind.note)


MENDS = {
    "number of runs and spread": "train more seeds: `python train.py -m seed=1,2,3`",
    "tolerance: when a second run is on track": "it follows from the spread of several seeds: "
    "`python train.py -m seed=1,2,3`",
}


# Documents of others


def foreign_items(page: Page) -> list[Seen]:
    """Every item, looked for by heading and keyword; that it is true was not checked and cannot be."""
    cut = Page(page.name, "\n".join(line[:READ_LINE_CHARACTERS] for line in page.text[:READ_CHARACTERS].split("\n")))
    return [foreign_item(cut, item) for item in ITEMS]


def foreign_item(page: Page, item: Item) -> Seen:
    looked_at = (("heading", item.heading, page.headings), ("keyword", item.keyword, page.lines))
    for how, expression, lines in (*looked_at, ("keyword", item.keyword, page.pairs)):
        line = first(expression, lines)
        if line is not None:
            return Seen(item, "present", f"{how} in line {line.number}")
    return Seen(item, "missing")


def first(expression: str, lines: list[Line]) -> Line | None:
    pattern = re.compile(expression, re.IGNORECASE)
    return next((line for line in lines if pattern.search(line.text)), None)


def foreign_findings(page: Page, seen: list[Seen]) -> list[Finding]:
    """What no heading and no keyword speaks of, and that nothing beyond that was looked into."""
    missing = [
        Finding(
            Level.present,
            page.name,
            f"{one.item.section}: no heading and no keyword speaks of {one.item.name}"
            + (" (an item that this project adds to the guideline)" if one.item.source == EXTENSION else ""),
            "say it, or emit the document from a run: see README.md",
            Kind.finding if one.item.required else Kind.note,
        )
        for one in seen
        if one.state == "missing"
    ]
    return [*missing, *unread(page), Finding(Level.present, page.name, ONLY_PRESENCE, kind=Kind.cannot_tell)]


ONLY_PRESENCE = (
    "no program of this project wrote this document: items were looked for by heading and keyword, and whether what "
    "it says is true was not checked"
)


def unread(page: Page) -> list[Finding]:
    if len(page.text) <= READ_CHARACTERS:
        return []
    what = f"only the first {READ_CHARACTERS >> 20} MiB were read"
    return [Finding(Level.present, page.name, what, kind=Kind.cannot_tell)]
