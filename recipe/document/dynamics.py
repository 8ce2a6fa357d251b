"""How training went, one row an epoch: joined from the logged rows and the training record.

Rows are joined by number, never by position, and a value that was not logged stays absent.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from recipe.records import Epoch, Schedule, TrainingRecord

MetricRow = dict[str, Any]
Points = Sequence[tuple[float, float]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class EpochRow:
    """One row of the table of dynamics."""

    epoch: int
    learning_rate: float | None  # of the last logged row of the epoch
    train_loss: float | None
    train_top1: float | None
    validation_loss: float | None
    validation_top1: float | None
    validation_top5: float | None
    images_per_second: float | None
    data_wait_fraction: float | None
    seconds: float | None


@dataclass(frozen=True)
class Throughput:
    """Training speed, the cold epochs (the first of every session: caches, compilation) kept apart."""

    cold_images_per_second: float
    warm_epochs: int
    warm_images_per_second: float | None  # median
    data_wait_fraction: float  # median of the warm epochs, else of all
    held_up_fraction: float | None  # likewise


def epoch_rows(training: TrainingRecord, metrics: Sequence[MetricRow]) -> list[EpochRow]:
    """All epochs of a finished run in order."""
    return joined_rows(metrics, training.epochs)


def joined_rows(metrics: Sequence[MetricRow], epochs: Sequence[Epoch] = ()) -> list[EpochRow]:
    """All epochs in order; what they cost is known only when a run has ended."""
    costs = {epoch.epoch: epoch for epoch in epochs}
    numbers = sorted({row["epoch"] for row in metrics} | costs.keys())
    weights = train_weights(metrics)
    return [epoch_row(number, metrics, weights, costs.get(number)) for number in numbers]


def epoch_row(number: int, metrics: Sequence[MetricRow], weights: dict[int, float], cost: Epoch | None) -> EpochRow:
    train = [(row, weights[at]) for at, row in enumerate(metrics) if row["epoch"] == number and row["split"] == "train"]
    validation = last([row for row in metrics if row["epoch"] == number and row["split"] == "validation"])
    return EpochRow(
        epoch=number,
        learning_rate=last([row for row, _ in train]).get("learning_rate"),
        train_loss=weighted_mean(train, "loss"),
        train_top1=weighted_mean(train, "top1_accuracy"),
        validation_loss=validation.get("loss"),
        validation_top1=validation.get("top1_accuracy"),
        validation_top5=validation.get("top5_accuracy"),
        images_per_second=cost.images_per_second if cost else None,
        data_wait_fraction=cost.data_wait_fraction if cost else None,
        seconds=cost.seconds if cost else None,
    )


def train_weights(metrics: Sequence[MetricRow]) -> dict[int, float]:
    """Position of a train row -> the steps that it covers: those since the train row before it."""
    weights, step_before = {}, 0
    for position, row in enumerate(metrics):
        if row["split"] == "train":
            weights[position] = max(row["step"] - step_before, 0)
            step_before = row["step"]
    return weights


def weighted_mean(rows: list[tuple[MetricRow, float]], key: str) -> float | None:
    present = [(row[key], weight) for row, weight in rows if row.get(key) is not None]
    total = sum(weight for _, weight in present)
    return float(sum(value * weight for value, weight in present)) / total if total else None


def last(rows: Sequence[MetricRow]) -> MetricRow:
    return rows[-1] if rows else {}


def throughput(training: TrainingRecord) -> Throughput | None:
    """None where no epoch was finished."""
    cold_numbers = {session.first_step // training.schedule.steps_per_epoch + 1 for session in training.sessions}
    cold = [epoch for epoch in training.epochs if epoch.epoch in cold_numbers] or training.epochs[:1]
    warm = [epoch for epoch in training.epochs if epoch not in cold]
    if not cold:
        return None
    return Throughput(
        cold_images_per_second=cold[0].images_per_second,
        warm_epochs=len(warm),
        warm_images_per_second=statistics.median(epoch.images_per_second for epoch in warm) if warm else None,
        data_wait_fraction=statistics.median(epoch.data_wait_fraction for epoch in warm or cold),
        held_up_fraction=median_of([epoch.held_up_fraction for epoch in warm or cold]),
    )


def median_of(values: Sequence[float | None]) -> float | None:
    """The median of those that were measured, None where none was."""
    measured = [value for value in values if value is not None]
    return statistics.median(measured) if measured else None


def schedule_rows(schedule: Schedule, most: int = 8) -> list[tuple[int, float]]:
    """A few points of the schedule: evenly spread, the peak (the end of a warm-up) among them."""
    if not schedule.points:
        return []
    peak = max(schedule.points, key=lambda point: point[1])
    return sorted({*evenly(schedule.points, most), peak})


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` items at even distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def figure_names(training: TrainingRecord, metrics: Sequence[MetricRow]) -> list[str]:
    """The figures that have something to show; the document names these and no others."""
    has = {
        "accuracy": bool(points(metrics, "validation", "epoch", "top1_accuracy")),
        "loss": bool(points(metrics, "validation", "epoch", "loss") or points(metrics, "train", "step", "loss")),
        "learning_rate": len(training.schedule.points) > 1,
        "throughput": bool(points(metrics, "train", "step", "images_per_second")),
    }
    return [name for name, shows in has.items() if shows]


def points(metrics: Sequence[MetricRow], split: str, x: str, y: str) -> Points:
    """The pairs of one split in which both values were logged."""
    return [
        (row[x], row[y])
        for row in metrics
        if row["split"] == split and row.get(x) is not None and row.get(y) is not None
    ]
