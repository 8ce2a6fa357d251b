"""The recipes that are published here: complete, and still what this code does."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipe.__main__ import main
from recipe.review.opening import open_recipe
from recipe.review.verify.code import code_differences
from recipe.review.verify.files import BROKEN, links
from recipe.run.files import CHECKOUT

RECIPES = sorted(path.parent for path in (CHECKOUT / "recipes").glob("*/README.md"))
published = pytest.mark.parametrize("folder", RECIPES, ids=lambda folder: folder.name)


def test_there_is_the_demos() -> None:
    assert "demo" in {folder.name for folder in RECIPES}


@published
def test_a_published_recipe_is_complete(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(folder)]) == 0, capsys.readouterr().out


@pytest.mark.process  # it trains a few steps
@published
def test_this_code_does_what_a_published_recipe_says(folder: Path) -> None:
    """The trace of `verify` is a part of `drift`."""
    assert [finding.line() for finding in code_differences(open_recipe(folder))] == []


@published
def test_the_chain_of_a_published_recipe_is_unbroken(folder: Path) -> None:
    assert [link.line() for link in links(open_recipe(folder), None, None) if link.state == BROKEN] == []
