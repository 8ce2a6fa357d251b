"""The EMA beside its closed form and torch's AveragedModel, precise BN beside torch's update_bn (T25)."""

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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from recipe.config.schema import EmaConfig, ModelConfig, Precision
from recipe.data.batches import Batch
from recipe.data.decoding import build_decoder, decoded
from recipe.data.loader import ThreadedLoader
from recipe.data.shards import open_split
from recipe.data.transforms import Normalisation, build_evaluation_transform
from recipe.distributed import World
from recipe.errors import UserError
from recipe.evaluation import Predict, predictor
from recipe.models.build import build_model
from recipe.models.checkpoint import checkpoint_files, load_checkpoint
from recipe.run.directory import Run
from recipe.training import loop
from recipe.training.ema import ModelEma, PreciseBnBatches, build_ema, precise_bn
from tests.builders.configs import compose_config

# ---- the average --------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def shake(model: nn.Module, step: int) -> None:
    """Something like a training step: parameters and running statistics move."""
    torch.manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model(torch.randn(8, 3))


def test_buffers_and_parameters_follow_the_closed_form() -> None:
    model = network()
    average = ModelEma(model, EmaConfig(decay=0.9, every_steps=1))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(1, 30):
        shake(model, step)
        decay = min(0.9, step / (9 + step))
        for name, value in model.state_dict().items():
            expected[name] = (
                decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value.clone()
            )
        average.update(step)
    found = average.model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert int(found["1.num_batches_tracked"]) == 29


