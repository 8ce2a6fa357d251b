"""The arithmetic of a projection: from measured factors to time, cost and cores. Nothing here measures or guesses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from recipe.records import MeasuredEvaluation, MeasuredLoading, MeasuredStep, Projected, ProjectionRecord


def project(
    *,
    accelerators: int,
    images_per_forward: int,
    training_images: int,
    validation_images: int,
    steps: Sequence[MeasuredStep],
    evaluation: MeasuredEvaluation | None,
    loading: MeasuredLoading | None,
    dollars_per_accelerator_hour: float | None,
) -> Projected:
    """Perfect scaling over `accelerators`; image counts are of all epochs."""
    index = step_for(images_per_forward, steps)
    images_per_second = steps[index].images_per_second * accelerators
    training_seconds = training_images / images_per_second
    validation_seconds = evaluation_seconds(validation_images, accelerators, evaluation)
    hours = accelerators * (training_seconds + (validation_seconds or 0.0)) / 3600
    return Projected(
        accelerators=accelerators,
        images_per_forward=images_per_forward,
        step=index,
        training_seconds=training_seconds,
        validation_seconds=validation_seconds,
        accelerator_hours=hours,
        dollars=None if dollars_per_accelerator_hour is None else hours * dollars_per_accelerator_hour,
        loader_images_per_second=images_per_second,
        loader_cores=cores_for(images_per_second, loading),
    )


def evaluation_seconds(images: int, accelerators: int, evaluation: MeasuredEvaluation | None) -> float | None:
    """None where no evaluation was measured."""
    return None if evaluation is None else images / (evaluation.images_per_second * accelerators)


def cores_for(images_per_second: float, loading: MeasuredLoading | None) -> int | None:
    """Whole cores like those on which the loader was measured; None where none was."""
    return None if loading is None else math.ceil(images_per_second / (loading.images_per_second / loading.cores))


def step_for(images_per_forward: int, steps: Sequence[MeasuredStep]) -> int:
    """The step that was measured with as many images a pass; else the fastest, so that the time stays a lower bound."""
    same = [at for at, step in enumerate(steps) if step.batch_size == images_per_forward]
    return max(same or range(len(steps)), key=lambda at: steps[at].images_per_second)


def projected_again(record: ProjectionRecord) -> list[Projected]:
    """The rows that the factors of a record give."""
    images = record.train_images // record.batch_size * record.batch_size
    return [
        project(
            accelerators=row.accelerators,
            images_per_forward=row.images_per_forward,
            training_images=images * record.epochs,
            validation_images=record.validation_images * record.epochs,
            steps=record.steps,
            evaluation=record.evaluation,
            loading=record.loading,
            dollars_per_accelerator_hour=record.dollars_per_accelerator_hour,
        )
        for row in record.rows
    ]
