"""A document as a checker reads it: lines with numbers, generated blocks with their places, and people's prose.

Markdown is cut into lines and never parsed. What lies in a code fence, in a comment or in an address is no prose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from recipe.document.blocks import Block, Fence, Prose, edited_blocks, split
from recipe.errors import UserError

HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(?P<text>\S.*)$")
LINK = re.compile(r"\]\((?P<target>[^()\s]+)\)")
NOT_PROSE = re.compile(r"`[^`\n]*`|<!--(?:(?!<!--).)*?-->|\]\([^()\n]*\)|https?://\S+", re.DOTALL)
EMPTY_SECTION = re.compile(r"^(more information needed|to ?do|tba|tbd|n/?a|not applicable)\W*$", re.IGNORECASE)


@dataclass(frozen=True)
class Line:
    """One line of a document; `number` counts from 1."""

    number: int
    text: str


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
    def lines(self) -> list[Line]:
        """All lines; a carriage return is no part of them."""
        return [Line(number, text.rstrip("\r")) for number, text in enumerate(self.text.split("\n"), start=1)]

    @cached_property
    def headings(self) -> list[Line]:
        """Headings outside code fences under which something is said directly."""
        fence, outside = Fence(), []
        for line in self.lines:
            outside.append(not fence.holds(f"{line.text}\n"))
        found = []
        for at, line in enumerate(self.lines):
            heading = HEADING.match(line.text) if outside[at] else None
            if heading and self._says_something(at + 1):
                found.append(Line(line.number, heading["text"].rstrip("# \t")))
        return found

    @cached_property
    def pairs(self) -> list[Line]:
        """Each line of a paragraph joined with the next one: a sentence does not end with its line."""
        return [
            Line(one.number, f"{one.text} {two.text.lstrip()}")
            for one, two in pairwise(self.lines)
            if one.text.strip() and two.text.strip() and not two.text.lstrip().startswith(("#", "|", "- ", "* ", "```"))
        ]

    def _says_something(self, at: int) -> bool:
        """Whether the first words behind a heading are words, and not another heading or a placeholder."""
        following = (line.text.strip() for line in self.lines[at:])
        first = next((text for text in following if text), "")
        return bool(first) and not HEADING.match(first) and not EMPTY_SECTION.match(first)

    @cached_property
    def prose(self) -> str:
        """People's words, with nothing but line ends in place of all else, so that line numbers still count."""
        text = "".join(piece.text if isinstance(piece, Prose) else blank(piece.text) for piece in self.pieces)
        fence = Fence()
        kept = [blank(line) if fence.holds(line) else line for line in text.splitlines(keepends=True)]
        return NOT_PROSE.sub(lambda found: blank(found[0]), "".join(kept))

    @cached_property
    def links(self) -> list[tuple[str, int]]:
        """(target, line number) of every relative link and picture; addresses and anchors are left out."""
        return [
            (found["target"], line.number)
            for line in self.lines
            for found in LINK.finditer(line.text)
            if "://" not in found["target"] and not found["target"].startswith(("#", "mailto:"))
        ]


def blank(text: str) -> str:
    """As many lines, and nothing to read; it still parts the words beside it."""
    return "\n" * text.count("\n") or " "
