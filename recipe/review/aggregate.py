"""One file of dynamics from several seeds: `python -m recipe aggregate RUN RUN RUN --output runs/dynamics.json`.

The file holds every seed's epochs, no means: whoever judges by it pools as it sees fit. `watch` and `reference=` take
it as it is, and beside a published document under the name `dynamics.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recipe.errors import UserError
from recipe.records import to_json
from recipe.review.watch.reference import open_reference
from recipe.run import shown_path, write_atomically


def describe(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="finished runs, recipes or files of dynamics")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the file to write, .json")


def answer(arguments: argparse.Namespace) -> int:
    """Write the file."""
    if arguments.output.suffix != ".json":
        raise UserError(f"--output {arguments.output} cannot be: the name of a file of dynamics ends in .json")
    found = open_reference(arguments.recipes)
    write_atomically(arguments.output, to_json(found))
    print(f"wrote {shown_path(arguments.output)}: {len(found.seeds)} seeds of recipe {found.recipe_id[:12]}")
    return 0
