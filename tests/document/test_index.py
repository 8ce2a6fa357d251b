"""The table of published recipes in README.md is what their records say."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipe.__main__ import main
from recipe.document import figures, index, publishable
from recipe.document.index import with_table
from recipe.document.publish import publish
from recipe.errors import UserError
from recipe.files import CHECKOUT
from tests.document.test_document import assert_tables_are_even, section, write_run

README = CHECKOUT / "README.md"


@pytest.fixture
def page() -> str:
    """The repository's own page, copied here."""
    text = README.read_bytes().decode()
    Path("README.md").write_bytes(text.encode())
    return text


@pytest.fixture
def publish_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A published recipe below the current directory."""
    monkeypatch.setattr(publishable, "modified_files", lambda outside: [])
    monkeypatch.setattr(
        figures,
        "draw",
        lambda *_: {f"{name}.png": b"" for name in ("accuracy", "learning_rate", "loss", "throughput")},
    )
    publish(write_run(Path("runs", "demo")), artefacts="https://example.org/demo")


def test_the_table_of_this_repository_is_true() -> None:
    text = README.read_bytes().decode()
    assert with_table(text, CHECKOUT / "recipes") == text


def test_no_recipes(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index"]) == 0
    assert "No recipe is published yet." in Path("README.md").read_text()
    assert main(["index", "--check"]) == 0


def test_a_published_recipe_gets_its_row(page: str, publish_one: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "--check"]) == 1
    assert "+| [demo](recipes/demo/README.md) | demo |" in capsys.readouterr().out
    assert main(["index"]) == 0
    assert main(["index", "--check"]) == 0
    text = Path("README.md").read_text()
    [row] = [line for line in text.splitlines() if line.startswith("| [demo](recipes/demo/README.md)")]
    assert "89.79 % (431 of 480)" in row
    assert "1, spread unknown" in row
    assert "(https://example.org/demo)" in row
    assert_tables_are_even(section(text, "published_recipes"))
    (Path("recipes") / "demo").rename(Path("gone"))
    assert main(["index", "--check"]) == 1


def test_words_around_the_table_stay_and_an_edit_of_it_is_shown(page: str, publish_one: None) -> None:
    main(["index"])
    after = Path("README.md").read_bytes().decode()
    start, end = "<!-- recipe:begin published_recipes", "<!-- recipe:end published_recipes -->"
    assert after.partition(start)[0] == page.partition(start)[0]
    assert after.partition(end)[2] == page.partition(end)[2]
    edited = after.replace("89.79 %", "99.79 %")
    Path("README.md").write_bytes(edited.encode())
    with pytest.raises(SystemExit):
        main(["index"])
    assert Path("README.md").read_bytes().decode() == edited


def test_a_page_without_a_place_and_a_strange_folder_are_refused(page: str) -> None:
    with pytest.raises(UserError, match="has no block 'published_recipes'"):
        with_table("# words\n", Path("recipes"))
    Path("recipes", "thesis").mkdir(parents=True)
    with pytest.raises(UserError, match="recipes/thesis holds no published recipe"):
        index.table(Path("recipes"))
