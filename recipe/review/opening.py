"""Open a recipe: a run, a published folder, or the document alone, with its JSON block.

It may come from anybody. The document is text with one fenced block of JSON in a known format. Records are decoded by
type. Nothing is run, imported or expanded.

Records are read one by one, so that a broken file does not hide another (level *well-formed*).
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from recipe.config.identity import config_sha256, recipe_id
from recipe.document.blocks import edited_blocks, split
from recipe.document.formatting import on_one_line
from recipe.document.recipe_json import RECIPE_FORMAT
from recipe.document.run_data import RunData, load
from recipe.errors import UserError
from recipe.review.findings import Finding, Level
from recipe.run.directory import Run
from recipe.run.files import display_path, portable_path, read_file
from recipe.run.records import EnergyRecord, EvaluationRecord, SerializationRecord, TrainingRecord

DOCUMENT_NAMES = ("recipe.md", "README.md")  # of a run, of a published recipe
LARGEST_INTEGER = 2**63  # in a record
LARGEST_DOCUMENT_BYTES = 16 * 2**20
JSON_FENCE = re.compile(r"^```json[ \t\r]*\n(.*?)(?:^```[ \t\r]*$|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class OpenedRecipe:
    """The document under a path with its JSON block, and the folder of records beside it."""

    path: Path
    document_path: Path | None
    document: str | None
    block: dict[str, Any] | None
    run: Run | None

    @property
    def name(self) -> str:
        return display_path(self.path)

    def facts(self) -> RunData:
        """The records beside the document. Raises `UserError` if there are none."""
        if self.run is None:
            raise UserError(f"{self.name} is a document without records beside it; give the folder of the run")
        return load(self.run, portable_path(self.run.directory))

    def required_block(self) -> dict[str, Any]:
        """The JSON block. Raises `UserError` for a document without one."""
        if self.block is None:
            raise UserError(f"{self.name} has no ```json block of format {RECIPE_FORMAT}: it was not written by a run")
        return self.block

    def claims(self, chapter: str) -> dict[str, Any]:
        """The claims of the JSON block on a chapter, or an empty dict."""
        return dict_or_empty(dict_or_empty((self.block or {}).get("claims")).get(chapter))


def dict_or_empty(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def open_recipe(path: str | Path, warns: bool = True) -> OpenedRecipe:
    """Open the recipe under a path. Raises `UserError` if there is none.

    Prints a warning for each generated block that was edited, unless the caller reports them.
    """
    path = Path(path)
    if path.is_dir():
        folder = path
        document = next((path / name for name in DOCUMENT_NAMES if os.path.lexists(path / name)), None)
        text = read_text(document, folder) if document is not None else None
    elif os.path.lexists(path):
        folder, document = path.parent, path
        text = read_text(path)  # the reader may name a link, which leads where they want
    else:
        raise UserError(f"{display_path(path)} does not exist; give a run directory, a published recipe or a document")
    if text is not None and document is not None and warns:
        warn_of_edits(document.name, text)
    run = Run(folder) if (folder / "records").is_dir() else None
    if text is None and run is None:
        raise UserError(f"{display_path(path)} has neither a document ({', '.join(DOCUMENT_NAMES)}) nor records")
    return OpenedRecipe(path, document, text, json_block(text) if text is not None else None, run)


def warn_of_edits(name: str, text: str) -> None:
    try:
        edited = edited_blocks(split(text))
    except UserError as error:
        print(f"warning: {on_one_line(name)}: {on_one_line(str(error))}", file=sys.stderr)
        return
    for block in edited:
        print(f"warning: the block {block.id} of {on_one_line(name)} was edited by hand", file=sys.stderr)


def read_text(path: Path, folder: Path | None = None) -> str:
    """A text file, line endings included. Raises `UserError` for a large or binary file, or a link out of `folder`."""
    try:
        return read_file(path, display_path(path), LARGEST_DOCUMENT_BYTES, folder).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{display_path(path)} is not UTF-8 text: {error}") from error


def json_block(document: str) -> dict[str, Any] | None:
    """The one JSON block of a known format, or None. Raises `UserError` for several."""
    blocks = [block for text in JSON_FENCE.findall(document) if (block := _parse_block(text)) is not None]
    if len(blocks) > 1:
        raise UserError(
            f"the document has {len(blocks)} ```json blocks of format {RECIPE_FORMAT}: one of them is not its own"
        )
    return blocks[0] if blocks else None


def _parse_block(text: str) -> dict[str, Any] | None:
    """A block of the known format. None for other JSON and for text that is not JSON.

    Raises `UserError` for a repeated key: two readers of it would read two recipes.
    """
    repeated: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return values

    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("format") != RECIPE_FORMAT:
        return None
    if repeated:
        raise UserError(f"the recipe's JSON block has the key {repeated[0]!r} twice: it can be read in two ways")
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is not a finite number")
    return value


def contradictions(block: dict[str, Any]) -> list[str]:
    """The hashes of the block that are not those of its own configuration."""
    config = block.get("config")
    if not isinstance(config, dict):
        return []
    computed = {"config_sha256": config_sha256(config), "recipe_id": recipe_id(config)}
    return [
        f"{name} is {str(block.get(name))[:16]}, that of the configuration beside it is {digest[:16]}"
        for name, digest in computed.items()
        if block.get(name) != digest
    ]


# ---- the records ------------------------------------------------------------------------------------


class RecordReader:
    """Reads the files of a run. An unreadable one is a finding."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.findings: list[Finding] = []

    def facts(self) -> RunData:
        """The facts of all readable files. The others are None or empty."""
        return load(self.run, portable_path(self.run.directory), self._read)

    def _read(self, path: Path, read: Callable[[], Any]) -> Any:
        """One file. None if it is absent or unreadable. The latter is a finding."""
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
        raise UserError("it has an integer of 2**63 or more")
    if isinstance(value, TrainingRecord) and (value.schedule.steps_per_epoch < 1 or value.schedule.steps < 1):
        raise UserError("it has a training without steps")
    if isinstance(value, EvaluationRecord | SerializationRecord) and value.images < 1:
        raise UserError("it has counts of zero images")
    if isinstance(value, EnergyRecord) and (value.seconds <= 0 or value.joules < 0):
        raise UserError("its energy or its time is not positive")


def numbers_in(value: Any) -> Iterator[int | float]:
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(entry)
    elif isinstance(value, int | float):
        yield value
