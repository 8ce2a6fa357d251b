"""Several runs of one recipe, which differ in their seed only: n, mean and spread for the reader of a published one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from recipe.document.claims import columns
from recipe.document.publishable import Publishable, stage_problems, stale_problems
from recipe.errors import UserError
from recipe.records import SeedRun, SeedsRecord
from recipe.run import Run, shown_path


def seed_problems(main: Publishable, others: Sequence[Publishable]) -> Iterator[str]:
    """Runs of other seeds whose code is another, or no commit."""
    for other in others:
        if other.training.provenance.source_sha256 != main.training.provenance.source_sha256:
            yield f"{other.where} was trained by other code"
        for problem in stage_problems(other.facts):
            yield f"{other.where}: {problem}"


def require_same_recipe(main: Publishable, other: Publishable) -> None:
    """A run that differs in its seed only, measured in the same way; raises `UserError` for any other."""
    for what, theirs, ours in (
        ("recipe_id", other.training.recipe_id, main.training.recipe_id),
        ("data set", other.training.inputs.get("manifest"), main.training.inputs.get("manifest")),
        ("protocol", other.evaluation.protocol.name, main.evaluation.protocol.name),
    ):
        if theirs != ours:
            raise UserError(f"{other.where} has another {what} than the run to publish ({theirs}, not {ours})")
    for problem in stale_problems(other.facts):
        raise UserError(f"{other.where}: {problem}")


def seeds_of(main: Publishable, others: Sequence[Publishable], published: Run) -> SeedsRecord | None:
    """All runs of the recipe, this one among them; those that were published before stay where none are given."""
    if not others:
        return _published_before(main, published)
    runs = sorted((seed_run(entry) for entry in (main, *others)), key=lambda run: run.seed)
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds: each run must have a seed of its own, found {', '.join(map(str, seeds))}")
    return SeedsRecord(
        recipe_id=main.training.recipe_id,
        protocol=main.evaluation.protocol.name,
        images=main.evaluation.images,
        runs=runs,
    )


def _published_before(main: Publishable, published: Run) -> SeedsRecord | None:
    before = published.read(SeedsRecord)
    if before is not None and seed_run(main) not in before.runs:
        raise UserError(
            f"{shown_path(published.directory)} gives {len(before.runs)} seeds, and this run is none of them: name "
            "them again with --seeds"
        )
    return before


def seed_run(entry: Publishable) -> SeedRun:
    """What a recipe keeps of one of its runs."""
    return SeedRun(
        seed=entry.training.seed,
        weights_sha256=entry.evaluation.inputs["weights"],
        source_sha256=entry.training.provenance.source_sha256,
        correct_top1=entry.evaluation.correct_top1,
        correct_top5=entry.evaluation.correct_top5,
        epochs=columns(entry.training.epochs),
    )
