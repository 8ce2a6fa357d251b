"""Several runs of one recipe, which differ in their seed only: n, mean and spread for the reader of a published one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from recipe.document.publishable import Publishable, stage_problems, stale_problems
from recipe.document.recipe_json import columns
from recipe.errors import UserError
from recipe.files import display_path
from recipe.records import SeedCounts, SeedRun, SeedsRecord
from recipe.run import Run


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
    """All runs of the recipe by seed, this one among them; without others those that were published before."""
    if not others:
        return _published_before(main, published)
    entries = sorted((main, *others), key=lambda entry: entry.training.seed)
    seeds = [entry.training.seed for entry in entries]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds: each run must have a seed of its own, found {', '.join(map(str, seeds))}")
    return seeds_record(entries)


def _published_before(main: Publishable, published: Run) -> SeedsRecord | None:
    before = published.read(SeedsRecord)
    if before is not None and seeds_record([main]).runs[0] not in before.runs:
        raise UserError(
            f"{display_path(published.directory)} gives {len(before.runs)} seeds, and this run is none of them: name "
            "them again with --seeds"
        )
    return before


def seeds_record(entries: Sequence[Publishable]) -> SeedsRecord:
    """The record of these runs of one recipe."""
    first = entries[0]
    return SeedsRecord(
        recipe_id=first.training.recipe_id,
        config={key: value for key, value in (first.facts.config or {}).items() if key != "seed"},
        steps_per_epoch=first.training.schedule.steps_per_epoch,
        runs=[
            SeedRun(
                seed=entry.training.seed,
                weights_sha256=entry.evaluation.inputs["weights"],
                source_sha256=entry.training.provenance.source_sha256,
                batch_norm_batch_size=entry.training.loader.batch_norm_batch_size,
                raw_sha256={name: split.raw_sha256 for name, split in entry.data.splits.items()},
                epochs=columns(entry.training.epochs),
            )
            for entry in entries
        ],
        evaluation=SeedCounts(
            protocol=first.evaluation.protocol.name,
            images=first.evaluation.images,
            correct_top1=[entry.evaluation.correct_top1 for entry in entries],
            correct_top5=[entry.evaluation.correct_top5 for entry in entries],
        ),
    )
