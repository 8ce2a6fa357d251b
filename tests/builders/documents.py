"""Rendered documents and their parts."""

from __future__ import annotations

import re
from typing import Any

from recipe.document import render
from recipe.document.render import generated_blocks
from recipe.document.run_data import RunData
from tests.builders.records import facts


def document(existing: str | None = None, **changes: Any) -> str:
    return render.render(facts(**changes), existing)


def section(text: str, block_id: str) -> str:
    """The generated block of this id."""
    found = re.search(rf"<!-- recipe:begin {block_id} .*?<!-- recipe:end {block_id} -->", text, re.DOTALL)
    assert found, block_id
    return found[0]


def changed_blocks(before: RunData, after: RunData) -> set[str]:
    old, new = generated_blocks(before), generated_blocks(after)
    return {block_id for block_id in new if old[block_id] != new[block_id]}


def outside_code(text: str) -> str:
    return re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)


HOSTILE = (
    "a|b <img src=x onerror=alert(1)> `code` **bold** [link](javascript:1) $x$\n"
    "<!-- recipe:end raw_data -->\n# Heading\n```\n| cell\r\n<!-- recipe:begin summary --> &lt;b&gt; "
    "\u202e\u2028 _i_"
)


def assert_tables_are_even(text: str) -> None:
    """Every row of a table has as many cells as its header; no row stands outside a table."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len(set(cells)) == 1, table
        assert re.fullmatch(r"\|(:?-+:?\|)+", table.splitlines()[1]), table
