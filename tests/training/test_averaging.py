"""The moving average against its closed form and torch's own AveragedModel (trap T25)."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from recipe.config import AveragingConfig
from recipe.training.averaging import WeightAverage


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
