"""Checkpoints of a training: pinning the configuration, saving and resuming.

The order of an epoch and the pixels of a sample are functions of the seed, so the position in the data is (epoch,
batch). The learning rate is a function of the step. No generator or scheduler needs saving.

A checkpoint is written after the last step of every epoch, every `trainer.save_every_steps`, and on a stop request. An
epoch is saved before its validation, so a validation that fails costs no training: the same command validates again.
The results of a validation reach the next checkpoint, those of the last epoch the record.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import msgspec
import torch
from msgspec.structs import replace

from recipe.config.identity import config_sha256, differences
from recipe.config.schema import Config, OptimizerKind
from recipe.errors import SAVED, DiskError, NonFiniteError, UserError, how_to_continue
from recipe.models.checkpoint import State, checkpoint_files, newest_checkpoint, prune_checkpoints, save_checkpoint
from recipe.run.directory import Run, append_to_journal
from recipe.run.files import display_path
from recipe.run.records import Session, TrainingRecord, now
from recipe.training.build import Progress, Training
from recipe.training.metric_log import MetricLogger

FAILURES_IN_A_ROW = 3

# ---- before training ---------------------------------------------------------------------------------


def pin(run: Run, config: Config) -> None:
    """Write the configuration into a new run. Raises `UserError` for a run of another configuration.

    A first try that stopped before training (a batch that does not divide, missing data) can be corrected in place.
    """
    mine, theirs = config.pinned.values, run.read_config()
    has_begun = any(run.checkpoints.glob("step-*")) or run.read(TrainingRecord) is not None
    if theirs is None or not has_begun:
        run.write_config(mine)
        return
    changed = differences(theirs, mine)
    if changed:
        raise UserError(
            f"{display_path(run.directory)} has a run of another configuration ({'; '.join(changed)}); "
            "give another run_dir, or trainer.start_over=true to move that run aside"
        )


def finished_training(run: Run) -> TrainingRecord | None:
    """The record of a run that needs no more training, else None."""
    record, stored = run.read(TrainingRecord), run.read_config()
    if record is None or stored is None or record.config_sha256 != config_sha256(stored):
        return None
    return record


def check_space(training: Training) -> None:
    """Raise `DiskError` if the disk has no room for all checkpoints of the run. Quotas are not checked."""
    trainer, optimization, run = training.config.trainer, training.config.optimization, training.run
    sizes = [path.stat().st_size for path in checkpoint_files(run.checkpoints)]
    weights, parameters = (
        sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        for tensors in (training.model.state_dict().values(), training.model.parameters())
    )
    moments = parameters * (2 if optimization.optimizer is OptimizerKind.lamb else 1)
    size = sizes[-1] if sizes else weights * (1 + training.ema.is_on) + moments
    count = trainer.keep_checkpoints + 2
    if trainer.save_every_steps is None:
        count = min(count, optimization.epochs + 1)
    free = shutil.disk_usage(run.directory).free
    if free + sum(sizes) < count * size:
        raise DiskError(
            f"the disk of {display_path(run.directory)} has {free / 2**20:,.1f} MiB left, too little for {count} "
            f"checkpoints of {size / 2**20:,.1f} MiB (trainer.keep_checkpoints={trainer.keep_checkpoints}, the best "
            "one, one being written); free some space, keep fewer, or give a run_dir on another disk"
        )


# ---- continuing --------------------------------------------------------------------------------------


@contextmanager
def resumed(training: Training) -> Iterator[None]:
    """Continue from the newest checkpoint, or begin. Rank 0 also opens the metric log, and closes it at the end."""
    world, progress = training.world, training.progress
    restore(training, world.read_on_rank0(lambda: saved_state(training.run)))
    training.wait.continue_from(*progress.lap())
    with ExitStack() as stack:
        with world.rank0_errors_everywhere():
            if world.is_rank0:
                training.metric_log = MetricLogger(
                    training.run,
                    training.config.optimization.epochs,
                    training.batches.batches_per_epoch,
                    training.config.trainer.log_every_steps,
                    progress.step,
                    progress.epoch,
                )
                stack.enter_context(closing(training.metric_log))
                if training.metric_log.missing:
                    session = progress.sessions[-1]
                    note = f"{session.note}; {training.metric_log.missing}"
                    progress.sessions[-1] = replace(session, note=note)
        yield


def saved_state(run: Run) -> State | None:
    """Load the newest valid checkpoint. Removes leftovers of an interrupted save first."""
    for leftover in run.checkpoints.glob("*.tmp-*"):
        leftover.unlink()
    state = newest_checkpoint(run.checkpoints)
    if state is not None:
        progress = state["progress"]
        print(f"continuing in epoch {progress['epoch'] + 1} at step {progress['step']}", file=sys.stderr, flush=True)
    return state


def restore(training: Training, state: State | None) -> None:
    """Continue from a checkpoint, or begin. Starts a session and notes if it can be bit-exact."""
    world, train_step, progress = training.world, training.train_step, training.progress
    if state is None:
        _begin_session(training, is_exact=None, note="from the beginning")
        return
    for key, mine in (
        ("config_sha256", training.config.pinned.config_sha256),
        ("manifest_sha256", training.manifest_sha256),
    ):
        if state[key] != mine:
            raise UserError(
                f"the checkpoint's {key} is {state[key][:16]}, this run's is {mine[:16]}: it belongs "
                "to another configuration or data set; give another run_dir"
            )
    restorers: dict[str, Callable[[Any], object]] = {
        "model": training.model.load_state_dict,
        "average": training.ema.restore,
        "optimizer": lambda saved: _restore_optimizer(train_step.optimizer, saved),
        "scaler": train_step.scaler.load_state_dict,
        "progress": lambda saved: vars(progress).update(vars(msgspec.convert(saved, Progress))),
    }
    for entry, restorer in restorers.items():  # the checksum is right, the content may still not be training's
        try:
            restorer(state[entry])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise UserError(
                f"the entry {entry!r} of the checkpoint of step {state['progress']['step']} in "
                f"{display_path(training.run.directory)} does not fit this run ({type(error).__name__}); remove its "
                "file to continue from the one before, or begin again with trainer.start_over=true"
            ) from error
    train_step.skipped_steps = state["skipped_steps"]
    train_step.tally += train_step.tally.new_tensor(progress.tally_of(world))  # on its own device
    before = state["determinism_context"]
    changed = [
        f"{name} was {before.get(name)}, is {value}"
        for name, value in training.determinism_context.items()
        if before.get(name) != value
    ]
    if world.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        changed.append("algorithms are not deterministic (trainer.deterministic=false)")
    note = f"continued at step {progress.step}" + (f", not bit-exact: {'; '.join(changed)}" if changed else "")
    _begin_session(training, is_exact=not changed, note=note)


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    optimizer.load_state_dict(saved)
    for parameter, buffers in optimizer.state.items():
        for name, buffer in buffers.items():
            if isinstance(buffer, torch.Tensor) and buffer.dim() and buffer.shape != parameter.shape:
                raise ValueError(f"{name} has another shape than its parameter")


def _begin_session(training: Training, is_exact: bool | None, note: str) -> None:
    training.progress.sessions.append(
        Session(
            started=now(),
            first_step=training.progress.step,
            processes=training.world.size,
            is_exact=is_exact,
            note=note,
            source=training.determinism_context["the source"],
            batch_norm_batch_size=training.determinism_context["images per forward pass"],
        )
    )


# ---- saving ------------------------------------------------------------------------------------------


def save(training: Training, must_succeed: bool = False) -> None:
    """Write a checkpoint. Every process calls this after the same step.

    A full disk costs a warning, and the next checkpoint is tried as usual. Raises `DiskError` at the third failure in a
    row, if the checkpoint `must_succeed`, and if the run directory has vanished.
    """
    seconds, waited_seconds = training.wait.so_far()
    tallies = training.world.gather(training.train_step.tally.tolist())
    with training.world.rank0_errors_everywhere():
        if tallies is not None:  # the first process
            training.progress.window = {"tallies": tallies, "seconds": seconds, "waited_seconds": waited_seconds}
            training.note_memory()
            _save_or_warn(training, must_succeed)
    training.wait.continue_from(seconds, waited_seconds)  # saving does not count as training time


def save_where_due(training: Training) -> None:
    """Save inside an epoch, every `trainer.save_every_steps`. `fit` saves the end of an epoch."""
    every, progress = training.config.trainer.save_every_steps, training.progress
    if every is not None and progress.step % every == 0 and progress.batch < training.batches.batches_per_epoch:
        save(training)


def save_and_exit(training: Training) -> None:
    """Answer a stop request: the same command continues the run."""
    save(training, must_succeed=True)
    progress = training.progress
    if training.world.is_rank0:
        try:
            append_to_journal(training.run, "train", "stopped", step=progress.step)
        except DiskError as error:  # the checkpoint is saved
            print(f"warning: {error}", file=sys.stderr, flush=True)
        print(
            f"saved at step {progress.step}, in epoch {progress.epoch + 1}; {how_to_continue()}",
            file=sys.stderr,
            flush=True,
        )
    raise SystemExit(SAVED)


def _save_or_warn(training: Training, must_succeed: bool) -> None:
    if not training.run.config.exists():  # a new directory would contain the checkpoint and nothing else
        raise DiskError(f"{display_path(training.run.directory)} has vanished; nothing more can be saved there")
    try:
        if training.metric_log is not None:
            training.metric_log.flush(durably=True)  # no checkpoint before its rows
        _save(training)
    except DiskError as error:
        training.failed_saves += 1
        if must_succeed or training.failed_saves >= FAILURES_IN_A_ROW:
            raise
        print(
            f"warning: {error}; training goes on, the next checkpoint is tried as usual "
            f"({training.failed_saves} of {FAILURES_IN_A_ROW} failures in a row)",
            file=sys.stderr,
            flush=True,
        )
    else:
        training.failed_saves = 0


def _save(training: Training) -> None:
    """Write the checkpoint, then prune old ones."""
    model, progress, train_step = training.model.state_dict(), training.progress, training.train_step
    if not all(torch.isfinite(tensor).all() for tensor in model.values()):
        raise NonFiniteError(
            f"the weights are not finite at step {progress.step}; no checkpoint is written, the last one is kept"
        )
    pinned = training.config.pinned
    state: State = {
        "config": pinned.values,
        "config_sha256": pinned.config_sha256,
        "interface": msgspec.to_builtins(training.interface),
        "manifest_sha256": training.manifest_sha256,
        "determinism_context": training.determinism_context,
        "progress": msgspec.to_builtins(progress),
        "model": model,
        "average": training.ema.state(),
        "optimizer": train_step.optimizer.state_dict(),
        "scaler": train_step.scaler.state_dict(),
        "skipped_steps": train_step.skipped_steps,
    }
    save_checkpoint(training.run.checkpoints, progress.step, state)
    prune_checkpoints(training.run.checkpoints, training.config.trainer.keep_checkpoints, progress.best_step)
