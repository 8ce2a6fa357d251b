"""The moving average against its closed form and torch's own AveragedModel (trap T25)."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from recipe.config.schema import AveragingConfig
from recipe.training.averaging import WeightAverage, build_average
from tests.conftest import compose_config


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
    average = WeightAverage(model, AveragingConfig(decay=0.9, every_steps=1))
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
    average = WeightAverage(model, AveragingConfig(decay=0.5, every_steps=1))
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
    average = WeightAverage(model, AveragingConfig(decay=0.0))
    average.update(1)
    assert average.model is model
    assert average.state() is None
    assert average.facts() == {"kind": "none"}


@pytest.mark.parametrize("every", [2, 3])
def test_it_moves_only_at_its_steps(every: int) -> None:
    model = network()
    average = WeightAverage(model, AveragingConfig(decay=0.9, every_steps=every))
    for step in range(1, 7):
        shake(model, step)
        average.update(step)
    assert average.updates == 6 // every


def test_state_survives_a_restart() -> None:
    model = network()
    average = WeightAverage(model, AveragingConfig(decay=0.9))
    for step in range(1, 4):
        shake(model, step)
        average.update(step)
    state = average.state()
    assert state is not None
    again = WeightAverage(model, AveragingConfig(decay=0.9))
    again.restore(state)
    shake(model, 9)
    average.update(4)
    again.update(4)
    for mine, theirs in zip(again.model.parameters(), average.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# ---- torchvision's form -----------------------------------------------------------------------------


def test_the_rescaled_decay_of_imagenet1k_v2_is_the_published_arithmetic() -> None:
    """0.99998 with 1024 images a step, every 32 steps, over 600 epochs: 1.09e-3 of the new weights at each update."""
    words = ("averaging.decay=0.99998", "averaging.every_steps=32", "averaging.form=torchvision")
    config = compose_config(*(f"optimization.{word}" for word in (*words, "batch_size=1024", "epochs=600")))
    average = build_average(network(), config.optimization, 1251)
    assert 1 - average.decay == pytest.approx(2e-5 * 1024 * 32 / 600)
    assert average.facts()["decay_before_rescaling"] == 0.99998


@pytest.mark.parametrize("warmup_epochs", [0, 2])
@pytest.mark.parametrize("every", [1, 3])
def test_it_is_the_loop_of_torchvisions_references(every: int, warmup_epochs: int) -> None:
    """references/classification/train.py, written out around torch's AveragedModel."""
    steps_per_epoch, epochs, batch_size, decay = 7, 5, 8, 0.99
    words = ("averaging.form=torchvision", f"averaging.decay={decay}", f"averaging.every_steps={every}")
    words += (f"batch_size={batch_size}", f"epochs={epochs}", f"warmup_epochs={warmup_epochs}")
    config = compose_config(*(f"optimization.{word}" for word in words)).optimization
    model = network()
    average = build_average(model, config, steps_per_epoch)
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
    config = compose_config("optimization.averaging.form=torchvision", "optimization.averaging.decay=0.99").optimization
    model = network()
    average = build_average(model, config, 1)
    for step in range(1, 9):
        shake(model, step)
        average.update(step)
    again = build_average(model, config, 1)
    again.restore(copy.deepcopy(average.state()))
    shake(model, 9)
    average.update(9)
    again.update(9)
    for mine, theirs in zip(again.model.parameters(), average.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert not torch.equal(mine, model[0].weight)


def test_off_it_is_the_model_itself() -> None:
    config = compose_config("optimization.averaging.form=torchvision").optimization
    model = network()
    average = build_average(model, config, 3)
    average.update(1)
    assert average.model is model
    assert average.facts() == {"kind": "none"}
