"""The recipe that a reader points at: a run, a published folder, or the document alone.

It may come from a stranger. The document is read as text in which one fenced block is JSON of a known format; records
are decoded by type; nothing of it is run, imported or expanded.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.config.identity import config_sha256, recipe_id
from recipe.document.claims import FORMAT
from recipe.document.facts import Facts, gather
from recipe.errors import UserError
from recipe.files import read_file
from recipe.run import Run, recorded_path, shown_path

DOCUMENT_NAMES = ("recipe.md", "README.md")  # of a run, of a published recipe
LARGEST_DOCUMENT_BYTES = 16 * 2**20
FENCE_BEGINS, FENCE_ENDS = "```json", "```"


@dataclass(frozen=True)
class Subject:
    """What was found under a path; `identity` is the document's JSON block."""

    path: Path
    document_path: Path | None
    document: str | None
    identity: dict[str, Any] | None
    run: Run | None  # the folder with records beside the document

    @property
    def name(self) -> str:
        """The path for a person."""
        return shown_path(self.path)

    def facts(self) -> Facts:
        """The records beside the document; raises `UserError` where there are none."""
        if self.run is None:
            raise UserError(f"{self.name} is a document without records beside it; give the folder of the run")
        return gather(self.run, recorded_path(self.run.directory))

    def claims(self) -> dict[str, Any]:
        """The JSON block; raises `UserError` where the document holds none."""
        if self.identity is None:
            raise UserError(f"{self.name} holds no ```json block of format {FORMAT}: it was not written by a run")
        return self.identity

    def config(self) -> dict[str, Any]:
        """The whole pinned configuration as the document has it; raises `UserError` where there is none."""
        config = self.claims().get("config")
        if not isinstance(config, dict):
            raise UserError(f"{self.name} holds no configuration: nothing was trained yet")
        return config


def open_subject(path: str | Path) -> Subject:
    """Find the recipe under a path; raises `UserError` where there is none."""
    path = Path(path)
    if path.is_dir():
        document = next((path / name for name in DOCUMENT_NAMES if os.path.lexists(path / name)), None)
        return _subject(path, document, path)
    if not os.path.lexists(path):
        raise UserError(f"{shown_path(path)} does not exist; give a run directory, a published recipe or a document")
    return _subject(path, path, path.parent)


def _subject(path: Path, document_path: Path | None, folder: Path) -> Subject:
    inside = folder if document_path != path else None  # a link that the reader names leads where they want
    text = read_text(document_path, inside) if document_path is not None else None
    run = Run(folder) if (folder / "records").is_dir() else None
    if text is None and run is None:
        raise UserError(f"{shown_path(path)} holds neither a document ({', '.join(DOCUMENT_NAMES)}) nor records")
    return Subject(path, document_path, text, identity_of(text) if text is not None else None, run)


def read_text(path: Path, folder: Path | None = None) -> str:
    """A document as it is, line endings included; refuses what is too large or not text, and links out of `folder`."""
    try:
        return read_file(path, shown_path(path), LARGEST_DOCUMENT_BYTES, folder).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{shown_path(path)} is not UTF-8 text: {error}") from error


def identity_of(document: str) -> dict[str, Any] | None:
    """The one JSON block of a known format; None where there is none, `UserError` where there are several."""
    found = [block for text in json_blocks(document) if (block := parsed(text)) is not None]
    if len(found) > 1:
        raise UserError(
            f"the document holds {len(found)} ```json blocks of format {FORMAT}: one of them is not its own"
        )
    return found[0] if found else None


def json_blocks(document: str) -> list[str]:
    """The contents of every ```json fence that starts at the beginning of a line."""
    blocks: list[str] = []
    lines = iter(document.splitlines())
    for line in lines:
        if line.rstrip() == FENCE_BEGINS:
            content = []
            for inner in lines:
                if inner.rstrip() == FENCE_ENDS:
                    break
                content.append(inner)
            blocks.append("\n".join(content))
    return blocks


def parsed(text: str) -> dict[str, Any] | None:
    """A block of the known format; None for any other JSON and for what is no JSON.

    Raises `UserError` where a key stands twice: two readers of it would read two recipes.
    """
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return values

    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        return None
    if twice:
        raise UserError(f"the recipe's JSON block has the key {twice[0]!r} twice: it can be read in two ways")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large")
    return value


def contradictions(identity: dict[str, Any]) -> list[str]:
    """Where the block's hashes are not those of its own configuration."""
    config = identity.get("config")
    if not isinstance(config, dict):
        return []
    computed = {"config_sha256": config_sha256(config), "recipe_id": recipe_id(config)}
    return [
        f"{name} is {str(identity.get(name))[:16]}, that of the configuration beside it is {digest[:16]}"
        for name, digest in computed.items()
        if identity.get(name) != digest
    ]
