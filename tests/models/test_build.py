"""The network after construction, and the identity of weights (T18, T19)."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from recipe.config.schema import Config, ModelConfig
from recipe.errors import UserError
from recipe.models.build import (
    SmallResNet,
    architecture_sha256,
    build_model,
    model_facts,
    resolve_weights,
    weights_sha256,
)
from recipe.models.checkpoint import save_checkpoint
from recipe.models.pretrained import read_weights
from tests.builders.configs import compose_config


def settings(name: str = "small", **changes: Any) -> ModelConfig:
    return ModelConfig(name=name, **changes)


def small(seed: int = 0, **changes: Any) -> nn.Module:
    return build_model(settings(**changes), 10, seed)


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    return build_model(settings("resnet50", zero_init_last_norm=True), 1000, 0)


# ---- ResNet-50 --------------------------------------------------------------------------------------


def test_resnet50_has_the_published_size(resnet50: nn.Module) -> None:
    """25,557,032 parameters is torchvision's documented number for ResNet50_Weights."""
    published = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["num_params"]
    facts = model_facts(resnet50, settings("resnet50"), 1000)
    assert facts.parameters == published == 25_557_032
    assert facts.modules["BatchNorm2d"] == 53
    assert facts.modules["Conv2d"] == 53
    assert facts.batch_norm == {"eps": 1e-5, "momentum": 0.1}
    assert facts.class_name == "torchvision.models.resnet.ResNet"


def test_a_bottlenecks_stride_is_on_its_3x3_convolution(resnet50: nn.Module) -> None:
    """v1.5, not v1 (T19)."""
    bottlenecks = [module for module in resnet50.modules() if type(module).__name__ == "Bottleneck"]
    assert len(bottlenecks) == 16
    assert {block.conv1.stride for block in bottlenecks} == {block.conv3.stride for block in bottlenecks} == {(1, 1)}
    assert [block.conv2.stride for block in bottlenecks].count((2, 2)) == 3
    assert {block.conv2.kernel_size for block in bottlenecks} == {(3, 3)}


def test_exactly_the_last_norm_of_each_block_starts_at_zero(resnet50: nn.Module) -> None:
    zero = {
        name
        for name, module in resnet50.named_modules()
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any()
    }
    blocks = {name for name, module in resnet50.named_modules() if type(module).__name__ == "Bottleneck"}
    assert zero == {f"{name}.bn3" for name in blocks}
    assert model_facts(resnet50, settings("resnet50"), 1000).zero_initialised_norms == len(zero) == 16


def test_zero_initialisation_can_be_off() -> None:
    for name in ("resnet18", "small"):
        for switch, expected in ((True, {"resnet18": 8, "small": 3}[name]), (False, 0)):
            config = settings(name, zero_init_last_norm=switch)
            assert model_facts(build_model(config, 10, 0), config, 10).zero_initialised_norms == expected


def test_initialisation_is_he_normal_by_fan_out(resnet50: nn.Module) -> None:
    convolution = resnet50.get_parameter("layer4.1.conv2.weight").detach()
    deviation = (2 / (convolution.shape[0] * 9)) ** 0.5
    assert float(convolution.std()) == pytest.approx(deviation, rel=0.01)


# ---- seeds and names --------------------------------------------------------------------------------


def test_a_seed_decides_the_weights() -> None:
    assert weights_sha256(small(3).state_dict()) == weights_sha256(small(3).state_dict())
    assert len({weights_sha256(small(seed).state_dict()) for seed in range(4)}) == 4


def test_the_small_network_without_norm_has_none() -> None:
    without = small(norm="none")
    assert not list(without.buffers())
    assert model_facts(without, settings(norm="none"), 10).batch_norm == {}
    assert without(torch.zeros(2, 3, 32, 32)).shape == small()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (settings("resnet51"), "model.name=resnet51 is neither `small` nor a classifier of torchvision"),
        (settings("fcn_resnet50"), "model.name=fcn_resnet50 is neither `small` nor a classifier of torchvision"),
        (settings("googlenet"), "model.name=googlenet trains with auxiliary outputs"),
        (settings("inception_v3"), "model.name=inception_v3 trains with auxiliary outputs"),
        (settings("vgg11", zero_init_last_norm=True), "zero_init_last_norm=true, but vgg11 is not a residual network"),
    ],
)
def test_an_impossible_network_is_refused_by_name(config: ModelConfig, sentence: str) -> None:
    with pytest.raises(UserError) as refusal:
        build_model(config, 10, 0)
    assert sentence in str(refusal.value)


# ---- the architecture's hash ------------------------------------------------------------------------


def change(model: nn.Module, name: str, value: object) -> None:
    setattr(
        model.get_submodule("blocks.1.norm1" if name in ("eps", "momentum") else "blocks.1.convolution1"), name, value
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("eps", 1e-3), ("momentum", 0.2), ("stride", (1, 1)), ("padding", (2, 2)), ("groups", 2), ("dilation", (2, 2))],
)
def test_the_architecture_hash_depends_on_settings_without_a_tensor(name: str, value: object) -> None:
    model = small()
    before = architecture_sha256(model)
    change(model, name, value)
    assert architecture_sha256(model) != before
    assert model.state_dict().keys() == small().state_dict().keys()


def test_the_architecture_hash_is_that_of_the_network_not_of_its_weights() -> None:
    assert architecture_sha256(small(0)) == architecture_sha256(small(1)) != architecture_sha256(small(0, norm="none"))
    assert architecture_sha256(SmallResNet(10)) != architecture_sha256(SmallResNet(11))


# ---- the weights' hash ------------------------------------------------------------------------------


def example() -> dict[str, Tensor]:
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7), "c": torch.empty(0, 4)}


