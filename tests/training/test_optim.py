"""Losses, optimizers and schedules beside their formulas. Steps are in test_step.py (T17, T22, T24, T29, T30)."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from recipe.config.schema import LossKind, OptimizationConfig
from recipe.errors import UserError
from recipe.models.layers import init_head_bias
from recipe.training.optim import (
    BinaryCrossEntropy,
    Loss,
    build_loss,
    build_optimizer,
    build_schedule,
    loss_facts,
    optimizer_facts,
)
from tests.builders.configs import compose_config

# ---- losses -------------------------------------------------------------------------------------------

IMAGES, CLASSES = 9, 7
KINDS = [kind.value for kind in LossKind]


def loss_of(kind: str, **changes: Any) -> Loss:
    words = {"loss": kind, "label_smoothing": 0.0, **changes}
    return build_loss(compose_config(*(f"optimization.{key}={value}" for key, value in words.items())).optimization)


def example(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(IMAGES, CLASSES, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, CLASSES, (IMAGES,), generator=generator)


def one_hot(labels: Tensor) -> Tensor:
    return torch.eye(CLASSES, dtype=torch.float64)[labels]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_torchs_over_smoothed_targets(smoothing: float) -> None:
    logits, labels = example()
    targets = torch.full((IMAGES, CLASSES), smoothing / CLASSES, dtype=torch.float64)
    targets[range(IMAGES), labels] += 1 - smoothing
    found = loss_of("binary_cross_entropy", label_smoothing=smoothing)(logits, labels)
    torch.testing.assert_close(found, nn.BCEWithLogitsLoss()(logits, targets))
    logs, against = functional.logsigmoid(logits), functional.logsigmoid(-logits)
    torch.testing.assert_close(found, -(targets * logs + (1 - targets) * against).sum() / (IMAGES * CLASSES))


def test_mosaics_sums_over_classes() -> None:
    logits, labels = example()
    summed = loss_of("binary_cross_entropy", **{"bce.sum_classes": "true"})(logits, labels)
    expected = nn.BCEWithLogitsLoss(reduction="none")(logits, one_hot(labels)).sum(dim=1).mean()
    torch.testing.assert_close(summed, expected)
    torch.testing.assert_close(summed, CLASSES * loss_of("binary_cross_entropy")(logits, labels))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_soft_targets_are_smoothed_once_as_labels_are(kind: str, smoothing: float) -> None:
    """T29: both losses are linear in the target, so a mixed target costs the mixture of what its labels cost."""
    loss = loss_of(kind, label_smoothing=smoothing)
    logits, labels = example()
    others = example(1)[1]
    torch.testing.assert_close(loss(logits, one_hot(labels)), loss(logits, labels))
    mixed = loss(logits, 0.3 * one_hot(labels) + 0.7 * one_hot(others))
    torch.testing.assert_close(mixed, 0.3 * loss(logits, labels) + 0.7 * loss(logits, others))


def test_a_threshold_counts_each_class_of_a_mixed_image_as_present() -> None:
    loss = loss_of("binary_cross_entropy", **{"bce.target_threshold": 0.2})
    logits, labels = example()
    others = (labels + 1) % CLASSES
    both = one_hot(labels) + one_hot(others)
    torch.testing.assert_close(
        loss(logits, 0.75 * one_hot(labels) + 0.25 * one_hot(others)), nn.BCEWithLogitsLoss()(logits, both)
    )
    torch.testing.assert_close(
        loss(logits, 0.8 * one_hot(labels) + 0.2 * one_hot(others)), nn.BCEWithLogitsLoss()(logits, one_hot(labels))
    )
    smoothed = loss_of("binary_cross_entropy", label_smoothing=0.1, **{"bce.target_threshold": 0.2})
    torch.testing.assert_close(smoothed(logits, labels), loss_of(KINDS[1], label_smoothing=0.1)(logits, labels))


@pytest.mark.parametrize(("smoothing", "threshold"), [(0.0, None), (0.1, None), (0.0, 0.2)])
@pytest.mark.parametrize("sum_classes", [False, True])
def test_it_is_timms(smoothing: float, threshold: float | None, sum_classes: bool) -> None:
    losses = pytest.importorskip("timm.loss", reason="the extra `lamb` brings timm, which is not installed")
    theirs = losses.BinaryCrossEntropy(smoothing, target_threshold=threshold, sum_classes=sum_classes)
    mine = BinaryCrossEntropy(smoothing, sum_classes, threshold)
    logits, labels = example()
    torch.testing.assert_close(mine(logits, labels), theirs(logits, labels))
    if not smoothing:  # timm leaves the smoothing of mixed targets to its mixup
        soft = 0.7 * one_hot(labels) + 0.3 * one_hot((labels + 1) % CLASSES)
        torch.testing.assert_close(mine(logits, soft), theirs(logits, soft))


@pytest.mark.parametrize("lowered", [False, True])
def test_the_loss_begins_where_the_bias_of_the_head_puts_it(lowered: bool) -> None:
    """T30: log 2 for each class with a bias of 0. With -log(C) about (1 + log C) / C, some 90 times less for 1000."""
    head = nn.Linear(3, 1000)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if lowered:
        init_head_bias(head, "the head")
    found = float(loss_of("binary_cross_entropy")(head(torch.randn(5, 3)), torch.arange(5)).detach())
    own, others = (math.log(1001), 999 * math.log(1 + 1 / 1000)) if lowered else (math.log(2), 999 * math.log(2))
    assert found == pytest.approx((own + others) / 1000, rel=1e-5)
    assert not lowered or found == pytest.approx((1 + math.log(1000)) / 1000, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("soft", [False, True])
def test_half_precision_costs_no_accuracy_of_the_loss(kind: str, soft: bool) -> None:
    """The logits are rounded before, the loss is computed in fp32."""
    logits, labels = example()
    rounded = logits.bfloat16()
    targets = one_hot(labels).float() if soft else labels
    loss = loss_of(kind, label_smoothing=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(rounded, targets)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, loss(rounded.float(), targets), rtol=1e-6, atol=0)


def test_facts_are_the_live_loss() -> None:
    loss = loss_of("binary_cross_entropy", label_smoothing=0.1, **{"bce.target_threshold": 0.2})
    assert loss_facts(loss) == {
        "class": "BinaryCrossEntropy",
        "label_smoothing": 0.1,
        "reduction": "mean over images and classes",
        "target_threshold": 0.2,
    }
    loss.sum_classes = True  # type: ignore[union-attr]
    assert loss_facts(loss)["reduction"] == "sum over classes, mean over images"


@pytest.mark.parametrize("word", ["bce.sum_classes=true", "bce.target_threshold=0.2", "bce.init_head_bias=true"])
def test_a_setting_without_effect_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"or optimization\.loss=binary_cross_entropy"):
        compose_config(f"optimization.{word}")


# ---- optimizers ---------------------------------------------------------------------------------------

CPU = torch.device("cpu")
RATES = [0.02, 0.05, 0.03, 0.01]
PEAK = 0.05


def settings(optimizer: str, *words: str) -> OptimizationConfig:
    every = (f"optimizer={optimizer}", f"learning_rate={PEAK}", "weight_decay=0.1", *words)
    return compose_config(*(f"optimization.{word}" for word in every)).optimization


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for name, parameter in model.named_parameters()
    }


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(len(RATES))) -> nn.Module:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        for name, gradient in gradients(model, step).items():
            model.get_parameter(name).grad = gradient
        optimizer.step()
    return model


def decays(name: str) -> bool:
    return name in ("0.weight", "2.weight")


def assert_close(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-10, atol=1e-12)


def start(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ---- SGD with decoupled weight decay ----------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("exempt", [False, True])
def test_decoupled_sgd_is_its_formula(nesterov: bool, exempt: bool) -> None:
    """Mosaic's: w <- (1 - decay x rate / full rate) w - rate x direction. Momentum is free of the decay."""
    config = settings("sgdw", f"nesterov={nesterov}", f"decay_norms_and_biases={not exempt}")
    model = network()
    expected = start(model)
    velocities = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step, rate in enumerate(RATES):
        for name, gradient in gradients(model, step).items():
            velocities[name] = 0.9 * velocities[name] + gradient
            direction = gradient + 0.9 * velocities[name] if nesterov else velocities[name]
            decay = 0.1 if decays(name) or not exempt else 0.0
            expected[name] = (1 - decay * rate / PEAK) * expected[name] - rate * direction
    assert_close(stepped(model, build_optimizer(config, model, CPU)), expected)


