"""Each tampering of the catalogue with a published recipe is found; the untouched recipe is without a finding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.backends.cpu import get_cpu_capability

from recipe.__main__ import main
from recipe.review.check.command import check
from recipe.review.check.files import built_findings
from recipe.review.findings import Finding, Kind
from recipe.review.opening import RecordReader, open_recipe
from recipe.review.verify.files import BROKEN, links
from recipe.run.directory import Run
from recipe.run.files import CHECKOUT
from tests.builders.tamperings import BUILT, CARD, CONSISTENT, FIGURES, PAGE, PREDICTIONS, TAMPERINGS, render_again


def found(folder: Path, executes: bool = False) -> list[Finding]:
    return [one for one in check(open_recipe(folder), executes).findings if one.kind is Kind.finding]


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CHECKOUT / "recipes" / "demo", tmp_path / "demo"))


@pytest.mark.parametrize("is_own", [True, False], ids=["own", "later"])
def test_an_untouched_recipe_is_without_finding(demo: Path, is_own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipe.review.check.document.is_own_code", lambda facts: is_own)
    render_again(demo)  # the page of this checkout
    assert not found(demo)


@pytest.mark.parametrize("name", [name for name in TAMPERINGS if name not in PREDICTIONS | BUILT | CONSISTENT])
def test_a_tampering_is_found(demo: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a page by the code that wrote it, and by any later code."""
    render_again(demo)
    TAMPERINGS[name](demo)
    for is_own in (True, False):
        if is_own or name in PAGE | CARD:
            monkeypatch.setattr("recipe.review.check.document.is_own_code", lambda facts, is_own=is_own: is_own)
            assert found(demo, executes=name in FIGURES), is_own


NOT_ITS_WORK = ("figures: one removed", "page: a block removed")  # `verify` compares what is there


@pytest.mark.parametrize("name", [name for name in PAGE | CARD if name not in NOT_ITS_WORK])
def test_verify_reads_the_page_too(demo: Path, name: str) -> None:
    render_again(demo)
    TAMPERINGS[name](demo)
    assert [link for link in links(open_recipe(demo), None, None) if link.state == BROKEN]


@pytest.mark.parametrize("name", BUILT)
def test_a_network_is_built_again_where_it_can_be(demo: Path, name: str) -> None:
    """On a machine with other instructions, or with another torch, that is not compared."""
    context = json.loads((demo / "records/training.json").read_text())["determinism_context"]
    is_comparable = context["torch"] == str(torch.__version__) and context["its instructions"] == get_cpu_capability()
    TAMPERINGS[name](demo)
    facts = RecordReader(Run(demo)).facts()
    kinds = {one.kind for one in built_findings(facts)}
    assert kinds == {Kind.finding if is_comparable else Kind.cannot_tell}


def test_strict_fails_for_notes_and_what_cannot_be_told(demo: Path) -> None:
    render_again(demo)
    assert [main(["check", str(demo), *words]) for words in ([], ["--strict"])] == [0, 1]
    words = ["verify", str(demo), "--skip", "trace"]
    assert [main([*words, *more]) for more in ([], ["--strict"])] == [0, 1]


def test_other_verbs_warn_of_an_edited_page(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TAMPERINGS["page: headline by hand"](demo)
    open_recipe(demo)
    assert "warning: the block summary of README.md was edited by hand" in capsys.readouterr().err
