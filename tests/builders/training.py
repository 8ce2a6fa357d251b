"""Trainings of the smoke experiment, killed ones too, and what they leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipe.config.schema import Config
from recipe.data.transforms import Normalisation
from recipe.distributed import World
from recipe.models.build import build_model
from recipe.models.checkpoint import checkpoint_files, load_checkpoint
from recipe.run.directory import Run
from recipe.run.records import TrainingRecord
from recipe.training import loop
from recipe.training.build import Training
from recipe.training.optim import build_loss, build_optimizer
from recipe.training.step import TrainStep
from tests.builders.configs import compose_config


class Killed(BaseException):
    """Stands for a process that is gone."""


def train(words: list[str]) -> TrainingRecord:
    record = loop.train(compose_config(*words))
    assert record is not None
    return record


def train_killed_in_epoch(words: list[str], epoch: int, step_in_epoch: int = 2) -> None:
    """Train until a step of `epoch` (from 0), then vanish without saving anything."""
    step = loop.take_step

    def dying_step(training: Training, batches: object) -> None:
        if (training.progress.epoch, training.progress.batch) == (epoch, step_in_epoch):
            raise Killed
        step(training, batches)  # type: ignore[arg-type]

    loop.take_step = dying_step  # not monkeypatch: this also runs in spawned processes
    try:
        with pytest.raises(Killed):
            loop.train(compose_config(*words))
    finally:
        loop.take_step = step


def last_state(words: list[str]) -> dict[str, object]:
    run = Run(compose_config(*words).run_dir)
    return load_checkpoint(checkpoint_files(run.checkpoints)[-1])


def assert_same_tensors(one: object, other: object) -> None:
    """Bit for bit, through nested dictionaries and lists."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)  # type: ignore[arg-type]
    elif isinstance(one, dict):
        assert one.keys() == other.keys()  # type: ignore[attr-defined]
        for key in one:
            assert_same_tensors(one[key], other[key])  # type: ignore[index]
    elif isinstance(one, list):
        for first, second in zip(one, other, strict=True):  # type: ignore[call-overload]
            assert_same_tensors(first, second)
    else:
        assert one == other


CPU = torch.device("cpu")


ALONE = World(0, 1, 0, 1, CPU, "none")


class NormalisationIn(Normalisation):
    """Gives the model's own type of numbers."""

    def __init__(self, config: Config, model: nn.Module) -> None:
        super().__init__(config.data.mean, config.data.std, CPU)
        self.dtype = next(model.parameters()).dtype

    def __call__(self, images: Tensor) -> Tensor:
        return super().__call__(images).to(self.dtype)


def step_of(config: Config, model: nn.Module, world: World = ALONE, stepped: nn.Module | None = None) -> TrainStep:
    return TrainStep(
        stepped or model,
        build_optimizer(config.optimization, model, CPU),
        build_loss(config.optimization),
        NormalisationIn(config, model),
        config.trainer,
        world,
    )


def state_of(step: int) -> dict[str, Any]:
    """Everything that a real state holds, small; several blocks of 4 KiB long."""
    generator = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(50, 70, generator=generator), "n": torch.tensor(step)}
    return {
        "config": {"name": "x"},
        "config_sha256": "0" * 64,
        "interface": {},
        "manifest_sha256": "1" * 64,
        "determinism_context": {},
        "scaler": {},
        "skipped_steps": 0,
        "progress": {"epoch": 1, "step": step, "best_step": 0, "epochs": [{"seconds": 1.5}]},
        "model": weights,
        "average": None,
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.randn(9, generator=generator)}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
    }


def network(config: Config, norm: str = "none", seed: int = 0) -> nn.Module:
    """In double precision, so that what should be equal differs by rounding of another order of magnitude."""
    return build_model(replace(config.model, norm=norm, zero_init_last_norm=False), 10, seed).double()
