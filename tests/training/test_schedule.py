"""The learning rate against torch's own schedulers and closed forms (traps T21, T22)."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from recipe.training.schedule import build_schedule
from tests.conftest import compose_config

STEPS_PER_EPOCH = 7


def torch_curve(steps: int, peak: float, build: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler: LRScheduler = build(optimizer)  # type: ignore[operator]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # SequentialLR calls it itself
def test_cosine_with_warmup_is_torchs() -> None:
    config = compose_config("optimization.epochs=9", "optimization.warmup_epochs=2").optimization
    rate = build_schedule(config, STEPS_PER_EPOCH)
    warmup, steps = 2 * STEPS_PER_EPOCH, 9 * STEPS_PER_EPOCH
    expected = torch_curve(
        steps,
        config.learning_rate,
        lambda optimizer: SequentialLR(
            optimizer,
            [
                LinearLR(optimizer, config.warmup_start_factor, total_iters=warmup),
                CosineAnnealingLR(optimizer, T_max=steps - warmup),
            ],
            milestones=[warmup],
        ),
    )
    assert [rate(step) for step in range(steps)] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_step_schedule_is_torchs() -> None:
    config = compose_config("experiment=resnet50_classic").optimization
    rate = build_schedule(config, STEPS_PER_EPOCH)
    milestones = [epoch * STEPS_PER_EPOCH for epoch in (30, 60)]
    expected = torch_curve(90 * STEPS_PER_EPOCH, 0.1, lambda optimizer: MultiStepLR(optimizer, milestones, gamma=0.1))
    assert [rate(step) for step in range(90 * STEPS_PER_EPOCH)] == pytest.approx(expected, rel=1e-12)


def test_linear_schedule_is_ffcvs() -> None:
    """FFCV interpolates between (0, 1e-4 x peak), (2, peak), (16, 0) at epochs, and then between epochs at steps."""
    words = ("schedule=linear", "epochs=16", "warmup_epochs=2", "warmup_start_factor=1e-4", "learning_rate=1.7")
    rate = build_schedule(compose_config(*(f"optimization.{word}" for word in words)).optimization, STEPS_PER_EPOCH)
    at_epochs = np.interp(np.arange(17), [0, 2, 16], [1.7e-4, 1.7, 0])
    expected = [
        at_epochs[epoch] + (at_epochs[epoch + 1] - at_epochs[epoch]) * step / STEPS_PER_EPOCH
        for epoch in range(16)
        for step in range(STEPS_PER_EPOCH)
    ]
    assert [rate(step) for step in range(16 * STEPS_PER_EPOCH)] == pytest.approx(expected, rel=1e-12)
    assert rate(16 * STEPS_PER_EPOCH) == 0


def test_warmup_rises_at_every_step() -> None:
    rate = build_schedule(compose_config().optimization, 100)
    rates = [rate(step) for step in range(501)]
    assert all(after > before for before, after in itertools.pairwise(rates))
    assert rates[500] == 2.0


def test_the_last_step_is_almost_zero_but_not_zero() -> None:
    rate = build_schedule(compose_config().optimization, 100)
    assert 0 < rate(9000 - 1) < 1e-6
    assert math.isclose(rate(9000), 0.0, abs_tol=1e-12)


def test_recorded_points_are_the_live_curve() -> None:
    rate = build_schedule(compose_config("experiment=resnet50_classic").optimization, STEPS_PER_EPOCH)
    facts = rate.facts()
    assert facts.points[0][0] == 0
    assert facts.points[-1][0] == facts.steps - 1
    assert {209, 210, 419, 420} <= {step for step, _ in facts.points}
    assert all(value == rate(step) for step, value in facts.points)
