"""What people write survives byte for byte; what a program wrote is replaced, and never where it was edited."""

import random
import re

import pytest

from recipe.document.blocks import Block, content_sha256, merge_blocks, split
from recipe.errors import UserError

IDS = ("summary", "raw_data", "dynamics", "miscellaneous")
QUOTED = f"<!-- recipe:begin dynamics sha256={'0' * 64} -->"
SNIPPETS = [
    "plain words",
    "",
    "  ",
    "# A heading",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "\u2028 separator \x0c form feed \x85",
    f"```\n {QUOTED}\nquoted\n <!-- recipe:end dynamics -->\n```",
    "```\nnever closed",
    f"- a list with code:\n  ```\n  {QUOTED}\n  ```",
    f"- ```python\n  {QUOTED}\n  ```\n- next",
    f"1. ```\n   {QUOTED}\nthe item ends here",
    f"    indented ```\n    {QUOTED}",
    f"> ```\n> {QUOTED}",
    "`` inline ``` code ``",
    "``` `not a fence`",
    "<!-- a comment of mine -->",
    f"in a line {QUOTED} is text",
    "<!-- recipe:begin mine -->",
    "trailing\t \n\n\n",
    '<details>\n\n```json\n{"format": "recipe/1"}\n```\n\n</details>',
    "ends with a backslash \\",
]


def contents(round_number: int) -> dict[str, str]:
    """Generated blocks that change from round to round, code fences among them."""
    return {
        block_id: f"\n## {block_id}\n\n```bash\nrun {round_number * (1 + at % 2)}\n```\n\n"
        for at, block_id in enumerate(IDS)
    }


def outside(document: str) -> str:
    return "".join(piece.text for piece in split(document) if not isinstance(piece, Block))


def prose(generator: random.Random) -> str:
    newline = generator.choice(["\n", "\r\n"])
    text = "\n".join(generator.choice(SNIPPETS) for _ in range(generator.randrange(6))) + "\n"
    return text.replace("\n", newline)


@pytest.mark.parametrize("seed", range(200))
def test_prose_survives_any_number_of_regenerations(seed: int) -> None:
    generator = random.Random(seed)
    document = merge_blocks("", contents(0))
    for piece in [piece.text for piece in split(document) if isinstance(piece, Block)]:
        document = document.replace(piece, prose(generator) + piece, 1)
    document += prose(generator) + generator.choice(["", "no newline at the end"])
    if generator.random() < 0.3:
        document = document.replace("\r\n", "\n").replace("\n", "\r\n")
    words = outside(document)
    for round_number in range(1, 5):
        document = merge_blocks(document, contents(round_number))
        assert outside(document) == words
        assert merge_blocks(document, contents(round_number)) == document
        found = {piece.id: piece.content.replace("\r\n", "\n") for piece in split(document) if isinstance(piece, Block)}
        assert found == contents(round_number)


PARTS = [
    *("```", "~~~~", "`", "- ", "1. ", "> ", "    ", "\t", " ", "\n", "\r\n", "\n\n", "|", "--", "# ", "<!--", "-->"),
    *("word", "\u00e9", "\x0c", "\u2028", "\ufeff", QUOTED, "<!-- recipe:end dynamics -->", "<!-- recipe:begin x -->"),
]


def test_any_text_is_kept_or_refused_and_never_changed() -> None:
    """Random text; refused are markers without their partner and blocks that occur twice."""
    kept = 0
    for seed in range(400):
        generator = random.Random(seed)
        document = merge_blocks("", contents(0))
        for block_id in generator.sample(IDS, 2):
            words = "".join(generator.choices(PARTS, k=generator.randrange(1, 15))) + "\n"
            document = document.replace(f"<!-- recipe:begin {block_id}", f"{words}<!-- recipe:begin {block_id}", 1)
        try:
            pieces = split(document)
        except UserError:
            continue
        assert "".join(piece.text for piece in pieces) == document
        if [piece.id for piece in pieces if isinstance(piece, Block)] != list(IDS):
            continue  # a marker that words were put before on its line is a word itself
        try:
            after = merge_blocks(document, contents(1))
        except UserError:  # a quoted marker of another hash looks like an edited block
            continue
        for round_number in (2, 2, 3):
            assert outside(after) == outside(document)
            after = merge_blocks(after, contents(round_number))
        assert outside(after) == outside(document)
        kept += 1
    assert kept > 100


