"""When a checkpoint is written, what of the present moment goes into it, and what happens where writing fails.

After the last step of every epoch, every `trainer.save_every_steps` where that is asked for, and when the run is
stopped. An epoch is saved before its validation, so that one that fails costs no training: the same command validates
again. What validation found reaches the next checkpoint, of the last epoch the record.

A disk that is full for a while costs nothing but a warning: training goes on and the next time it is tried again. It
stops after three failures in a row, and where nothing would be left: at the end, when the process is about to exit,
and where the run directory has vanished. The rows before a checkpoint are written before it, or it counts as failed
too.
"""

from __future__ import annotations

import sys

import torch

from recipe.errors import SAVED, DiskError, how_to_continue
from recipe.experiment_log import append_to_journal
from recipe.files import display_path
from recipe.training.build import Training

FAILURES_IN_A_ROW = 3


def save(training: Training, must_succeed: bool = False) -> None:
    """Write a checkpoint of this moment; every process calls this after the same step."""
    seconds, waited_seconds = training.wait.so_far()
    tallies = training.world.gather(training.stepper.tally.tolist())
    with training.world.first_decides():
        if tallies is not None:  # the first process
            training.progress.window = {
                "tallies": tallies,
                "seconds": seconds,
                "waited_seconds": waited_seconds,
            }
            _note_memory(training)
            _try(training, must_succeed)
    training.wait.continue_from(seconds, waited_seconds)  # saving is no training time


def save_where_due(training: Training) -> None:
    """Inside an epoch, every `trainer.save_every_steps`; its last step is followed by validation, then saved anyway."""
    every, progress = training.config.trainer.save_every_steps, training.progress
    if every is not None and progress.step % every == 0 and progress.batch < training.batches.batches_per_epoch:
        save(training)


def save_and_exit(training: Training) -> None:
    """The end of a run that was asked to stop: the same command continues it."""
    save(training, must_succeed=True)
    progress = training.progress
    if training.world.is_first:
        where = f"step {progress.step}, in epoch {progress.epoch + 1}"
        try:
            append_to_journal(training.run, "train", "stopped", step=progress.step)
        except DiskError as error:  # what counts is saved
            print(f"warning: {error}", file=sys.stderr, flush=True)
        print(f"saved at {where}; {how_to_continue()}", file=sys.stderr, flush=True)
    raise SystemExit(SAVED)


def _try(training: Training, must_succeed: bool) -> None:
    state, failures = training.state, training.failures
    if not training.run.config.exists():  # a directory made anew would hold a checkpoint alone
        raise DiskError(f"{display_path(training.run.directory)} has vanished; nothing more can be saved there")
    try:
        if training.journal is not None:
            training.journal.settle(durably=True)
        state.save(training.config.trainer.keep_checkpoints)
    except DiskError as error:
        failures.in_a_row += 1
        if must_succeed or failures.in_a_row >= FAILURES_IN_A_ROW:
            raise
        print(
            f"warning: {error}; training goes on, the next checkpoint is tried as usual "
            f"({failures.in_a_row} of {FAILURES_IN_A_ROW} failures in a row)",
            file=sys.stderr,
            flush=True,
        )
    else:
        failures.in_a_row = 0


def _note_memory(training: Training) -> None:
    if training.world.device.type == "cuda":
        progress = training.progress
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, torch.cuda.max_memory_allocated())
