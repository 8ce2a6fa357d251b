"""Batch-norm statistics of averaged weights beside torch's `update_bn` and closed forms (T25)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from recipe.checkpoint import checkpoint_files, load_checkpoint
from recipe.config.schema import ModelConfig, Precision
from recipe.data.decoding import build_decoder, decoded
from recipe.data.loading import Batch, DecodingThreads
from recipe.data.shards import open_split
from recipe.data.transforms import Normalisation, build_evaluation_transform
from recipe.distributed import World
from recipe.errors import UserError
from recipe.evaluation import Predict, predictor
from recipe.model import build_model
from recipe.run import Run
from recipe.training import loop
from recipe.training.recalibration import RecalibrationBatches, recalibrate
from tests.conftest import compose_config

CPU = torch.device("cpu")
NORMALISATION = Normalisation([0.5] * 3, [0.25] * 3, CPU)
Words = Callable[..., list[str]]


def network(**changes: Any) -> nn.Module:
    """With statistics of some training behind it."""
    model = build_model(ModelConfig(name="small", **changes), 10, 0).train()
    model(torch.randn(8, 3, 16, 16))
    return model


def predict_of(model: nn.Module) -> Predict:
    return predictor(model, NORMALISATION, Precision.fp32, CPU, channels_last=True)


def batches(count: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 6, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return [Batch(part, torch.zeros(6, dtype=torch.int64), torch.arange(6)) for part in images]


@pytest.mark.parametrize("stochastic_depth", [0.0, 0.5])
def test_statistics_are_those_of_torchs_update_bn_on_the_plain_network(stochastic_depth: float) -> None:
    """Stochastic depth changes nothing: no branch is dropped while statistics are estimated."""
    model = network(stochastic_depth=stochastic_depth, zero_init_last_norm=False)
    oracle = network(zero_init_last_norm=False)
    recalibrate(model, predict_of(model), batches())
    update_bn([NORMALISATION(batch.images) for batch in batches()], oracle)
    for (name, found), expected in zip(model.state_dict().items(), oracle.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_one_norm_holds_the_mean_of_the_batches() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    recalibrate(model, predict_of(model), batches())
    seen = [NORMALISATION(batch.images).transpose(0, 1).reshape(3, -1) for batch in batches()]
    state = model.state_dict()
    torch.testing.assert_close(state["0.running_mean"], torch.stack([part.mean(1) for part in seen]).mean(0))
    torch.testing.assert_close(state["0.running_var"], torch.stack([part.var(1) for part in seen]).mean(0))


def test_nothing_else_of_the_network_changes() -> None:
    model = network(stochastic_depth=0.5)
    before = copy.deepcopy(model)
    recalibrate(model, predict_of(model), batches())
    assert not any(module.training for module in model.modules())
    for (name, module), old in zip(model.named_modules(), before.modules(), strict=True):
        assert module.extra_repr() == old.extra_repr(), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name))


def test_a_network_without_batch_norm_is_refused() -> None:
    model = network(norm="none")
    with pytest.raises(UserError, match=r"recalibrate_images must be 0 for a network without batch norm"):
        recalibrate(model, predict_of(model), batches())


@pytest.mark.parametrize(("images", "sizes"), [(50, [24, 24]), (10, [10]), (10_000, [24] * 4)])
def test_the_images_are_a_choice_of_the_seed_in_whole_batches(
    data_directory: Path, images: int, sizes: list[int]
) -> None:
    config = compose_config("experiment=smoke", "trainer.data_threads=2")
    split = open_split(str(data_directory), "train")
    world = World(0, 1, 0, 1, CPU, "none")
    transform = build_evaluation_transform(config.evaluation)
    with closing(DecodingThreads(split, build_decoder(config.data.decoder), config.trainer, world)) as threads:
        one, same, other = (RecalibrationBatches(threads, transform, 24, images, seed) for seed in (0, 0, 1))
        found: list[Batch] = list(one)
        assert [len(batch.images) for batch in found] == sizes
        chosen = np.concatenate(one.parts())
        assert len(set(chosen.tolist())) == len(chosen)
        assert np.array_equal(chosen, np.concatenate(same.parts()))
        assert not np.array_equal(chosen, np.concatenate(other.parts()))
        first: Tensor = transform(decoded(split.read(int(chosen[0])), threads.filling.decoder))
        assert torch.equal(found[0].images[0], first)


def test_a_run_validates_and_saves_the_new_statistics_and_says_so(smoke: Words) -> None:
    words = smoke("optimization.averaging.decay=0.9", "optimization.averaging.recalibrate_images=48")
    record = loop.train(compose_config(*words))
    assert record is not None
    assert record.averaging["batch_norm_recalibrated_on_training_images"] == 48
    config = compose_config(*words)
    average = load_checkpoint(checkpoint_files(Run(config.run_dir).checkpoints)[-1])["average"]["model"]
    model = build_model(config.model, 12, 0)
    model.load_state_dict(average)
    split = open_split(config.data.directory, "train")
    world = World(0, 1, 0, 1, CPU, "none")
    normalisation = Normalisation(config.data.mean, config.data.std, CPU)
    predict = predictor(model, normalisation, Precision.fp32, CPU, channels_last=True)
    transform = build_evaluation_transform(config.evaluation)
    with closing(DecodingThreads(split, build_decoder(config.data.decoder), config.trainer, world)) as threads:
        recalibrate(model, predict, RecalibrationBatches(threads, transform, 64, 48, config.seed))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)
