"""Training curves and other figures: which there are, their data, and their alternative texts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TypeVar

from recipe.document.formatting import Markdown, guesses, images_per_second_text, number, percent, significant, text
from recipe.document.latency import machine_title, single_pictures
from recipe.document.run_data import MetricRow, RunData
from recipe.run.records import EvaluationRecord, InferenceRecord, Schedule, TimingRecord, TrainingRecord

Points = Sequence[tuple[float, float]]
T = TypeVar("T")
TRAINING_INPUTS = "figures/training_inputs.png"
MISTAKES = "figures/mistakes.png"


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


def figure_names(facts: RunData) -> list[str]:
    """The figures that have something to show. The document names these and no others."""
    training, metrics, data = facts.training, facts.metrics, facts.preprocessing
    has = {"images_per_class": data is not None and any(split.images_per_class for split in data.splits.values())}
    if training is not None:
        has |= {
            "accuracy": bool(training.epochs),
            "loss": bool(points(metrics, "validation", "epoch", "loss") or points(metrics, "train", "step", "loss")),
            "learning_rate": len(training.schedule.points) > 1,
            "throughput": bool(points(metrics, "train", "step", "images_per_second")),
        }
    has["guesses"] = facts.inference is not None and bool(facts.inference.pictures)
    return [name for name, shows in has.items() if shows]


def points(metrics: Sequence[MetricRow], split: str, x: str, y: str) -> Points:
    """The pairs of one split in which both values were logged."""
    return [
        (row[x], row[y])
        for row in metrics
        if row["split"] == split and row.get(x) is not None and row.get(y) is not None
    ]


# ---- alternative texts: what is to be seen ------------------------------------------------------------


def figure_texts(facts: RunData) -> dict[str, Markdown]:
    """Name -> text of each figure that is drawn from the records."""
    training, made = facts.training, figure_names(facts)
    found: dict[str, Markdown] = {}
    if "images_per_class" in made and facts.preprocessing is not None:
        splits = facts.preprocessing.splits.items()
        ranges = [f"{text(n)} {s.images_per_class_min:,} to {s.images_per_class_max:,}" for n, s in splits]
        found["images_per_class"] = Markdown(f"Images per class: {', '.join(ranges)}")
    if "guesses" in made and facts.inference is not None:
        picture = facts.inference.pictures[0]
        best = next(iter(picture.guesses.values()))
        found["guesses"] = Markdown(f"Best classes of {text(picture.picture)}: {guesses(best)}")
    if training is None:
        return found
    epochs, schedule = training.epochs, training.schedule
    if "accuracy" in made:
        first, last = epochs[0], epochs[-1]
        found["accuracy"] = Markdown(
            f"Accuracy over {len(epochs):,} epochs: validation top-1 from {percent(first.validation_top1)} to "
            f"{percent(last.validation_top1)}, train top-1 from {percent(first.train_top1)} to "
            f"{percent(last.train_top1)}"
        )
    if "loss" in made:
        ends = ""
        if epochs:
            first, last = epochs[0], epochs[-1]
            ends = (
                f": validation from {number(first.validation_loss, 4)} to {number(last.validation_loss, 4)}, "
                f"train from {number(first.train_loss, 4)} to {number(last.train_loss, 4)}"
            )
        found["loss"] = Markdown(f"Loss over epochs{ends}")
    if "learning_rate" in made:
        step, peak = max(schedule.points, key=lambda point: point[1])
        found["learning_rate"] = Markdown(
            f"Learning rate over {schedule.steps:,} steps: at most {significant(peak)}, at step {step:,}; "
            f"{significant(schedule.points[-1][1])} at the end"
        )
    if "throughput" in made:
        speed = throughput(training)
        rate = (speed.warm_images_per_second or speed.cold_images_per_second) if speed else None
        waiting = f", {percent(speed.data_wait_fraction)} of the time waiting for data" if speed else ""
        found["throughput"] = Markdown(f"Training throughput: {images_per_second_text(rate)} images/s{waiting}")
    return found


def training_inputs_text(training: TrainingRecord) -> Markdown | None:
    """None where the record names no such figure."""
    if TRAINING_INPUTS not in training.outputs:
        return None
    return Markdown(
        "Images of the first training step as the network sees them, after augmentation, with their classes"
    )


def mistakes_text(evaluation: EvaluationRecord) -> Markdown | None:
    """None where the record names no such figure."""
    if MISTAKES not in evaluation.outputs:
        return None
    shown = ", ".join(f"{text(one.label)} taken for {text(one.predicted)}" for one in evaluation.mistakes)
    return Markdown(f"The mistakes with the largest margins: {shown}")


def picture_texts(inference: InferenceRecord) -> dict[str, Markdown]:
    """File -> text of the pictures that the notebook made."""
    samples = [found for found in inference.pictures if found.label is not None]
    right = sum(next(iter(found.guesses.values()))[0].name == found.label for found in samples if found.guesses)
    found = {file: text(PurePosixPath(file).stem) for file in inference.outputs}
    sheet = f"{len(samples)} validation images with class and first guess, {right} of them right"
    return {file: Markdown(sheet) if file.endswith("samples.png") else words for file, words in found.items()}


def latency_text(record: TimingRecord) -> Markdown:
    medians = ", ".join(
        f"{text(cell.backend)} in {text(cell.precision)} {number(cell.p50_milliseconds, 1)} ms"
        for cell in single_pictures(record)
    )
    return Markdown(
        f"Latency of one picture on {text(machine_title(record))}, preprocessing included; medians: {medians}"
    )