def test_after_its_warm_up_it_is_torchs_averaged_model() -> None:
    model = network()
    average = ModelEma(model, EmaConfig(decay=0.5, every_steps=1))
    average.updates = 1000
    oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    oracle.n_averaged.fill_(1)
    for step in range(1, 6):
        shake(model, step)
        average.update(step)
        oracle.update_parameters(model)
    for mine, theirs in zip(average.model.parameters(), oracle.module.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(average.model[1].running_var, oracle.module[1].running_var)  # type: ignore[index]


def test_off_is_the_model_itself() -> None:
    model = network()
    average = ModelEma(model, EmaConfig(decay=0.0))
    average.update(1)
    assert average.model is model
    assert average.state() is None
    assert average.facts() == {"kind": "none"}


@pytest.mark.parametrize("every", [2, 3])
def test_it_moves_only_at_its_steps(every: int) -> None:
    model = network()
    average = ModelEma(model, EmaConfig(decay=0.9, every_steps=every))
    for step in range(1, 7):
        shake(model, step)
        average.update(step)
    assert average.updates == 6 // every


def test_state_survives_a_restart() -> None:
    model = network()
    average = ModelEma(model, EmaConfig(decay=0.9))
    for step in range(1, 4):
        shake(model, step)
        average.update(step)
    state = average.state()
    assert state is not None
    again = ModelEma(model, EmaConfig(decay=0.9))
    again.restore(state)
    shake(model, 9)
    average.update(4)
    again.update(4)
    for mine, theirs in zip(again.model.parameters(), average.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# ---- torchvision's form -----------------------------------------------------------------------------


def test_the_rescaled_decay_of_imagenet1k_v2_is_the_published_arithmetic() -> None:
    """0.99998 with 1024 images a step, every 32 steps, over 600 epochs: 1.09e-3 of the new weights at each update."""
    words = ("ema.decay=0.99998", "ema.every_steps=32", "ema.form=torchvision")
    config = compose_config(*(f"optimization.{word}" for word in (*words, "batch_size=1024", "epochs=600")))
    average = build_ema(network(), config.optimization, 1251)
    assert 1 - average.decay == pytest.approx(2e-5 * 1024 * 32 / 600)
    assert average.facts()["decay_before_rescaling"] == 0.99998


@pytest.mark.parametrize("warmup_epochs", [0, 2])
@pytest.mark.parametrize("every", [1, 3])
def test_it_is_the_loop_of_torchvisions_references(every: int, warmup_epochs: int) -> None:
    """references/classification/train.py, written out around torch's AveragedModel."""
    steps_per_epoch, epochs, batch_size, decay = 7, 5, 8, 0.99
    words = ("ema.form=torchvision", f"ema.decay={decay}", f"ema.every_steps={every}")
    words += (f"batch_size={batch_size}", f"epochs={epochs}", f"warmup_epochs={warmup_epochs}")
    config = compose_config(*(f"optimization.{word}" for word in words)).optimization
    model = network()
    average = build_ema(model, config, steps_per_epoch)
    taken = min(1.0, (1.0 - decay) * batch_size * every / epochs)
    oracle = AveragedModel(model, avg_fn=lambda old, new, _: (1.0 - taken) * old + taken * new, use_buffers=True)
    step = 0
    for epoch in range(epochs):
        for index in range(steps_per_epoch):
            step += 1
            shake(model, step)
            average.update(step)
            if index % every == 0:
                oracle.update_parameters(model)
                if epoch < warmup_epochs:
                    oracle.n_averaged.fill_(0)
            for mine, theirs in zip(average.model.parameters(), oracle.module.parameters(), strict=True):
                torch.testing.assert_close(mine, theirs)
            torch.testing.assert_close(average.model[1].running_var, oracle.module[1].running_var)  # type: ignore[index]


def test_torchvisions_form_continues_after_a_restart() -> None:
    config = compose_config("optimization.ema.form=torchvision", "optimization.ema.decay=0.99").optimization
    model = network()
    average = build_ema(model, config, 1)
    for step in range(1, 9):
        shake(model, step)
        average.update(step)
    again = build_ema(model, config, 1)
    again.restore(copy.deepcopy(average.state()))
    shake(model, 9)
    average.update(9)
    again.update(9)
    for mine, theirs in zip(again.model.parameters(), average.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert not torch.equal(mine, model[0].weight)


def test_off_it_is_the_model_itself() -> None:
    config = compose_config("optimization.ema.form=torchvision").optimization
    model = network()
    average = build_ema(model, config, 3)
    average.update(1)
    assert average.model is model
    assert average.facts() == {"kind": "none"}


# ---- precise BN ---------------------------------------------------------------------------------------

CPU = torch.device("cpu")
NORMALISATION = Normalisation([0.5] * 3, [0.25] * 3, CPU)
Words = Callable[..., list[str]]


def small_network(**changes: Any) -> nn.Module:
    """A model with statistics of some training."""
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
    model = small_network(stochastic_depth=stochastic_depth, zero_init_last_norm=False)
    oracle = small_network(zero_init_last_norm=False)
    precise_bn(model, predict_of(model), batches())
    update_bn([NORMALISATION(batch.images) for batch in batches()], oracle)
    for (name, found), expected in zip(model.state_dict().items(), oracle.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_a_norm_has_the_mean_of_the_batches() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    precise_bn(model, predict_of(model), batches())
    seen = [NORMALISATION(batch.images).transpose(0, 1).reshape(3, -1) for batch in batches()]
    state = model.state_dict()
    torch.testing.assert_close(state["0.running_mean"], torch.stack([part.mean(1) for part in seen]).mean(0))
    torch.testing.assert_close(state["0.running_var"], torch.stack([part.var(1) for part in seen]).mean(0))


def test_nothing_else_of_the_network_changes() -> None:
    model = small_network(stochastic_depth=0.5)
    before = copy.deepcopy(model)
    precise_bn(model, predict_of(model), batches())
    assert not any(module.training for module in model.modules())
    for (name, module), old in zip(model.named_modules(), before.modules(), strict=True):
        assert module.extra_repr() == old.extra_repr(), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name))


def test_a_network_without_batch_norm_is_refused() -> None:
    model = small_network(norm="none")
    with pytest.raises(UserError, match=r"precise_bn_images must be 0 for a network without batch norm"):
        precise_bn(model, predict_of(model), batches())


@pytest.mark.parametrize(("images", "sizes"), [(50, [24, 24]), (10, [10]), (10_000, [24] * 4)])
def test_the_seed_chooses_the_images_in_full_batches(data_directory: Path, images: int, sizes: list[int]) -> None:
    config = compose_config("experiment=smoke", "loader.threads=2")
    split = open_split(str(data_directory), "train")
    world = World(0, 1, 0, 1, CPU, "none")
    transform = build_evaluation_transform(config.evaluation)
    with closing(ThreadedLoader(split, build_decoder(config.loader.decoder), config.loader, world)) as threads:
        one, same, other = (PreciseBnBatches(threads, transform, 24, images, seed) for seed in (0, 0, 1))
        found: list[Batch] = list(one)
        assert [len(batch.images) for batch in found] == sizes
        chosen = np.concatenate(one.parts())
        assert len(set(chosen.tolist())) == len(chosen)
        assert np.array_equal(chosen, np.concatenate(same.parts()))
        assert not np.array_equal(chosen, np.concatenate(other.parts()))
        first: Tensor = transform(decoded(split.read(int(chosen[0])), threads.decoder))
        assert torch.equal(found[0].images[0], first)


def test_a_run_validates_and_saves_the_new_statistics_and_says_so(smoke: Words) -> None:
    words = smoke("optimization.ema.decay=0.9", "optimization.ema.precise_bn_images=48")
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
    with closing(ThreadedLoader(split, build_decoder(config.loader.decoder), config.loader, world)) as threads:
        precise_bn(model, predict, PreciseBnBatches(threads, transform, 64, 48, config.seed))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)
