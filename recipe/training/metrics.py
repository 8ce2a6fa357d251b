"""Rows of metrics.jsonl: of the steps since the row before, and of a validation.

Here the host waits for the device (with fp16 the gradient scaler waits at every step too). A loss that is not finite
stops the training.
"""

from __future__ import annotations

import math
from typing import Any

from recipe.errors import NonFiniteError
from recipe.evaluation import Predict, Predictions, collect, evaluate, predictor
from recipe.run.metric_rows import EPOCH_FIELDS, Row
from recipe.run.progress import ProgressPrinter
from recipe.run.records import Epoch
from recipe.training.build import Training
from recipe.training.ema import PreciseBnBatches, precise_bn


def measure_steps(training: Training) -> None:
    """Write a `train` row over all processes. Every process calls this after the same step."""
    tally = training.world.sum(training.train_step.take_tally()).tolist()
    loss, top1, top5, images = tally
    seconds, waited_seconds = training.wait.lap()
    progress = training.progress
    progress.epoch_tally = [total + more for total, more in zip(progress.epoch_tally, tally, strict=True)]
    progress.training_seconds += seconds
    progress.epoch_seconds += seconds
    progress.epoch_waited_seconds += waited_seconds
    stalled = training.wait.stalled_fraction()
    progress.epoch_stalled_seconds += (stalled or 0.0) * seconds
    row = _measured_row(
        training,
        split="train",
        loss=loss / images,
        top1_accuracy=top1 / images,
        top5_accuracy=top5 / images,
        images_per_second=round(images / seconds, 2),
        data_wait_fraction=round(waited_seconds / seconds, 4),
        stalled_fraction=stalled,
    )
    with training.world.rank0_errors_everywhere():
        _write(training, row)


def validate(training: Training, predict: Predict) -> None:
    """Write a `validation` row: every image once. Its time is counted since the last lap."""
    predictions = predict_validation(training, predict)
    seconds, _ = training.wait.lap()
    with training.world.rank0_errors_everywhere():
        if predictions is not None:
            _note_validation(training, predictions, seconds)


def validation_predictor(training: Training) -> Predict:
    """A predictor of the evaluated weights, those of the EMA if it is on, made equal on every process.

    Call this before the epoch's checkpoint, so that the checkpoint contains the validated weights.
    """
    config, world, model = training.config, training.world, training.ema.model
    world.broadcast_module(training.model)
    predict = predictor(
        model,
        training.train_step.normalisation,
        config.trainer.precision,
        world.device,
        config.trainer.channels_last,
        config.evaluation.flip,
    )
    if training.ema.is_on:
        _recalibrate_ema(training, predict)
        world.broadcast_module(model)
    return predict


def predict_validation(training: Training, predict: Predict) -> Predictions | None:
    """Predictions of all validation images on rank 0, else None. Leaves the network in training mode."""
    validation = training.validation
    batches = training.stop_request.polled(training.watchdog.watched(validation), validation.common_batches)
    shows = training.metric_log is not None
    with ProgressPrinter("validating", len(validation), "batches", shows=shows) as progress:
        predictions = evaluate(predict, progress.counted(batches))
    collected = collect(predictions, training.world, len(validation.loader.split))
    training.model.train()
    return collected


def _recalibrate_ema(training: Training, predict: Predict) -> None:
    """Precise BN of the averaged weights, if asked for, on the first process."""
    images, world = training.ema.precise_bn_images, training.world
    with world.rank0_errors_everywhere():
        if images and world.is_rank0:
            batches = PreciseBnBatches(
                loader=training.batches.loader,
                transform=training.validation.transform,
                batch_size=training.validation.batch_size,
                images=images,
                seed=training.config.seed,
            )
            precise_bn(training.ema.model, predict, batches)


def _note_validation(training: Training, predictions: Predictions, seconds: float) -> None:
    """Write the row, note the best epoch so far and the cost of this one."""
    progress = training.progress
    progress.validation_seconds += seconds
    loss, top1, top5, images = progress.epoch_tally
    row = _measured_row(
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
    if training.metric_log is not None:
        stalled = epoch.stalled_fraction or 0.0
        training.metric_log.warn_of_waiting(epoch.epoch, epoch.data_wait_fraction, stalled, epoch.seconds)


def _measured_row(training: Training, **measured: Any) -> Row:
    progress = training.progress
    return Row(
        epoch=progress.epoch + 1,
        step=progress.step,
        images_seen=progress.images_seen,
        learning_rate=training.train_step.optimizer.param_groups[0]["lr"],
        seconds=round(progress.training_seconds + progress.validation_seconds, 3),
        **measured,
    )


def _epoch(training: Training, row: Row, validation_seconds: float) -> Epoch:
    progress = training.progress
    stalled = round(progress.epoch_stalled_seconds / progress.epoch_seconds, 4)
    training.note_memory()
    return Epoch(
        seconds=round(progress.epoch_seconds, 3),
        images_per_second=round(training.batches.images_per_epoch / progress.epoch_seconds, 2),
        data_wait_fraction=round(progress.epoch_waited_seconds / progress.epoch_seconds, 4),
        stalled_fraction=None if training.wait.probe is None else stalled,
        validation_seconds=round(validation_seconds, 3),
        **{name: getattr(row, field) for name, field in EPOCH_FIELDS.items()},
    )


def _write(training: Training, row: Row) -> None:
    """Write the row on rank 0. Raises `NonFiniteError` on every process that sees a loss that is not finite."""
    if not math.isfinite(row.loss):
        raise NonFiniteError(
            f"the {row.split} loss is {row.loss} at step {row.step} (epoch {row.epoch}); lower "
            f"optimization.learning_rate={training.config.optimization.learning_rate} or lengthen "
            "the warm-up; nothing was saved after the last checkpoint, which is kept"
        )
    if training.metric_log is not None:
        training.metric_log.write(row)
