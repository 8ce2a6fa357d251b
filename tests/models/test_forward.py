"""Images that a network cannot process are refused before any work, without changing the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from recipe.errors import UserError
from recipe.models.build import check_forward
from recipe.run.directory import Run
from recipe.stages.evaluate import evaluate_run
from recipe.training import loop
from tests.builders.configs import compose_config

Words = Callable[..., list[str]]
RESNET = ["model=torchvision", "model.name=resnet18", "model.zero_init_last_norm=true"]
SQUEEZENET = ["model=torchvision", "model.name=squeezenet1_1", "model.zero_init_last_norm=false"]
SMALL_IMAGES = ["augmentation.crop_pixels=32", "evaluation.crop_pixels=32", "evaluation.resize_pixels=32"]
GROWING = [f"augmentation.progressive_resizing.{word}" for word in ("first_pixels=8", "end_epoch=2", "multiple=8")]
AVERAGED = ["optimization.ema.decay=0.9"]
RECALIBRATED = ["optimization.ema.precise_bn_images=9"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [*RESNET, *SMALL_IMAGES, "trainer.max_micro_batch_size=1"],
            r"resnet18 cannot train on 1 image of 32 x 32 pixels .*more than 1 value per channel.*"
            r"augmentation\.crop_pixels=32, or optimization\.batch_size=24 over 1 processes x 24 accumulation steps",
        ),
        (
            [*RESNET, *SMALL_IMAGES, *AVERAGED, "optimization.ema.precise_bn_images=1"],
            r"resnet18 cannot train on 1 image of 32 x 32 .*optimization\.ema\.precise_bn_images=1",
        ),
        (
            [
                *RESNET,
                *SMALL_IMAGES,
                *AVERAGED,
                "optimization.ema.precise_bn_images=9",
                "evaluation.batch_size=1",
            ],
            r"resnet18 cannot train on 1 image of 32 x 32 .*evaluation\.batch_size=1",
        ),
        (
            [*SQUEEZENET, *SMALL_IMAGES, *GROWING, "optimization.epochs=3"],
            r"squeezenet1_1 cannot train on 24 images of 8 x 8 .*augmentation\.progressive_resizing\.first_pixels=8",
        ),
        (
            [*SQUEEZENET, *SMALL_IMAGES, "evaluation.crop_pixels=8"],
            r"squeezenet1_1 cannot evaluate 1 image of 8 x 8 pixels .*evaluation\.crop_pixels=8",
        ),
        (
            ["model=torchvision", "model.name=vit_b_32", "model.zero_init_last_norm=false", *SMALL_IMAGES],
            r"vit_b_32 cannot train on 24 images of 32 x 32 pixels .*Expected 224",
        ),
        (
            [*SQUEEZENET, *SMALL_IMAGES, *AVERAGED, *RECALIBRATED],
            r"precise_bn_images must be 0 for a network without batch norm",
        ),
    ],
    ids=["accumulation", "recalibration", "its batches", "growing images", "evaluation", "one size", "no batch norm"],
)
def test_images_that_do_not_fit_the_network_are_refused_before_training(
    words: list[str], message: str, smoke: Words, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        loop.train(compose_config(*smoke(*words)))
    run = Run(tmp_path / "run")
    assert run.metric_rows() == []
    assert not run.checkpoints.exists()


def test_one_image_per_forward_pass_is_accepted_with_two_values_per_channel(smoke: Words) -> None:
    record = loop.train(compose_config(*smoke("trainer.max_micro_batch_size=1", "optimization.epochs=1")))
    assert record is not None
    assert record.loader.batch_norm_batch_size == 1


def test_an_evaluation_of_images_that_are_too_small_is_refused(smoke: Words) -> None:
    words = smoke(*SQUEEZENET, *SMALL_IMAGES, "optimization.epochs=1")
    loop.train(compose_config(*words))
    with pytest.raises(UserError, match=r"cannot evaluate 1 image of 8 x 8 .*evaluation\.crop_pixels=8"):
        evaluate_run(compose_config(*words, "evaluation.crop_pixels=8"))


def test_a_pass_leaves_the_network_as_it_was() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    check_forward(model, "resnet18", 2, 32, "")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.device.type == "cpu" for parameter in model.parameters())


def test_the_pass_is_the_networks_own() -> None:
    """Anything that torch refuses, not a list of networks."""
    norm = nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d())
    norm(torch.zeros(2, 3, 8, 8))
    check_forward(norm, "mine", 2, 8, "enlarge it")
    with pytest.raises(UserError, match=r"mine cannot train on 1 image of 8 x 8 .*; enlarge it"):
        check_forward(norm, "mine", 1, 8, "enlarge it")
    check_forward(norm.eval(), "mine", 1, 8, "enlarge it")
