"""The tables of traps, contradictions and faults: every row once, each with tests that exist or a reason."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache

import pytest

from recipe.run.files import CHECKOUT

TESTS = CHECKOUT / "tests"
CITED = re.compile(r"`([\w/]+\.py)::(\w+)`")
REASON = re.compile(r"(later|not applicable): \w.{10,}")
TABLES = {
    "TRAPS.md": [f"T{number}" for number in range(1, 43)],
    "CONTRADICTIONS.md": [str(n) for n in range(1, 23)],
    "FAULTS.md": [f"F{number}" for number in range(1, 20)],
}
VERDICTS = {"impossible", "visible", "later"}


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    cells: tuple[str, ...]

    @property
    def tests(self) -> list[tuple[str, str]]:
        """(path, function) of each test that is cited."""
        return CITED.findall(self.cells[-1])

    @property
    def reason(self) -> str:
        """Why a test is missing, or an empty string."""
        (*_, last) = self.cells[-1].split("<br>")
        return "" if CITED.fullmatch(last) else last


def text_of(table: str) -> str:
    return (TESTS / table).read_text(encoding="utf-8")


def rows(table: str) -> list[Row]:
    lines = re.findall(r"^\| (.*) \|$", text_of(table), re.MULTILINE)
    assert lines
    return [Row(tuple(line.split(" | "))) for line in lines[1:]]  # the first one is the header


@cache
def functions(path: str) -> set[str]:
    """The test functions of a file, as pytest would find them: at the top of the module."""
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("table", TABLES)
def test_every_row_is_there_once_and_in_order(table: str) -> None:
    found = rows(table)
    assert [row.cells[0] for row in found] == TABLES[table]
    assert len({len(row.cells) for row in found}) == 1
    assert all(cell.strip() for row in found for cell in row.cells)


@pytest.mark.parametrize("table", TABLES)
def test_every_test_that_is_cited_exists(table: str) -> None:
    cited = [test for row in rows(table) for test in row.tests]
    assert len(cited) == text_of(table).count(".py::"), "a test is cited outside its column, or not as `path::function`"
    missing = [f"{path}::{name}" for path, name in cited if not (TESTS / path).is_file() or name not in functions(path)]
    assert missing == []
    assert all(len(row.tests) == len(set(row.tests)) for row in rows(table))


@pytest.mark.parametrize("table", TABLES)
def test_a_row_without_a_test_gives_a_reason(table: str) -> None:
    for row in rows(table):
        assert row.tests or row.reason, row.cells[0]
        assert not row.reason or REASON.fullmatch(row.reason), row.cells[0]


def test_every_fault_has_tests_of_its_own_number_and_none_is_left_out() -> None:
    """`pytest tests/faults -k f03` runs them alone."""
    found = {
        (f"faults/{path.name}", name)
        for path in (TESTS / "faults").glob("test_*.py")
        for name in functions(f"faults/{path.name}")
    }
    cited = {test for row in rows("FAULTS.md") for test in row.tests if test[0].startswith("faults/")}
    assert found == cited
    for row in rows("FAULTS.md"):
        mine = [name for path, name in row.tests if path.startswith("faults/")]
        assert mine, row.cells[0]
        assert all(name.startswith(f"test_f{int(row.cells[0][1:]):02d}_") for name in mine), row.cells[0]


def test_impossible_needs_a_test_and_later_a_reason() -> None:
    for row in rows("CONTRADICTIONS.md"):
        assert row.cells[2] in VERDICTS, row.cells[0]
        assert row.cells[2] == "later" or row.tests, row.cells[0]
        assert row.cells[2] != "later" or row.reason, row.cells[0]
