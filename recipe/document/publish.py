"""python -m recipe publish RUN: a run's recipe as a folder that can be committed, `recipes/<name>/`.

README.md is at once a page and a model card; figures, records, the pinned configuration and the logged rows lie beside
it. Weights, checkpoints and TensorBoard's events stay out. The folder is written under another name and renamed, so
that it is whole or as before. What would make a reader trust too much (code that is no commit, sections that no longer
fit) is refused, or said on the page.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from recipe.document.model_card import LICENCE
from recipe.document.publishable import Publishable, publishable, stage_problems, stale_problems, tree_problems
from recipe.document.published_folder import README, fill, replaced_folder, thinned
from recipe.document.seeds import require_same_recipe, seed_problems, seeds_of
from recipe.errors import UserError
from recipe.files import display_path
from recipe.records import PublicationRecord, TrainingRecord
from recipe.run import Run

RECIPES = Path("recipes")
NOT_SOURCE = (str(RECIPES), README)  # what publishing itself changes
LONGEST_ADDRESS = 2000
LICENCES = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


def describe(parser: ArgumentParser) -> None:
    """The arguments of the verb."""
    parser.add_argument("run", help="the directory of a run that was trained and evaluated")
    parser.add_argument("--output", help="the folder to write; recipes/<name> by default")
    parser.add_argument("--artefacts", metavar="URL", help="where weights and exported files are, https only")
    parser.add_argument("--licence", default=LICENCE, help=f"of the model, as the Hub spells it; {LICENCE} by default")
    parser.add_argument("--seeds", nargs="+", metavar="RUN", default=[], help="runs of this recipe with other seeds")
    parser.add_argument("--allow-modified", action="store_true", help="publish what did not run on a clean commit")
    parser.add_argument("--allow-stale", action="store_true", help="publish sections whose inputs have changed since")


def answer(arguments: Namespace) -> int:
    """Publish, and say what to commit."""
    output = publish(
        Run(arguments.run),
        Path(arguments.output) if arguments.output else None,
        artefacts=arguments.artefacts,
        licence=arguments.licence,
        seeds=[Run(path) for path in arguments.seeds],
        allow_modified=arguments.allow_modified,
        allow_stale=arguments.allow_stale,
    )
    files = [path for path in output.rglob("*") if path.is_file()]
    where = display_path(output)
    print(f"wrote {where}: {len(files)} files, {sum(path.stat().st_size for path in files) / 1000:,.0f} kB")
    print("next:")
    print("  python -m recipe index")
    print(f"  git add {where} {README}")
    print(f'  git commit -m "Publish the recipe {output.name}"')
    return 0


def publish(
    run: Run,
    output: Path | None = None,
    *,
    artefacts: str | None = None,
    licence: str = LICENCE,
    seeds: Sequence[Run] = (),
    allow_modified: bool = False,
    allow_stale: bool = False,
) -> Path:
    """Write the folder of a published recipe; raises `UserError` for everything that should not be published."""
    main, others = publishable(run), [publishable(other) for other in seeds]
    output = output or RECIPES / main.facts.name
    require_address(artefacts)
    require_licence(licence)
    for other in others:
        require_same_recipe(main, other)
    require_own_folder(output, main)
    code = [*stage_problems(main.facts), *seed_problems(main, others), *tree_problems(NOT_SOURCE)]
    allowed = told("--allow-modified", allow_modified, code)
    allowed += told("--allow-stale", allow_stale, list(stale_problems(main.facts)))
    rows = main.facts.metrics
    publication = PublicationRecord(
        run_dir=main.facts.run_dir,
        artefacts=artefacts,
        allowed=allowed,
        metric_rows=len(rows),
        metric_rows_kept=len(thinned(rows)),
    )
    records = [publication, *filter(None, [seeds_of(main, others, Run(output))])]
    with replaced_folder(output) as folder:
        fill(folder, main, output, records, licence)
    return output


def told(flag: str, is_allowed: bool, problems: list[str]) -> list[str]:
    """The problems, if the person wants to publish all the same."""
    if problems and not is_allowed:
        raise UserError(f"not published: {'; '.join(problems)}. To publish it all the same, and say so, add {flag}")
    return problems


def require_address(address: str | None) -> None:
    """An https address without credentials, in one word."""
    if address is None:
        return
    try:
        parts = urlsplit(address) if address.isprintable() and len(address) <= LONGEST_ADDRESS else None
    except ValueError:
        parts = None
    if parts is None or parts.scheme != "https" or not parts.hostname or re.search(r'[\s<>"`\\|()\[\]]', address):
        raise UserError(f"--artefacts {address!r} cannot be: it must be an address that begins with https://")
    if "@" in parts.netloc:
        raise UserError("--artefacts holds a user name or a password: leave it out, the page is for everyone")


def require_licence(licence: str) -> None:
    """A name as the Hub spells licences."""
    if not LICENCES.fullmatch(licence):
        raise UserError(f"--licence {licence!r} cannot be: it must be a name of the Hub's list, such as {LICENCE}")


def require_own_folder(output: Path, main: Publishable) -> None:
    """A new folder, an empty one, or a published recipe of the same recipe_id."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    there = Run(output)
    is_published = output.is_dir() and there.read(PublicationRecord) is not None
    training = there.read(TrainingRecord) if is_published else None
    if training is None:
        raise UserError(f"{display_path(output)} is there and holds no published recipe; give another --output")
    if training.recipe_id != main.training.recipe_id:
        raise UserError(
            f"{display_path(output)} holds another recipe (recipe_id {training.recipe_id[:16]}, this run's is "
            f"{main.training.recipe_id[:16]}); give another --output"
        )
