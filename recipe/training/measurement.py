"""Turns what the devices counted into rows: of the steps since the row before, and of a validation.

Here the host waits for the device (with fp16 the gradient scaler waits at every step too), and here it is noticed that
a loss is not finite.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from recipe import faults
from recipe.errors import NonFiniteError
from recipe.evaluation import Predict, Predictions, collect, evaluate, predictor
from recipe.metrics import EPOCH_FIELDS, Row
from recipe.records import Epoch
from recipe.training.build import Training
from recipe.training.recalibration import RecalibrationBatches, recalibrate


def measure_steps(training: Training) -> None:
    """A `train` row over all processes; every process calls this after the same step."""
    tally = training.world.sum(training.stepper.take_tally()).tolist()
    loss, top1, top5, images = tally
    seconds, waited_seconds = training.wait.lap()
    progress = training.progress
    progress.epoch_tally = [total + more for total, more in zip(progress.epoch_tally, tally, strict=True)]
    progress.training_seconds += seconds
    progress.epoch_seconds += seconds
    progress.epoch_waited_seconds += waited_seconds
    held_up = round(training.wait.probe.lap(), 4)
    progress.epoch_held_up_seconds += held_up * seconds
    row = _row(
        training,
        split="train",
        loss=loss / images,
        top1_accuracy=top1 / images,
        top5_accuracy=top5 / images,
        images_per_second=round(images / seconds, 2),
        data_wait_fraction=round(waited_seconds / seconds, 4),
        held_up_fraction=held_up,
    )
    with training.world.first_decides():
        _write(training, row)


def validate(training: Training, predict: Predict) -> None:
    """A `validation` row: every image once, by `validation_predictor`; its time is counted since the last lap."""
    faults.stop("validation", training.world.rank, training.progress.step)
    predictions = predict_validation(training, predict)
    seconds, _ = training.wait.lap()
    with training.world.first_decides():
        if predictions is not None:
            _note_validation(training, predictions, seconds)


def validation_predictor(training: Training) -> Predict:
    """The weights that count (the average where there is one): equal on every process, with their own statistics.

    It comes before the epoch's checkpoint, so that this holds the very weights that are validated.
    """
    config, world, model = training.config, training.world, training.average.model
    world.copy_from_first(training.model)
    predict = predictor(
        model,
        training.stepper.normalisation,
        config.trainer.precision,
        world.device,
        config.trainer.channels_last,
        config.evaluation.flip,
    )
    if training.average.is_on:
        _recalibrate_average(training, predict)
        world.copy_from_first(model)
    return predict


def predict_validation(training: Training, predict: Predict) -> Predictions | None:
    """A prediction for every validation image, on the first process; the network is in training mode afterwards."""
    batches = training.wish.watched(training.watch.watched(training.validation), training.validation.common_batches)
    predictions = collect(evaluate(predict, batches), training.world, len(training.validation.threads.split))
    training.model.train()
    return predictions


def _recalibrate_average(training: Training, predict: Predict) -> None:
    """New batch-norm statistics for the averaged weights, if asked for, on the first process."""
    images, world = training.average.recalibrate_images, training.world
    with world.first_decides():
        if images and world.is_first:
            batches = RecalibrationBatches(
                threads=training.batches.threads,
                transform=training.validation.transform,
                batch_size=training.validation.batch_size,
                images=images,
                seed=training.config.seed,
            )
            recalibrate(training.average.model, predict, batches)


def _note_validation(training: Training, predictions: Predictions, seconds: float) -> None:
    """The row, the best epoch so far, and what this epoch cost."""
    progress = training.progress
    progress.validation_seconds += seconds
    loss, top1, top5, images = progress.epoch_tally
    row = _row(
        training,
        split="validation",
        loss=predictions.loss,
        top1_accuracy=predictions.accuracy(1),
        top5_accuracy=predictions.accuracy(5),
        images_per_second=round(predictions.images / seconds, 2),
        data_wait_fraction=None,
        train_loss=loss / images,
        train_top1_accuracy=top1 / images,
        train_top5_accuracy=top5 / images,
    )
    if row.top1_accuracy > progress.best_top1_accuracy:
        progress.best_top1_accuracy = row.top1_accuracy
        progress.best_epoch, progress.best_step = row.epoch, row.step
    epoch = _epoch(training, row, seconds)
    progress.epochs.append(epoch)
    _write(training, row)
    if training.journal is not None:
        is_cuda = training.world.device.type == "cuda"  # a CPU computes on all cores, and is held up by itself
        held_up = (epoch.held_up_fraction or 0.0) if is_cuda else 0.0
        training.journal.warn_of_waiting(epoch.epoch, epoch.data_wait_fraction, held_up, epoch.seconds)


def _row(training: Training, **measured: Any) -> Row:
    """What was measured, and where in the run."""
    progress = training.progress
    return Row(
        epoch=progress.epoch + 1,
        step=progress.step,
        images_seen=progress.images_seen,
        learning_rate=training.stepper.optimizer.param_groups[0]["lr"],
        seconds=round(progress.training_seconds + progress.validation_seconds, 3),
        **measured,
    )


def _epoch(training: Training, row: Row, validation_seconds: float) -> Epoch:
    """The epoch that ends with this validation row."""
    progress = training.progress
    if training.world.device.type == "cuda":
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, torch.cuda.max_memory_allocated())
    return Epoch(
        seconds=round(progress.epoch_seconds, 3),
        images_per_second=round(training.batches.images_per_epoch / progress.epoch_seconds, 2),
        data_wait_fraction=round(progress.epoch_waited_seconds / progress.epoch_seconds, 4),
        held_up_fraction=round(progress.epoch_held_up_seconds / progress.epoch_seconds, 4),
        validation_seconds=round(validation_seconds, 3),
        **{name: getattr(row, field) for name, field in EPOCH_FIELDS.items()},
    )


def _write(training: Training, row: Row) -> None:
    """Write the row on the first process; stop on every process that sees a loss which is not finite."""
    if not math.isfinite(row.loss):
        raise NonFiniteError(
            f"the {row.split} loss is {row.loss} at step {row.step} (epoch {row.epoch}); lower "
            f"optimization.learning_rate={training.config.optimization.learning_rate} or lengthen "
            "the warm-up; nothing was saved after the last checkpoint, which is kept"
        )
    if training.journal is not None:
        training.journal.write(row)
