"""One file from several seeds of a recipe: `python -m recipe aggregate RUN RUN RUN --output runs/seeds.json`.

The file holds every seed's epochs, no means, as `records/seeds.json` of a published recipe does; `watch` and
`reference=` take either.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recipe.errors import UserError
from recipe.files import display_path, write_atomically
from recipe.records import to_json
from recipe.review.watch.reference import open_reference


def describe(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="finished runs, recipes or seeds.json files")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the file to write, .json")


def answer(arguments: argparse.Namespace) -> int:
    """Write the file."""
    if arguments.output.suffix != ".json":
        raise UserError(f"--output {arguments.output} cannot be: its name must end in .json")
    found = open_reference(arguments.recipes)
    write_atomically(arguments.output, to_json(found))
    print(f"wrote {display_path(arguments.output)}: {len(found.runs)} seeds of recipe {found.recipe_id[:12]}")
    return 0
