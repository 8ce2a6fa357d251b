"""python -m recipe index: the table of published recipes in README.md, made from their records.

It stands in a generated block of its own, so that an edit by hand is shown, not overwritten; `--check` is for CI.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from recipe.document import blocks
from recipe.document.formatting import Markdown, accuracy, code, hardware, percent, text
from recipe.document.publish import RECIPES
from recipe.document.published_folder import README
from recipe.document.render import seeds_top1
from recipe.document.run_data import RunData, load
from recipe.errors import UserError
from recipe.files import display_path, write_atomically
from recipe.records import PublicationRecord
from recipe.run import Run

BLOCK = "published_recipes"
HEAD = ("Recipe", "Data", "Top-1 (*measured*)", "Top-5 (*measured*)", "Runs", "Protocol", "Hardware", "Weights")


def describe(parser: ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where the table is not true")


def answer(arguments: Namespace) -> int:
    """Write or check the table of the README.md of this directory."""
    page = Path(README)
    if not page.is_file():
        raise UserError(f"there is no {README} here: run this in the root of the checkout")
    before = page.read_bytes().decode()
    after = with_table(before, RECIPES)
    if after == before:
        print(f"the table of published recipes in {README} is true")
        return 0
    if arguments.check:
        print(f"the table of published recipes in {README} is not true: run `python -m recipe index`")
        print(blocks.difference(before, after))
        return 1
    write_atomically(page, after.encode())
    print(f"wrote the table of published recipes in {README}")
    return 0


def with_table(page: str, recipes: Path) -> str:
    """The page with the table as it is now; raises `UserError` where the page has no place for it."""
    places = [piece for piece in blocks.split(page) if isinstance(piece, blocks.Block) and piece.id == BLOCK]
    if not places:
        raise UserError(f"{README} has no block {BLOCK!r}: put its two markers where the table belongs")
    return blocks.merge(page, {BLOCK: table(recipes)})


def table(recipes: Path) -> str:
    """One row for each published recipe, by name."""
    rows = [row(folder) for folder in published(recipes)]
    if not rows:
        return "\nNo recipe is published yet.\n\n"
    lines = [f"| {' | '.join(line)} |" for line in (HEAD, *rows)]
    return "\n" + "\n".join([lines[0], "|" + ":--|" * len(HEAD), *lines[1:]]) + "\n\n"


def published(recipes: Path) -> list[Path]:
    """The folders that `publish` wrote."""
    folders = sorted(path for path in recipes.glob("*") if path.is_dir() and not path.name.startswith("."))
    strange = [folder for folder in folders if Run(folder).read(PublicationRecord) is None]
    if strange:
        raise UserError(f"{display_path(strange[0])} holds no published recipe: publish it, or move it away")
    return folders


def row(folder: Path) -> tuple[str, ...]:
    """A recipe in one line, from its records."""
    facts = load(Run(folder), "")
    evaluation, training, data = facts.evaluation, facts.training, facts.preprocessing
    if evaluation is None or training is None or data is None or facts.publication is None:
        raise UserError(f"{display_path(folder)} lacks a record: publish it again")
    artefacts, weights = facts.publication.artefacts, code(training.outputs["weights"][:12])
    return (
        f"[{text(facts.name)}]({RECIPES.name}/{folder.name}/{README})",
        text(data.data_set),
        accuracy(evaluation.correct_top1, evaluation.images),
        accuracy(evaluation.correct_top5, evaluation.images),
        runs(facts),
        code(evaluation.protocol.name),
        hardware(training.provenance.hardware),
        f"[{weights}]({artefacts})" if artefacts else weights,
    )


def runs(facts: RunData) -> Markdown:
    """How far one number can be trusted."""
    found = seeds_top1(facts)
    if found is None:
        return Markdown("1, spread unknown")
    return Markdown(f"{found[0]} seeds, top-1 {percent(found[1])} ± {percent(found[2])} (mean ± standard deviation)")
