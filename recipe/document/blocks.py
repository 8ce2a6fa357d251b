"""Generated blocks live between markers that carry a hash; everything else in the document belongs to people.

    <!-- recipe:begin raw_data sha256=... -->
    generated, replaced when a stage runs again
    <!-- recipe:end raw_data -->

The document is cut into lines and never parsed as markdown, so what is outside survives byte for byte. The one
piece of markdown that has to be understood is the code fence: a marker inside somebody's fence is a quotation. Where
the structure is damaged the document is refused rather than guessed at.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from recipe.errors import UserError

BEGIN = re.compile(r"<!-- recipe:begin (?P<id>[a-z0-9_-]+) sha256=(?P<sha256>[0-9a-f]{64}) -->[ \t]*\r?\n?")
END = re.compile(r"<!-- recipe:end (?P<id>[a-z0-9_-]+) -->[ \t]*\r?\n?")
LINE = re.compile(r"[^\n]*\n|[^\n]+")  # str.splitlines would also cut at form feeds and U+2028
FENCE = re.compile(r"(?P<indent>[ \t]*)(?P<list>(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*)(?P<ticks>`{3,}(?=[^`]*$)|~{3,})")
BYTE_ORDER_MARK = "\ufeff"
LONGEST_DIFF_LINES = 40


@dataclass(frozen=True)
class Prose:
    """What people wrote, exactly."""

    text: str


@dataclass(frozen=True)
class Block:
    """One generated block as found: the marker lines keep their own line endings."""

    id: str
    sha256: str  # stored in the marker
    begin: str
    content: str
    end: str

    @property
    def text(self) -> str:
        return self.begin + self.content + self.end


def merge(document: str, generated: Mapping[str, str]) -> str:
    """Put the generated blocks into the document; a block that is not there yet goes behind its predecessor.

    `generated` maps block ids to contents, in the order of the template. Raises `UserError` where a block was edited.
    """
    pieces = split(document)
    refuse_edits(pieces, generated)
    pieces = [replaced(piece, generated) for piece in pieces]
    ids = list(generated)
    for position, block_id in enumerate(ids):
        if block_id not in {piece.id for piece in pieces if isinstance(piece, Block)}:
            insert(pieces, new_block(block_id, generated[block_id]), ids[:position], ids[position + 1 :])
    return "".join(piece.text for piece in pieces)


def split(document: str) -> list[Prose | Block]:
    """Cut a document into prose and blocks; joined again, the pieces are the document."""
    pieces: list[Prose | Block] = []
    if document.startswith(BYTE_ORDER_MARK):
        pieces.append(Prose(BYTE_ORDER_MARK))
        document = document.removeprefix(BYTE_ORDER_MARK)
    lines = iter(LINE.findall(document))
    fence = Fence()
    for line in lines:
        begin = None if fence.holds(line) else BEGIN.fullmatch(line)
        if begin:
            pieces.append(block_from(begin, lines))
        else:
            if not fence.is_open and (end := END.fullmatch(line)):
                raise UserError(
                    f"the document ends the generated block {end['id']!r} without a valid beginning: its "
                    "first marker was changed, or a code fence above it is never closed"
                )
            pieces.append(Prose(line))
    if fence.is_open:
        raise UserError(
            "the document has a code fence that is never closed, so that text and generated blocks cannot "
            f"be told apart: close the one that begins {fence.opened_by.strip()!r}"
        )
    refuse_twins(pieces)
    return pieces


def block_from(begin: re.Match[str], lines: Iterator[str]) -> Block:
    """Read on to the end marker of the block that has just begun."""
    content: list[str] = []
    for line in lines:
        end = END.fullmatch(line)
        if end and end["id"] == begin["id"]:
            return Block(begin["id"], begin["sha256"], begin[0], "".join(content), line)
        content.append(line)
    raise UserError(
        f"the document's generated block {begin['id']!r} never ends: "
        f"put `<!-- recipe:end {begin['id']} -->` back on a line of its own"
    )


class Fence:
    """Whether a line lies inside a fenced code block, by the rules of CommonMark.

    A fence in a list item, or one that is indented by four columns or more, ends with its container too: at the first
    line that is indented less.
    """

    def __init__(self) -> None:
        self.opened_by = ""
        self.ticks = ""
        self.container_columns = 0

    @property
    def is_open(self) -> bool:
        return bool(self.ticks)

    def holds(self, line: str) -> bool:
        """Take the next line; true for every line of a fence, the first and the last included."""
        if self.is_open and self.is_left_by(line):
            self.ticks = ""
        if self.is_open:
            if self.is_closed_by(line):
                self.ticks = ""
            return True
        if opening := FENCE.match(line.rstrip("\r\n")):
            columns = len(opening["indent"].expandtabs(4)) + len(opening["list"])
            self.container_columns = columns if opening["list"] or columns >= 4 else 0
            self.ticks, self.opened_by = opening["ticks"], line
        return self.is_open

    def is_left_by(self, line: str) -> bool:
        text = line.expandtabs(4)
        return bool(text.strip()) and len(text) - len(text.lstrip(" ")) < self.container_columns

    def is_closed_by(self, line: str) -> bool:
        text = line.strip(" \t\r\n")
        return len(text) >= len(self.ticks) and set(text) == {self.ticks[0]}


def refuse_twins(pieces: list[Prose | Block]) -> None:
    """Two blocks of one id: which one would be replaced?"""
    seen = set()
    for piece in pieces:
        if isinstance(piece, Block):
            if piece.id in seen:
                raise UserError(f"the document holds the generated block {piece.id!r} twice: remove one of them")
            seen.add(piece.id)


def refuse_edits(pieces: list[Prose | Block], generated: Mapping[str, str]) -> None:
    """Stop with the block's id, both hashes and a diff; a block of an unknown id is nobody's business here."""
    for block in edited_blocks(pieces):
        if block.id in generated:
            raise UserError(
                f"the generated block {block.id!r} of the document was edited by hand (stored sha256 "
                f"{block.sha256[:16]}, found {content_sha256(block.content)[:16]}), and the edit would be lost: move "
                "your text outside the markers and restore the block, or delete it with its markers to have it "
                "written anew.\n"
                f"{difference(block.content, generated[block.id])}"
            )


def edited_blocks(pieces: list[Prose | Block]) -> list[Block]:
    """The blocks whose content is not what their marker says."""
    blocks = [piece for piece in pieces if isinstance(piece, Block)]
    return [block for block in blocks if content_sha256(block.content) != block.sha256]


def difference(found: str, generated: str) -> str:
    """From the block as found to what would be written now; a difference of hash only says so."""
    lines = list(
        difflib.unified_diff(
            found.replace("\r\n", "\n").splitlines(),
            generated.splitlines(),
            "found",
            "would be written now",
            n=1,
            lineterm="",
        )
    )
    left_out = len(lines) - LONGEST_DIFF_LINES
    shown = lines[:LONGEST_DIFF_LINES] + ([f"... {left_out} more lines"] if left_out > 0 else [])
    return "\n".join(shown) or "(its text is what would be written now; only the hash in the marker differs)"


def replaced(piece: Prose | Block, generated: Mapping[str, str]) -> Prose | Block:
    """The piece with what is generated now; untouched, line endings included, where nothing changed."""
    if isinstance(piece, Prose) or piece.id not in generated:
        return piece
    content = generated[piece.id]
    if content == piece.content.replace("\r\n", "\n"):
        return piece
    newline = "\r\n" if piece.begin.endswith("\r\n") else "\n"
    block = new_block(piece.id, content)
    return Block(block.id, block.sha256, block.begin.replace("\n", newline), content.replace("\n", newline), piece.end)


def new_block(block_id: str, content: str) -> Block:
    """A block with fresh markers."""
    assert content.endswith("\n"), block_id
    assert not any(BEGIN.match(line) or END.match(line) for line in LINE.findall(content)), block_id
    sha256 = content_sha256(content)
    return Block(
        block_id,
        sha256,
        f"<!-- recipe:begin {block_id} sha256={sha256} -->\n",
        content,
        f"<!-- recipe:end {block_id} -->\n",
    )


def insert(pieces: list[Prose | Block], block: Block, before: list[str], after: list[str]) -> None:
    """Put a new block behind the nearest predecessor, else before the first successor, else at the end."""
    positions = {piece.id: position for position, piece in enumerate(pieces) if isinstance(piece, Block)}
    predecessors = [positions[block_id] for block_id in reversed(before) if block_id in positions]
    successors = [positions[block_id] for block_id in after if block_id in positions]
    if successors and not predecessors:
        pieces[successors[0] : successors[0]] = [block, Prose("\n")]
        return
    place = predecessors[0] + 1 if predecessors else len(pieces)
    text_before = "".join(piece.text for piece in pieces[:place])
    gap = "" if not text_before.strip(BYTE_ORDER_MARK) else "\n" if text_before.endswith("\n") else "\n\n"
    pieces[place:place] = [Prose(gap), block]


def content_sha256(content: str) -> str:
    """Independent of line endings, which git and editors change on their own."""
    return hashlib.sha256(content.replace("\r\n", "\n").encode()).hexdigest()