def test_without_decay_it_is_torchs_sgd_bit_by_bit() -> None:
    mine, theirs = network(), network()
    stepped(mine, build_optimizer(settings("sgdw", "weight_decay=0"), mine, CPU))
    stepped(theirs, torch.optim.SGD(theirs.parameters(), lr=PEAK, momentum=0.9))
    assert all(torch.equal(mine.get_parameter(name), value) for name, value in theirs.named_parameters())


def test_an_overflow_in_fp16_does_not_even_decay() -> None:
    model = network().float()
    optimizer = build_optimizer(settings("sgdw"), model, CPU)
    before = start(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    scaler.scale(model(torch.full((4, 5), 1e30)).sum() * 1e30).backward()  # type: ignore[no-untyped-call]
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# ---- LAMB -------------------------------------------------------------------------------------------


@pytest.fixture
def timm() -> Iterator[Any]:
    return pytest.importorskip("timm", reason="the extra `lamb` brings timm, which is not installed")


def lamb_by_hand(model: nn.Module) -> dict[str, Tensor]:
    """You et al., arXiv 1904.00962, algorithm 2, as NVIDIA and timm have it.

    The gradient of all parameters is clipped to norm 1, and only tensors that decay are scaled by their norm over that
    of the update.
    """
    weights = start(model)
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step, rate in enumerate(RATES):
        found = gradients(model, step)
        clip = max(1.0, math.sqrt(sum(float(gradient.square().sum()) for gradient in found.values())))
        for name, gradient in found.items():
            gradient = gradient / clip
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            corrected = first[name] / (1 - 0.9 ** (step + 1))
            update = corrected / ((second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-6)
            trust = 1.0
            if decays(name):
                update = update + 0.1 * weights[name]
                trust = float(weights[name].norm() / update.norm())
            weights[name] = weights[name] - rate * trust * update
    return weights


@pytest.mark.usefixtures("timm")
def test_lamb_is_its_formula() -> None:
    model = network()
    expected = lamb_by_hand(model)
    assert_close(stepped(model, build_optimizer(settings("lamb"), model, CPU)), expected)


@pytest.mark.usefixtures("timm")
def test_lamb_continues_bit_by_bit_from_its_state() -> None:
    whole = network()
    stepped(whole, build_optimizer(settings("lamb"), whole, CPU))
    model = network()
    before = build_optimizer(settings("lamb"), model, CPU)
    stepped(model, before, range(2))
    after = build_optimizer(settings("lamb"), model, CPU)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    stepped(model, after, range(2, 4))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in whole.named_parameters())


@pytest.mark.usefixtures("timm")
def test_lambs_facts_are_json_and_its_live_groups() -> None:
    model = network()
    optimizer = build_optimizer(settings("lamb", "momentum=0.8"), model, CPU)
    stepped(model, optimizer)
    weights, exempt = (group.settings for group in optimizer_facts(optimizer))
    assert (weights["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert (weights["betas"], weights["eps"], weights["max_grad_norm"]) == ([0.8, 0.999], 1e-6, 1.0)
    assert not {"step", "lr", "params"} & weights.keys()


def test_without_its_package_lamb_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.optim.lamb", None)
    with pytest.raises(UserError, match=r"optimization\.optimizer=lamb needs .*'\.\[lamb\]'") as refusal:
        build_optimizer(settings("lamb"), network(), CPU)
    assert "\n" not in str(refusal.value)


def test_lamb_has_no_nesterov() -> None:
    with pytest.raises(UserError, match=r"optimization\.nesterov=True"):
        settings("lamb", "nesterov=true")


# ---- the learning rate --------------------------------------------------------------------------------

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
