"""Level *present*: the guideline's checklist with this project's additions, and which of its items a page holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from recipe.document.blocks import Block, Prose, edited_blocks, split
from recipe.errors import UserError
from recipe.review.findings import Finding, Kind, Level

GUIDELINE, EXTENSION = "guideline", "extension"


@dataclass(frozen=True)
class Item:
    """One thing that a reader needs: a row of the generated block `block`, matched by `row`.

    A missing item that is not `required` is a note.
    """

    section: str
    name: str
    block: str
    row: str
    source: str = GUIDELINE
    required: bool = True


RAW, PROCESSING = "Data / Raw data", "Data / Processing methods"
OPTIMIZATION, METRICS = "Training / Optimization methods", "Training / Performance metrics"
INFERENCE, REST, TWIN = "Inference", "Miscellaneous", "Machine-readable form"
COMMAND = r"^\*\*Code\*\*: `?(<code>)?(python|torchrun) \S+"
RAN = r"^\*\*Code\*\*: .*(commit|identified by its content)"

ITEMS = (
    Item(RAW, "description of the data", "raw_data", r"^\| Summary \|"),
    Item(RAW, "how the data came to be", "raw_data", r"^\| Origin \|"),
    Item(RAW, "labels and their schema", "raw_data", r"^\| Labels \|"),
    Item(RAW, "label convention with examples", "raw_data", r"^\| Examples of labels \|", EXTENSION),
    Item(RAW, "known biases", "raw_data", r"^\| Known biases \|", required=False),
    Item(RAW, "schema for adding samples", "raw_data", r"^\| Adding samples \|", required=False),
    Item(RAW, "path", "raw_data", r"^\| Path \|"),
    Item(RAW, "access rules", "raw_data", r"^\| Access \|"),
    Item(RAW, "licence", "raw_data", r"^\| Licence \|", EXTENSION),
    Item(RAW, "split sizes", "raw_data", r"^\| Split \(\*measured\*\) \|", EXTENSION),
    Item(RAW, "data checksums", "hashes", r"^\| raw images of ", EXTENSION),
    Item(PROCESSING, "description", "processing_methods", r"^\| Stored as \|"),
    Item(PROCESSING, "how the test set is made", "raw_data", r"^\| Test set \|"),
    Item(PROCESSING, "code and command", "processing_methods", COMMAND),
    Item(PROCESSING, "commit", "processing_methods", RAN),
    Item(PROCESSING, "path of the processed data", "processing_methods", r"^\| Processed data \|", required=False),
    Item(OPTIMIZATION, "architecture", "optimization_methods", r"^\| Network \|"),
    Item(OPTIMIZATION, "loss", "optimization_methods", r"^\| Loss \|"),
    Item(OPTIMIZATION, "code and command", "optimization_methods", COMMAND),
    Item(OPTIMIZATION, "commit", "optimization_methods", RAN),
    Item(OPTIMIZATION, "batch size", "optimization_methods", r"^\| Images per optimizer step \|"),
    Item(
        OPTIMIZATION,
        "number of GPUs or processes",
        "optimization_methods",
        r"^\| Images per optimizer step \| .* over [\d,]+ process",
    ),
    Item(OPTIMIZATION, "optimizer", "optimization_methods", r"^\| Optimizer \|"),
    Item(OPTIMIZATION, "weight decay", "optimization_methods", r"^\| Parameters: .*\bweight_decay\b"),
    Item(OPTIMIZATION, "learning rate and its schedule", "optimization_methods", r"^\| Learning rate at step \|"),
    Item(OPTIMIZATION, "length of training", "optimization_methods", r"^\| Length \|"),
    Item(OPTIMIZATION, "augmentation", "optimization_methods", r"^\| Augmentation \|"),
    Item(OPTIMIZATION, "initial weights", "optimization_methods", r"^\| Initial weights \|", required=False),
    Item(OPTIMIZATION, "seed", "optimization_methods", r"^\| Seed \|", EXTENSION),
    Item(OPTIMIZATION, "level of determinism", "optimization_methods", r"^\| Arithmetic \|", EXTENSION),
    Item(OPTIMIZATION, "environment with versions", "where_it_ran", r"^\| Versions \|", EXTENSION),
    Item(OPTIMIZATION, "training hardware", "summary", r"^\| \*\*Hardware\*\* \|", EXTENSION),
    Item(OPTIMIZATION, "dynamics: total time", "dynamics", r"^\| Training \|"),
    Item(OPTIMIZATION, "dynamics: losses and metrics over time", "dynamics", r"^\| Epoch \(\*measured\*\) \|"),
    Item(OPTIMIZATION, "outputs: where the model is", "outputs", r"^Weights: "),
    Item(OPTIMIZATION, "checkpoint selection", "outputs", r"Selection: ", EXTENSION),
    Item(METRICS, "target metrics", "performance_metrics", r"^\| \*\*Top-1 accuracy\*\* \|"),
    Item(METRICS, "code and command", "performance_metrics", COMMAND),
    Item(METRICS, "commit", "performance_metrics", RAN),
    Item(METRICS, "evaluation protocol", "performance_metrics", r"^\| Protocol \(\*recorded\*\) \|", EXTENSION),
    Item(METRICS, "number of runs and spread", "performance_metrics", r"^\| Runs \|", EXTENSION, required=False),
    Item(
        METRICS,
        "tolerance: when a second run is on track",
        "performance_metrics",
        r"^\| Tolerance \|",
        EXTENSION,
        required=False,
    ),
    Item(METRICS, "expected result and its source", "summary", r"^\| \*\*Expected\*\* \|", EXTENSION, required=False),
    Item(INFERENCE, "code", "inference", r"The notebook `inference\.ipynb`"),
    Item(INFERENCE, "timing", "inference", r"^\| Hardware \| Pixels \| Backend \|"),
    Item(INFERENCE, "serialization", "inference", r"^\| Variant \(\*measured\*\) \|", required=False),
    Item(
        INFERENCE,
        "parity of the exported model",
        "inference",
        r"^\| Variant \(.*Images that change their class",
        EXTENSION,
        required=False,
    ),
    Item(REST, "papers", "miscellaneous", r"^- .+ \(\*declared\*\)", required=False),
    Item(REST, "journal of experiments", "miscellaneous", r"^### Journal", required=False),
    Item(REST, "action items", "miscellaneous", r"(?s)### Action items\n\n- ", required=False),
    Item(TWIN, "configuration for programs", "recipe", r"^```json", EXTENSION),
    Item(TWIN, "verification command", "run_again", r"hash of its weights", EXTENSION, required=False),
)


STRAY_MARKER = re.compile(r"<!--\s*/?recipe:", re.IGNORECASE)
LINK = re.compile(r"\]\((?P<target>[^()\s]+)\)")


@dataclass(frozen=True)
class Page:
    """One document and its name for a person."""

    name: str
    text: str

    @cached_property
    def damage(self) -> str | None:
        """Why the document cannot be cut into prose and generated blocks; None where it can."""
        try:
            split(self.text)
        except UserError as error:
            return str(error)
        return None

    @cached_property
    def pieces(self) -> list[Prose | Block]:
        """Prose and blocks in order; everything is prose where the structure is damaged."""
        return split(self.text) if self.damage is None else [Prose(self.text)]

    @cached_property
    def blocks(self) -> dict[str, Block]:
        """Block id -> block."""
        return {piece.id: piece for piece in self.pieces if isinstance(piece, Block)}

    @cached_property
    def edited(self) -> list[str]:
        """The ids of the blocks whose content is not what their marker says."""
        return [block.id for block in edited_blocks(self.pieces)]

    @cached_property
    def stray_markers(self) -> list[str]:
        """Lines of people that begin as a marker does, and are none."""
        lines = (line for piece in self.pieces if isinstance(piece, Prose) for line in piece.text.splitlines())
        return [line for line in lines if STRAY_MARKER.match(line)]

    @cached_property
    def block_lines(self) -> dict[str, int]:
        """Block id -> the number of its first line."""
        found, number = {}, 1
        for piece in self.pieces:
            if isinstance(piece, Block):
                found[piece.id] = number
            number += piece.text.count("\n")
        return found

    def place(self, block_id: str) -> str:
        """Where a block is, for a finding."""
        line = self.block_lines.get(block_id)
        return f"{self.name}, block {block_id}" + (f" (line {line})" if line else "")

    @cached_property
    def links(self) -> list[tuple[str, int]]:
        """(target, line number) of every relative link and picture; addresses and anchors are left out."""
        return [
            (found["target"], number)
            for number, line in enumerate(self.text.split("\n"), start=1)
            for found in LINK.finditer(line)
            if "://" not in found["target"] and not found["target"].startswith(("#", "mailto:"))
        ]


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
    "where_it_ran": "Where it ran",
    "hashes": "Miscellaneous / Hashes",
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
