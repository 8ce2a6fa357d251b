"""What may be published: a run that was trained and evaluated, and what would make a reader trust it too much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from recipe.config.schema import NAME
from recipe.document.facts import STALE, Facts, gather, sections
from recipe.document.formatting import without_commit
from recipe.document.render import check_document
from recipe.errors import UserError
from recipe.provenance import NoCommitError, modified_files
from recipe.records import EvaluationRecord, PreprocessingRecord, Provenance, TrainingRecord
from recipe.run import Run, recorded_path, shown_path


@dataclass(frozen=True)
class Publishable:
    """A run with the records that a published recipe cannot do without."""

    run: Run
    facts: Facts
    data: PreprocessingRecord
    training: TrainingRecord
    evaluation: EvaluationRecord

    @property
    def where(self) -> str:
        """The run for a person."""
        return shown_path(self.run.directory)


def publishable(run: Run) -> Publishable:
    """Read a run; raises `UserError` where it is not finished, or where a generated block of its page was edited."""
    where = shown_path(run.directory)
    if not run.records.is_dir():
        raise UserError(f"{where} holds no run")
    check_document(run)
    facts = gather(run, recorded_path(run.directory))
    if facts.publication is not None:
        raise UserError(f"{where} is a published recipe already; give the run that it was made of")
    if facts.config is None or facts.training is None or facts.preprocessing is None:
        raise UserError(f"{where} was not trained yet: run `python train.py run_dir={where}` with its experiment")
    if facts.evaluation is None:
        raise UserError(f"{where} was not evaluated yet: run `python evaluate.py run_dir={where}`")
    if not NAME.fullmatch(facts.name):
        raise UserError(f"{where} has a name that cannot name a folder")
    return Publishable(run, facts, facts.preprocessing, facts.training, facts.evaluation)


def provenances(facts: Facts) -> Iterator[tuple[str, Provenance]]:
    """Each stage that ran, with the code that it ran on."""
    for stage in ("preprocessing", "training", "evaluation", "serialization", "inference", "projection"):
        if (record := getattr(facts, stage)) is not None:
            yield stage, record.provenance
    for other in facts.other_evaluations:
        yield f"evaluation {other.protocol.name}", other.provenance
    for timing in facts.timing:
        yield f"timing on {timing.machine}", timing.provenance


def stage_problems(facts: Facts) -> Iterator[str]:
    """Every stage whose code is no commit, or changed under it."""
    for stage, provenance in provenances(facts):
        states = (provenance.tree_at_start, provenance.tree_at_end)
        if any(state.state == "modified" or state.patch_sha256 for state in states):
            yield f"{stage} ran on a modified tree"
        else:
            unknown = (without_commit(state) for state in states if state.state not in ("clean", "untracked"))
            yield from (f"{stage} ran on code without a commit: {why}" for why in dict.fromkeys(unknown))
        if provenance.source_sha256 != provenance.source_sha256_at_end:
            yield f"the source changed during {stage}"


def tree_problems(outside: tuple[str, ...]) -> Iterator[str]:
    """The working tree as it is now, but for what publishing itself changes."""
    try:
        now = modified_files(outside)
    except NoCommitError as error:
        yield f"no commit names the code of this checkout: {without_commit(error.tree)}"
        return
    if now:
        yield f"the working tree is modified now ({', '.join(now[:3])}{', ...' if len(now) > 3 else ''})"


def stale_problems(facts: Facts) -> Iterator[str]:
    """Sections that no longer belong to what lies beside them."""
    for name, section in sections(facts).items():
        if section.state == STALE:
            yield f"the section {name} is stale ({'; '.join(section.reasons)})"