def test_the_first_document_is_the_template_in_its_order() -> None:
    document = merge_blocks("", contents(1))
    assert [piece.id for piece in split(document) if isinstance(piece, Block)] == list(IDS)
    assert outside(document) == "\n" * (len(IDS) - 1)


@pytest.mark.parametrize("removed", IDS)
def test_a_block_that_was_deleted_comes_back_to_its_place(removed: str) -> None:
    document = merge_blocks("", contents(1))
    [block] = [piece for piece in split(document) if isinstance(piece, Block) and piece.id == removed]
    text = merge_blocks(document.replace(block.text, ""), contents(1))
    assert [piece.id for piece in split(text) if isinstance(piece, Block)] == list(IDS)


def test_blocks_go_after_a_document_that_has_none() -> None:
    text = merge_blocks("# Mine\r\n\r\nno newline", contents(1))
    assert text.startswith("# Mine\r\n\r\nno newline\n\n<!-- recipe:begin summary")


def test_people_may_move_blocks() -> None:
    first, second, *rest = [piece.text for piece in split(merge_blocks("", contents(1))) if isinstance(piece, Block)]
    moved = "".join([second, "words\n", first, *rest])
    assert merge_blocks(moved, contents(1)) == moved


def test_blocks_of_unknown_ids_are_left_alone() -> None:
    future = f"<!-- recipe:begin timing sha256={'0' * 64} -->\nedited or not\n<!-- recipe:end timing -->\n"
    document = merge_blocks("", contents(1)) + future
    assert merge_blocks(document, contents(2)).endswith(future)


def test_line_endings_are_no_edit() -> None:
    document = merge_blocks("", contents(1)).replace("\n", "\r\n")
    assert merge_blocks(document, contents(1)) == document
    assert "\n" not in merge_blocks(document, contents(2)).replace("\r\n", "")


def test_a_byte_order_mark_stays() -> None:
    document = "\ufeff" + merge_blocks("", contents(1))
    assert merge_blocks(document, contents(1)) == document
    assert merge_blocks(document, contents(2)).startswith("\ufeff<!-- recipe:begin summary")


def test_an_edited_block_is_refused_with_its_id_its_hashes_and_a_diff() -> None:
    document = merge_blocks("", contents(1))
    with pytest.raises(UserError) as refused:
        merge_blocks(document.replace("run 2", "run 7", 1), contents(3))
    message = str(refused.value)
    assert "generated block 'raw_data'" in message
    assert content_sha256(contents(1)["raw_data"])[:16] in message
    assert content_sha256(contents(1)["raw_data"].replace("run 2", "run 7"))[:16] in message
    assert "\n-run 7\n+run 6" in message


DAMAGED = {
    "never ends": lambda text: text.replace("<!-- recipe:end dynamics -->\n", ""),
    "without a valid beginning": lambda text: re.sub(r"<!-- recipe:begin dynamics sha256=\w{9}", r"\g<0> ", text),
    "twice": lambda text: text + text,
    "twice: remove one of them, or indent": lambda text: (
        text + f"\n```\n{QUOTED}\nquoted\n<!-- recipe:end dynamics -->\n```\n"
    ),
    "never ends: put": lambda text: text + f"\n```\n{QUOTED}\n```\n",
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_damaged_structure_is_refused_rather_than_guessed_at(message: str) -> None:
    with pytest.raises(UserError, match=message):
        merge_blocks(DAMAGED[message](merge_blocks("", contents(1))), contents(1))
