"""Training curves: speed, points of the schedule, and which figures there are to draw."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from recipe.run.records import Schedule, TrainingRecord

MetricRow = dict[str, Any]
Points = Sequence[tuple[float, float]]
T = TypeVar("T")


@dataclass(frozen=True)
class Throughput:
    """Training speed, the cold epochs (the first of every session: caches, compilation) kept apart."""

    cold_images_per_second: float
    warm_epochs: int
    warm_images_per_second: float | None  # median
    data_wait_fraction: float  # median of the warm epochs, else of all
    stalled_fraction: float | None  # likewise


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
        stalled_fraction=median_of([epoch.stalled_fraction for epoch in warm or cold]),
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


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` items at even distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def figure_names(training: TrainingRecord, metrics: Sequence[MetricRow]) -> list[str]:
    """The figures that have something to show; the document names these and no others."""
    has = {
        "accuracy": bool(training.epochs),
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
