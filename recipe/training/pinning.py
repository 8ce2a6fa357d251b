"""The configuration of a run is written once, by training; from then on the run is that recipe or nothing."""

from __future__ import annotations

from pathlib import Path

from recipe.config.identity import config_sha256, differences
from recipe.config.schema import Config
from recipe.errors import UserError
from recipe.records import TrainingRecord
from recipe.run import Run, shown_path


def pin(run: Run, config: Config) -> None:
    """Write the configuration into a new run; refuse a directory that holds a run of another one.

    It binds once something was trained: a first try that stopped before (a batch that does not divide, missing data)
    can be corrected in place.
    """
    mine, theirs = config.pinned.values, run.read_config()
    if theirs is None or not _has_begun(run):
        run.write_config(mine)
        return
    changed = differences(theirs, mine)
    if changed:
        raise UserError(
            f"{shown_path(run.directory)} holds a run of another configuration ({'; '.join(changed)}); "
            "give another run_dir, or trainer.restart=true to move that run aside"
        )


def _has_begun(run: Run) -> bool:
    return any(run.checkpoints.glob("step-*")) or run.read(TrainingRecord) is not None


def set_aside(run: Run) -> Path:
    """Rename the old run, unless somebody is writing to it."""
    with run.lock():
        return run.move_aside()


def finished_record(run: Run) -> TrainingRecord | None:
    """The record of a run that needs no more training, else None."""
    record = run.read(TrainingRecord)
    stored = run.read_config()
    if record is None or stored is None or record.config_sha256 != config_sha256(stored):
        return None
    return record
