"""The optimizers beside their formulas written out; SGD's own steps are in test_optimization.py (T17, T24)."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipe.config.schema import OptimizationConfig
from recipe.errors import UserError
from recipe.training.optimizer import build_optimizer, optimizer_facts
from tests.conftest import compose_config

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
    """Mosaic's: w <- (1 - decay x rate / full rate) w - rate x direction; momentum knows nothing of the decay."""
    config = settings("sgd_decoupled", f"nesterov={nesterov}", f"decay_norms_and_biases={not exempt}")
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
    stepped(mine, build_optimizer(settings("sgd_decoupled", "weight_decay=0"), mine, CPU))
    stepped(theirs, torch.optim.SGD(theirs.parameters(), lr=PEAK, momentum=0.9))
    assert all(torch.equal(mine.get_parameter(name), value) for name, value in theirs.named_parameters())


def test_an_overflow_in_fp16_does_not_even_decay() -> None:
    model = network().float()
    optimizer = build_optimizer(settings("sgd_decoupled"), model, CPU)
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

    The whole gradient is clipped to norm 1, and only tensors that decay are scaled by their norm over the update's.
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
