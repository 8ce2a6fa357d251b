"""Generated blocks between markers that carry a hash. All other text belongs to its authors.

    <!-- recipe:begin raw_data sha256=... -->
    generated, replaced when a stage runs again
    <!-- recipe:end raw_data -->

A marker is a line of its own that starts in the first column. Nothing else of a document is parsed, so that all other
text survives byte for byte. A document whose markers do not match is refused.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from recipe.errors import UserError

BYTE_ORDER_MARK = "\ufeff"
BLOCK_MARKER = re.compile(
    rf"(?<![^\n{BYTE_ORDER_MARK}])<!-- recipe:"
    r"(?:begin (?P<begin>[a-z0-9_-]+) sha256=(?P<sha256>[0-9a-f]{64})|end (?P<end>[a-z0-9_-]+)) -->[ \t]*(?:\r?\n|\Z)"
)
DIFF_LINES_MAX = 40


@dataclass(frozen=True)
class Prose:
    """Text between the blocks, by people."""

    text: str


@dataclass(frozen=True)
class Block:
    """A generated block. Its marker lines keep their own line endings."""

    id: str
    sha256: str  # stored in the marker
    begin: str
    content: str
    end: str

    @property
    def text(self) -> str:
        return self.begin + self.content + self.end

    @property
    def is_edited(self) -> bool:
        return content_sha256(self.content) != self.sha256


def merge_blocks(document: str, generated: Mapping[str, str]) -> str:
    """Put the generated blocks into the document. A missing block is inserted after its predecessor.

    `generated` maps block ids to contents, in the order of the template. Raises `UserError` where a block was edited.
    """
    pieces = split(document)
    check_edits(pieces, generated)
    for position, piece in enumerate(pieces):
        if isinstance(piece, Block) and piece.id in generated:
            pieces[position] = _updated(piece, generated[piece.id])
    for block_id, content in generated.items():
        if not any(isinstance(piece, Block) and piece.id == block_id for piece in pieces):
            _insert(pieces, _new_block(block_id, content), list(generated))
    return "".join(piece.text for piece in pieces)


def split(document: str) -> list[Prose | Block]:
    """Split a document into prose and blocks. The joined pieces are the document.

    Raises `UserError` where a marker has no partner or a block occurs twice.
    """
    pieces: list[Prose | Block] = []
    seen: set[str] = set()
    begin: re.Match[str] | None = None
    place = 0
    for marker in BLOCK_MARKER.finditer(document):
        if begin is None:
            if marker["end"]:
                raise UserError(
                    f"the document ends the generated block {marker['end']!r} without a valid beginning: its first "
                    "marker was changed; restore it, or indent the marker if it is a quotation"
                )
            begin = marker
        elif marker["end"] == begin["begin"]:
            block = Block(begin["begin"], begin["sha256"], begin[0], document[begin.end() : marker.start()], marker[0])
            if block.id in seen:
                raise UserError(
                    f"the document contains the generated block {block.id!r} twice: remove one of them, or indent its "
                    "markers if it is a quotation"
                )
            seen.add(block.id)
            pieces += [Prose(document[place : begin.start()]), block]
            begin, place = None, marker.end()
    if begin is not None:
        raise UserError(
            f"the document's generated block {begin['begin']!r} never ends: "
            f"put `<!-- recipe:end {begin['begin']} -->` back on a line of its own"
        )
    pieces.append(Prose(document[place:]))
    return [piece for piece in pieces if piece.text]


def check_edits(pieces: list[Prose | Block], generated: Mapping[str, str]) -> None:
    """Raise `UserError` with the id, both hashes and a diff of an edited block. Blocks of unknown ids are ignored."""
    for block in edited_blocks(pieces):
        if block.id in generated:
            raise UserError(
                f"the generated block {block.id!r} of the document was edited by hand (stored sha256 "
                f"{block.sha256[:16]}, found {content_sha256(block.content)[:16]}), and the edit would be lost: move "
                "your text outside the markers and restore the block, or delete it with its markers to have it "
                "written again.\n"
                f"{difference(block.content, generated[block.id])}"
            )


def edited_blocks(pieces: list[Prose | Block]) -> list[Block]:
    """The blocks whose content does not have the hash of their marker."""
    return [piece for piece in pieces if isinstance(piece, Block) and piece.is_edited]


def difference(existing: str, generated: str) -> str:
    """A unified diff from a block in the document to its generated content, of at most 40 lines."""
    lines = list(
        difflib.unified_diff(
            existing.replace("\r\n", "\n").splitlines(),
            generated.splitlines(),
            "found",
            "would be written now",
            n=1,
            lineterm="",
        )
    )
    if len(lines) > DIFF_LINES_MAX:
        lines[DIFF_LINES_MAX:] = [f"... {len(lines) - DIFF_LINES_MAX} more lines"]
    return "\n".join(lines) or "(its text is what would be written now; only the hash in the marker differs)"


def content_sha256(content: str) -> str:
    """Independent of line endings, which git and editors change."""
    return hashlib.sha256(content.replace("\r\n", "\n").encode()).hexdigest()


def _updated(block: Block, content: str) -> Block:
    """The block with new content in its own line endings. Unchanged where the content is the same."""
    if content == block.content.replace("\r\n", "\n"):
        return block
    newline = "\r\n" if block.begin.endswith("\r\n") else "\n"
    new = _new_block(block.id, content)
    begin, content = (text.replace("\n", newline) for text in (new.begin, new.content))
    return replace(new, begin=begin, content=content, end=block.end)


def _new_block(block_id: str, content: str) -> Block:
    assert content.endswith("\n"), block_id
    assert not BLOCK_MARKER.search(content), block_id
    sha256 = content_sha256(content)
    begin, end = f"<!-- recipe:begin {block_id} sha256={sha256} -->\n", f"<!-- recipe:end {block_id} -->\n"
    return Block(block_id, sha256, begin, content, end)


def _insert(pieces: list[Prose | Block], block: Block, order: list[str]) -> None:
    """Insert after the nearest predecessor, else before the first successor, else at the end."""
    positions = {piece.id: position for position, piece in enumerate(pieces) if isinstance(piece, Block)}
    at = order.index(block.id)
    predecessor = next((positions[block_id] for block_id in reversed(order[:at]) if block_id in positions), None)
    successor = next((positions[block_id] for block_id in order[at:] if block_id in positions), None)
    if predecessor is None and successor is not None:
        pieces[successor:successor] = [block, Prose("\n")]
        return
    place = len(pieces) if predecessor is None else predecessor + 1
    before = "".join(piece.text for piece in pieces[:place])
    gap = "" if not before.strip(BYTE_ORDER_MARK) else "\n" if before.endswith("\n") else "\n\n"
    pieces[place:place] = [Prose(gap), block]
