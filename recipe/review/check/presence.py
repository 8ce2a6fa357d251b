"""Level *present*: which items of the guideline a document holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from recipe.review.check.checklist import ITEMS, Item
from recipe.review.check.page import Page
from recipe.review.findings import Finding, Kind, Level

UNKNOWN, NOT_MEASURED = "*unknown*", re.compile(r"Not measured yet: run (?:`([^`\n]{1,400})`|<code>(.{1,400}?)</code>)")
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
class ItemState:
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


def seen_items(page: Page) -> list[ItemState]:
    """Every item, looked for in the generated block that holds it."""
    return [seen_item(page, item) for item in ITEMS]


def seen_item(page: Page, item: Item) -> ItemState:
    block = page.blocks.get(item.block)
    if block is None:
        return ItemState(item, "missing")
    content = block.content.replace("\r\n", "\n")
    row = re.search(item.row, content, re.MULTILINE)
    if row is None:
        match = NOT_MEASURED.search(content, max(content.find(SUBSECTIONS.get(item.name, "")), 0))
        command = (match[1] or match[2]) if match else ""
        return ItemState(item, "not measured" if match else "missing", page.place(item.block), command)
    line = content[row.start() :].partition("\n")[0]
    is_unknown = UNKNOWN in line or "spread unknown" in line
    return ItemState(item, "unknown" if is_unknown else "present", page.place(item.block))


def presence_findings(page: Page, seen: list[ItemState]) -> list[Finding]:
    """Missing blocks, stages that were not run, and items that are missing or unknown."""
    missing_blocks = [block_id for block_id in BLOCKS if block_id not in page.blocks]
    findings = [
        Finding(
            Level.present,
            f"{page.name}, section {HEADINGS[block_id]}",
            f"the generated block {block_id!r} is not there",
            "run a stage of this run again: it writes missing blocks where they belong",
        )
        for block_id in missing_blocks
    ]
    findings += not_measured(seen)
    for one in seen:
        if one.state == "unknown" or (one.state == "missing" and one.item.block not in missing_blocks):
            findings.append(item_finding(one))
    return findings


def not_measured(seen: list[ItemState]) -> list[Finding]:
    """One finding for each command that has not run; a note where the guideline does not ask for its items."""
    commands: dict[str, list[ItemState]] = {}
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


def item_finding(one: ItemState) -> Finding:
    """An item that the document calls unknown, or whose row is missing."""
    what = f"{one.item.section}: {one.item.name} is {'*unknown*' if one.state == 'unknown' else 'missing'}"
    mend = MENDS.get(one.item.name, "say it under a `description` key of the configuration, and run the stage again")
    return Finding(Level.present, one.where, what, mend, Kind.finding if one.item.required else Kind.note)


MENDS = {
    "number of runs and spread": "train more seeds: `python train.py -m seed=1,2,3`",
    "tolerance: when a second run is on track": "it follows from the spread of several seeds: "
    "`python train.py -m seed=1,2,3`",
}
