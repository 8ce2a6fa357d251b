"""The recipes that are published here: whole, and still what this code does."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipe.__main__ import main
from recipe.review.opening import open_subject
from recipe.review.verify.code import drifted
from recipe.review.verify.files import BROKEN, links
from recipe.run import CHECKOUT

RECIPES = sorted(path.parent for path in (CHECKOUT / "recipes").glob("*/README.md"))
published = pytest.mark.parametrize("folder", RECIPES, ids=lambda folder: folder.name)


def test_there_is_the_demos() -> None:
    assert "demo" in {folder.name for folder in RECIPES}


@published
def test_a_published_recipe_is_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(folder)]) == 0, capsys.readouterr().out


@published
def test_this_code_does_what_a_published_recipe_says(folder: Path) -> None:
    """The canary of `verify` is a part of `drift`."""
    assert [finding.line() for finding in drifted(open_subject(folder))] == []


@published
def test_the_chain_of_a_published_recipe_is_unbroken(folder: Path) -> None:
    assert [link.line() for link in links(open_subject(folder), None, None) if link.state == BROKEN] == []


def test_the_index_is_true(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(CHECKOUT)
    assert main(["index", "--check"]) == 0, capsys.readouterr().out
