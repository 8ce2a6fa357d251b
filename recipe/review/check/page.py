"""A document as a checker reads it: its generated blocks and links, with their lines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from recipe.document.blocks import Block, Prose, edited_blocks, split
from recipe.errors import UserError

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
