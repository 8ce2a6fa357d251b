"""Blur pooling, stochastic depth and the bias of the head, compared with other implementations (T30)."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve
from torch import Tensor, nn
from torch.nn import functional

from recipe.config.schema import ModelConfig
from recipe.errors import UserError
from recipe.models.build import architecture_sha256, build_model, model_facts
from recipe.models.layers import (
    BlurredConv2d,
    DropPathBatchNorm2d,
    add_blur_pool,
    add_stochastic_depth,
    alteration_facts,
    init_head_bias,
    residual_blocks,
)


def network(name: str = "small", seed: int = 0, **changes: Any) -> nn.Module:
    return build_model(ModelConfig(name=name, **changes), 10, seed)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- blurred strides --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "padding", "groups"), [(3, 1, 1), (1, 0, 1), (3, 1, 4), (1, 0, 4), (1, 1, 1)])
def test_the_input_goes_through_the_binomial_filter_of_scipy(kernel: int, padding: int, groups: int) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 8, kernel, stride=2, padding=padding, groups=groups).double()
    images = pictures(2, 16, 9, 12).double()
    binomial = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    blurred = [[convolve(channel, binomial, mode="constant") for channel in image] for image in images.numpy()]
    expected = plain(torch.from_numpy(np.array(blurred)))
    found = BlurredConv2d(plain).double()(images)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


class FfcvForm(nn.Module):
    """An implementation from the description: a blur of stride 1 with zero padding, then the convolution."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, features: Tensor) -> Tensor:
        rows = functional.pad(features, (0, 0, 1, 1))
        rows = (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4
        columns = functional.pad(rows, (1, 1))
        blurred = (columns[..., :-2] + 2 * columns[..., 1:-1] + columns[..., 2:]) / 4
        result: Tensor = self.convolution(blurred)
        return result


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "small"])
def test_the_network_is_the_plain_one_with_its_strided_convolutions_blurred(name: str) -> None:
    plain, blurred = network(name).eval(), network(name, blur_pool=True).eval()
    assert {key for key in blurred.state_dict() if not key.endswith(".blur")} == set(plain.state_dict())
    assert all(torch.equal(value, blurred.state_dict()[key]) for key, value in plain.state_dict().items())
    for parent in list(plain.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and child.stride == (2, 2) and child.in_channels > 3:
                setattr(parent, key, FfcvForm(child))
    images = pictures(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(blurred(images), plain(images), rtol=1e-4, atol=1e-5)


def test_of_resnet50_six_convolutions_are_blurred_and_not_the_stem() -> None:
    model = network("resnet50", blur_pool=True)
    blurred = {name for name, module in model.named_modules() if isinstance(module, BlurredConv2d)}
    assert blurred == {f"layer{stage}.0.{name}" for stage in (2, 3, 4) for name in ("conv2", "downsample.0")}
    assert model_facts(model, ModelConfig(name="resnet50"), 10).modules["BlurredConv2d"] == 6
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_blurred_network_stays_channels_last_and_learns() -> None:
    model = network("resnet18", blur_pool=True).to(memory_format=torch.channels_last)
    blurred = model.get_submodule("layer2.0.conv1")
    features = pictures(2, 64, 16, 16).to(memory_format=torch.channels_last)
    assert blurred(features).is_contiguous(memory_format=torch.channels_last)
    model(pictures(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not blurred.get_buffer("blur").requires_grad


# ---- stochastic depth -------------------------------------------------------------------------------


def probabilities(model: nn.Module) -> list[float]:
    return [module.drop_probability for module in model.modules() if isinstance(module, DropPathBatchNorm2d)]


def test_the_line_of_probabilities_is_timms() -> None:
    timm = pytest.importorskip("timm", reason="the extra `lamb` brings timm, which is not installed")
    theirs = timm.create_model("resnet50", drop_path_rate=0.05)
    expected = [
        block.drop_path.drop_prob if block.drop_path is not None else 0.0
        for stage in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)
        for block in stage
    ]
    model = network("resnet50", stochastic_depth=0.05)
    assert len(expected) == len(residual_blocks(model)) == 16
    assert probabilities(model) == pytest.approx(expected[1:])
    assert alteration_facts(model)["drop_probability_of_each_block"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_dropped_images_skip_the_block_and_others_are_scaled(name: str) -> None:
    """Each image of the last block's output is one of two, and the share of dropped images is the probability."""
    torch.manual_seed(0)
    model = network(name, stochastic_depth=0.4).train()
    plain = network(name).train()
    block, whole = model.get_submodule("layer4.1"), plain.get_submodule("layer4.1")
    channels = 512 if name == "resnet18" else 2048
    features = pictures(400, channels, 2, 2)
    (last,) = (module for module in block.modules() if isinstance(module, DropPathBatchNorm2d))
    share = last.drop_probability
    branches: list[Tensor] = []
    end = "bn2" if name == "resnet18" else "bn3"
    whole.get_submodule(end).register_forward_hook(lambda module, given, made: branches.append(made.detach().clone()))
    with torch.no_grad():
        whole(features)
        found = block(features)
    dropped = functional.relu(features)
    kept = functional.relu(features + branches[0] / (1 - share))
    is_dropped = (found - dropped).abs().amax(dim=(1, 2, 3)) < 1e-6
    torch.testing.assert_close(found[~is_dropped], kept[~is_dropped], rtol=1e-4, atol=1e-5)
    deviation = math.sqrt(share * (1 - share) / 400)
    assert abs(float(is_dropped.float().mean()) - share) < 4 * deviation


def test_in_evaluation_nothing_is_dropped() -> None:
    images = pictures(4, 3, 32, 32)
    torch.testing.assert_close(
        network("resnet18", stochastic_depth=0.5).eval()(images), network("resnet18").eval()(images), rtol=0, atol=0
    )


def test_stochastic_depth_keeps_names_and_weights_and_changes_the_architecture_hash() -> None:
    plain, dropping = network("resnet18"), network("resnet18", stochastic_depth=0.1)
    assert list(plain.state_dict()) == list(dropping.state_dict())
    assert all(torch.equal(value, dropping.state_dict()[key]) for key, value in plain.state_dict().items())
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in dropping.named_parameters()]
    others = [plain, dropping, network("resnet18", stochastic_depth=0.2), network("resnet18", blur_pool=True)]
    assert len({architecture_sha256(model) for model in others}) == 4
    zeroed = network("resnet18", stochastic_depth=0.1, zero_init_last_norm=True)
    assert model_facts(zeroed, ModelConfig(name="resnet18"), 10).zero_initialised_norms == 8


def test_draws_follow_torchs_seed_and_a_copy_has_its_own_mode() -> None:
    model = network(stochastic_depth=0.5).train()
    average = copy.deepcopy(model).eval()
    for module in (model, average):
        nn.init.ones_(module.get_submodule("blocks.2.norm2").weight)  # type: ignore[arg-type]
    images = pictures(16, 3, 16, 16)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model(images).detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(average(images), average(images))


# ---- the bias of the head ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "small", "mobilenet_v3_small"])
def test_the_head_starts_at_minus_log_classes(name: str) -> None:
    model = network(name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    init_head_bias(model, name)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])}
    assert changed == {{"resnet18": "fc.bias", "small": "head.bias", "mobilenet_v3_small": "classifier.3.bias"}[name]}
    assert model.state_dict()[changed.pop()].tolist() == pytest.approx([-math.log(10)] * 10)
    assert alteration_facts(model)["bias_of_the_last_layer"] == pytest.approx(-math.log(10), abs=1e-6)


# ---- what cannot be altered, and what is not -------------------------------------------------------


@pytest.mark.parametrize(
    ("alter", "sentence"),
    [
        (lambda: network("vgg11", blur_pool=True), "model.blur_pool=true, but vgg11 has no strided convolution"),
        (lambda: network("vgg11", stochastic_depth=0.1), "model.stochastic_depth=0.1, but vgg11 has no residual block"),
        (lambda: network(norm="none", stochastic_depth=0.1), "model.stochastic_depth=0.1, but small has no residual"),
        (
            lambda: init_head_bias(network("squeezenet1_0"), "squeezenet1_0"),
            "but squeezenet1_0 does not end in a linear layer",
        ),
    ],
)
def test_a_network_without_a_place_for_it_is_refused_by_name(alter: Any, sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        alter()
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_facts_are_the_live_modules() -> None:
    assert alteration_facts(network()) == {}
    model = network()
    add_blur_pool(model, "small")
    add_stochastic_depth(model, "small", 0.2)
    assert alteration_facts(model) == {
        "blurred_convolutions": 4,
        "blur_filter": [[0.0625, 0.125, 0.0625], [0.125, 0.25, 0.125], [0.0625, 0.125, 0.0625]],
        "drop_probability_of_each_block": [0.0, 0.1, 0.2],
    }
    model.get_submodule("blocks.1.norm2").drop_probability = 0.15  # type: ignore[assignment]
    model.get_submodule("blocks.1.convolution1").get_buffer("blur").zero_()
    assert alteration_facts(model)["drop_probability_of_each_block"] == [0.0, 0.15, 0.2]
    assert alteration_facts(model)["blur_filter"] == [[0.0] * 3] * 3
