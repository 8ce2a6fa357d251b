"""The learning rate as a pure function of the step: nothing to save, nothing to forget at a restart.

All shapes change at every optimizer step, the warm-up included (stepping once an epoch would make a staircase of it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from recipe.config.schema import OptimizationConfig, ScheduleKind
from recipe.records import Schedule

RECORDED_POINTS = 100


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to `peak`, then a cosine or a line to zero, or falls by `step_factor` after `step_epochs`."""

    peak: float
    kind: ScheduleKind
    steps: int
    steps_per_epoch: int
    warmup_steps: int
    warmup_start_factor: float
    step_epochs: tuple[int, ...]
    step_factor: float

    def __call__(self, step: int) -> float:
        """The rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            start = self.warmup_start_factor
            return self.peak * (start + (1 - start) * step / self.warmup_steps)
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.kind is ScheduleKind.cosine:
            return self.peak * 0.5 * (1 + math.cos(math.pi * progress))
        if self.kind is ScheduleKind.linear:
            return self.peak * (1 - progress)
        falls = sum(step >= epoch * self.steps_per_epoch for epoch in self.step_epochs)
        return self.peak * self.step_factor**falls

    def facts(self) -> Schedule:
        """The rate at evenly chosen steps, the first, the last and the end of the warm-up included."""
        count = min(RECORDED_POINTS, self.steps)
        chosen = {round(place * (self.steps - 1) / max(1, count - 1)) for place in range(count)}
        chosen |= {step for step in (self.warmup_steps, *self._falls()) if step < self.steps}
        return Schedule(
            steps=self.steps,
            steps_per_epoch=self.steps_per_epoch,
            warmup_steps=self.warmup_steps,
            points=[(step, self(step)) for step in sorted(chosen)],
        )

    def _falls(self) -> list[int]:
        """The steps on either side of each fall."""
        if self.kind is not ScheduleKind.step:
            return []
        sides = (epoch * self.steps_per_epoch + side for epoch in self.step_epochs for side in (-1, 0))
        return [step for step in sides if step >= 0]


def build_schedule(config: OptimizationConfig, steps_per_epoch: int) -> LearningRate:
    """The schedule of a run whose epochs have `steps_per_epoch` optimizer steps."""
    return LearningRate(
        peak=config.learning_rate,
        kind=config.schedule,
        steps=config.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        warmup_start_factor=config.warmup_start_factor,
        step_epochs=tuple(config.step_epochs),
        step_factor=config.step_factor,
    )