def flip_a_bit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state["a"].view(torch.int32)[1, 2] ^= 1
    return state


def test_the_order_of_names_and_the_layout_in_memory_do_not_matter() -> None:
    state = example()
    assert weights_sha256(dict(reversed(state.items()))) == weights_sha256(state)
    assert weights_sha256({**state, "a": state["a"].t().contiguous().t()}) == weights_sha256(state)
    model = small().to(memory_format=torch.channels_last)
    assert weights_sha256(model.state_dict()) == weights_sha256(small().state_dict())


@pytest.mark.parametrize(
    "changed",
    [
        lambda state: {**state, "d": torch.zeros(1)},
        lambda state: {"A" if name == "a" else name: value for name, value in state.items()},
        lambda state: {**state, "a": state["a"].reshape(3, 2)},
        lambda state: {**state, "a": state["a"].view(torch.int32)},
        lambda state: {**state, "c": torch.empty(4, 0)},
        lambda state: {name: value for name, value in state.items() if name != "c"},
        lambda state: {**state, "a": state["b"], "b": state["a"]},
        flip_a_bit,
    ],
)
def test_name_type_shape_and_every_bit_matter(changed: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    assert weights_sha256(changed(example())) != weights_sha256(example())


# ---- given weights ----------------------------------------------------------------------------------


def file_of(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def refusal(path: Path) -> str:
    """The error for a file of weights."""
    with pytest.raises(UserError) as refused:
        build_model(settings(weights=str(path)), 10, 0)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("model.weights=")
    return str(refused.value)


def test_the_model_starts_from_given_weights(tmp_path: Path) -> None:
    origin = small(7)
    path = file_of(tmp_path / "w.pt", origin.state_dict())
    built = small(0, weights=str(path))
    assert weights_sha256(built.state_dict()) == weights_sha256(origin.state_dict())
    facts = model_facts(built, settings(weights=str(path)), 10)
    assert (facts.initial_weights, facts.initial_weights_sha256) == ("given", weights_sha256(origin.state_dict()))


def test_a_checkpoint_serves_as_weights(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": small(7).state_dict(), "average": None})
    assert weights_sha256(small(0, weights=str(path)).state_dict()) == weights_sha256(small(7).state_dict())


def test_weights_of_another_shape_or_name_are_refused(tmp_path: Path) -> None:
    other = file_of(tmp_path / "other.pt", build_model(settings(), 11, 0).state_dict())
    assert "does not fit the model" in refusal(other)
    assert "head.weight" in refusal(other)
    less = small().state_dict()
    del less["stem.weight"]
    assert "stem.weight" in refusal(file_of(tmp_path / "less.pt", less))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: No such file or directory" in refusal(tmp_path / "none.pt")
    assert "cannot be read: Is a directory" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04" + bytes(60), b"\x80\x02}q\x00."])
def test_a_file_of_something_else_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    refusal(tmp_path / "w.pt")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    path = file_of(tmp_path / "w.pt", small().state_dict())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "is not a file of plain tensors" in refusal(path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"model": "x"}, torch.zeros(3), {"model": {"a": [1]}}])
def test_a_file_without_a_dictionary_of_tensors_is_refused(content: object, tmp_path: Path) -> None:
    assert "not a dictionary of tensors" in refusal(file_of(tmp_path / "w.pt", content))


class Hostile:
    """Unpickling this runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


def test_a_hostile_file_is_refused_and_not_executed(tmp_path: Path) -> None:
    victim = tmp_path / "executed"
    payloads: list[object] = [Hostile(victim), {"model": Hostile(victim)}, {"a": torch.zeros(1), "b": Hostile(victim)}]
    for payload in payloads:
        assert "is not a file of plain tensors" in refusal(file_of(tmp_path / "w.pt", payload))
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"a": Hostile(victim)}, protocol=2))
    refusal(tmp_path / "w.pt")
    assert not victim.exists()
    pickle.loads(pickle.dumps(Hostile(victim)))  # the payload works
    assert victim.exists()


def test_reading_gives_the_very_tensors(tmp_path: Path) -> None:
    found = read_weights(file_of(tmp_path / "w.pt", example())).tensors
    assert weights_sha256(found) == weights_sha256(example())


def config_with(**changes: Any) -> Config:
    config = compose_config("experiment=smoke")
    return replace(config, model=replace(config.model, **changes))


def test_the_recipe_names_given_weights_by_their_content(tmp_path: Path) -> None:
    path = file_of(tmp_path / "w.pt", small(7).state_dict())
    known, weights = resolve_weights(config_with(weights=str(path)))
    assert weights is not None
    assert known.model.weights_sha256 == weights_sha256(weights.tensors) == weights_sha256(small(7).state_dict())
    assert resolve_weights(known)[0] == known
    assert resolve_weights(config_with()) == (config_with(), None)


def test_other_weights_than_the_recipe_names_are_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path / "w.pt", small(7).state_dict())
    with pytest.raises(UserError, match=f"but the recipe starts from {'0' * 64}"):
        resolve_weights(config_with(weights=str(path), weights_sha256="0" * 64))
    with pytest.raises(UserError, match=r"give their file as model\.weights=FILE"):
        resolve_weights(config_with(weights_sha256="0" * 64))


def test_equal_weights_in_files_of_other_names_are_equal(tmp_path: Path) -> None:
    one, other = (file_of(tmp_path / name, small(7).state_dict()) for name in ("one.pt", "another.pt"))
    stream = io.BytesIO()
    torch.save(small(7).state_dict(), stream, _use_new_zipfile_serialization=False)
    (tmp_path / "legacy.pth").write_bytes(stream.getvalue())
    hashes = {weights_sha256(read_weights(path).tensors) for path in (one, other, tmp_path / "legacy.pth")}
    assert len(hashes) == 1
