"""The training loop. It reads as the algorithm: everything else is a collaborator that knows its own cadence.

`train.py` calls `train` in every process. It continues an interrupted run, recognises a finished one, and writes the
record of the Training chapter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import msgspec
import numpy as np
import torch

from recipe.config.identity import flatten
from recipe.config.schema import Config
from recipe.data.batches import Batch
from recipe.distributed import World, start_world
from recipe.models.build import resolve_weights
from recipe.models.checkpoint import prune_checkpoints, write_eval_weights
from recipe.models.pretrained import GivenWeights
from recipe.run.directory import Run, append_to_journal
from recipe.run.files import display_path
from recipe.run.provenance import Stage, source_sha256
from recipe.run.records import TrainingRecord
from recipe.training.build import Training, build_training
from recipe.training.checkpointing import (
    check_space,
    finished_training,
    pin,
    resumed,
    save,
    save_and_exit,
    save_where_due,
)
from recipe.training.metrics import measure_steps, validate, validation_predictor
from recipe.training.record import EnergyMeter, draw_training_inputs, training_record
from recipe.training.shutdown import Stopped, graceful_shutdown
from recipe.training.watchdog import Watchdog

AfterValidation = Callable[[Run], None]
DROPOUT_STREAM = 3  # keeps these seeds apart from those of the order and the augmentation


def train(config: Config, after_validation: AfterValidation | None = None) -> TrainingRecord | None:
    """Train the experiment of a configuration. Every process calls this with the same one.

    Rank 0 calls `after_validation` after each validation. It must not raise. Returns the record on rank 0, None on the
    others. Raises `UserError` for errors that a user can correct.
    """
    config, weights = resolve_weights(config)
    with (
        start_world(config.trainer) as world,
        graceful_shutdown(world) as stop_request,
        _one_writer(config, world) as run,
    ):
        finished = finished_training(run) if world.is_rank0 else None
        if world.broadcast_from_rank0(finished is not None):
            return finished
        stage = _started(run, config, weights) if world.is_rank0 else None
        with (
            Watchdog(world, run, config.trainer.timeout_seconds) as watchdog,
            build_training(config, world, run, stage, stop_request, watchdog, weights) as training,
            resumed(training),
        ):
            with world.rank0_errors_everywhere():
                if world.is_rank0:
                    check_space(training)
                    draw_training_inputs(training)
                    _print_start(config, world, run)
            meter = EnergyMeter(world)
            fit(training, after_validation)
            return _leave_record(training, meter) if world.is_rank0 else None


def _started(run: Run, config: Config, weights: GivenWeights | None) -> Stage:
    if weights is not None:
        print(weights, file=sys.stderr, flush=True)
    settings = {key: value for key, value in flatten(config.pinned.values).items() if "description." not in key}
    digest = config.pinned.config_sha256
    append_to_journal(run, "train", "started", name=config.name, config_sha256=digest, config=settings)
    return Stage(run.directory)


def _print_start(config: Config, world: World, run: Run) -> None:
    epochs, devices = config.optimization.epochs, f"{world.size} x {world.device.type}"
    work = f"{config.model.name} on {config.data.name}, {epochs} epoch{'s' * (epochs > 1)}, {devices}"
    print(f"training {work}: {display_path(run.directory)}", file=sys.stderr, flush=True)


def fit(training: Training, after_validation: AfterValidation | None = None) -> None:
    """Step over every epoch. After each, save a checkpoint and validate. Stop requests are checked between steps."""
    progress, epochs = training.progress, training.config.optimization.epochs
    try:
        training.stop_request.poll(0)  # a signal during the build
        for epoch in range(progress.epoch, epochs):
            for batches in training.wait.timed(training.batches.epoch(epoch, progress.batch)):
                take_step(training, batches)
                training.watchdog.progressed()
                training.stop_request.poll(progress.step)
                save_where_due(training)
            training.wait.lap()  # validation begins: its time does not count as training
            predict = validation_predictor(training)
            save(training, must_succeed=epoch + 1 == epochs)
            validate(training, predict)
            if after_validation is not None and training.world.is_rank0:
                after_validation(training.run)
            _complete_epoch(training)
    except Stopped:
        save_and_exit(training)


def take_step(training: Training, batches: list[Batch]) -> None:
    """One optimizer step, its counters and its row."""
    progress = training.progress
    torch.manual_seed(_dropout_seed(training))
    training.train_step(batches, training.learning_rate(progress.step))
    progress.step += 1
    progress.batch += 1
    progress.images_seen += training.batches.layout.global_batch_size
    training.ema.update(progress.step)
    is_last = progress.batch == training.batches.batches_per_epoch
    if is_last:
        progress.trained_epochs = progress.epoch + 1
    if is_last or progress.batch % training.config.trainer.log_every_steps == 0:
        measure_steps(training)
    if training.metric_log is not None:
        training.metric_log.step()


def _dropout_seed(training: Training) -> int:
    """A function of (seed, step, rank), so that networks with dropout continue exactly too."""
    key = (DROPOUT_STREAM, training.config.seed, training.progress.step, training.world.rank)
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def _complete_epoch(training: Training) -> None:
    progress = training.progress
    progress.epoch, progress.batch = progress.epoch + 1, 0
    progress.epoch_seconds = progress.epoch_waited_seconds = progress.epoch_stalled_seconds = 0.0
    progress.epoch_tally = [0.0] * 4
    training.wait.lap()


def _leave_record(training: Training, meter: EnergyMeter) -> TrainingRecord:
    energy = meter.record(training.progress.sessions)
    if training.metric_log is not None:
        training.metric_log.flush(durably=True)  # the last validation comes after the last checkpoint
    keep, best_step = training.config.trainer.keep_checkpoints, training.progress.best_step
    prune_checkpoints(training.run.checkpoints, keep, best_step)
    record = training_record(training)
    weights = training.ema.model.state_dict()
    write_eval_weights(training.run.checkpoints, training.progress.step, weights, record.outputs["weights"])
    training.run.write(record)
    if energy is not None:
        training.run.write(msgspec.structs.replace(energy, inputs={"weights": record.outputs["weights"]}))
    append_to_journal(
        training.run,
        "train",
        "ended",
        config_sha256=record.config_sha256,
        validation_loss=record.epochs[-1].validation_loss,
        validation_top1_accuracy=record.epochs[-1].validation_top1,
        validation_top5_accuracy=record.epochs[-1].validation_top5,
    )
    return record


@contextmanager
def _one_writer(config: Config, world: World) -> Iterator[Run]:
    """Pin the configuration and lock the run, on rank 0. All processes must have the same configuration and code."""
    run = Run(config.run_dir)
    with ExitStack() as stack:
        with world.rank0_errors_everywhere():
            if world.is_rank0:
                if config.trainer.start_over and run.config.exists():
                    print(f"the old run is now {display_path(run.archive())}", flush=True)
                stack.enter_context(run.lock())
                pin(run, config)
        world.assert_equal_across_ranks("the configuration", config.pinned.config_sha256)
        world.assert_equal_across_ranks("the source code", source_sha256())
        yield run
