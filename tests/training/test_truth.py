"""The recipe says what ran: a hyperparameter that is changed in the code alone changes the recipe (trap T40)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from recipe.data import batches, loader, transforms
from recipe.data.augment import crop
from recipe.document.render import write_document
from recipe.models.layers import add_blur_pool, add_stochastic_depth, init_head_bias
from recipe.run.directory import Run
from recipe.run.records import Record
from recipe.stages import evaluate as performance
from recipe.training import build, ema, loop, optim
from recipe.training.optim import BinaryCrossEntropy
from tests.builders.configs import compose_config

pytestmark = pytest.mark.process

Words = Callable[..., list[str]]
WORDS = ["optimization.epochs=1", "optimization.ema.decay=0.9"]
VOLATILE = {
    "provenance",
    "outputs",
    "sessions",
    "epochs",
    "training_seconds",
    "validation_seconds",
    "evaluation_seconds",
    "images_per_second",
    "best_epoch",
}


def facts(record: Record) -> dict[str, Any]:
    """The record without durations and results."""
    return {key: value for key, value in msgspec.to_builtins(record).items() if key not in VOLATILE}


def train(words: list[str]) -> dict[str, Any]:
    record = loop.train(compose_config(*words))
    assert record is not None
    return facts(record)


def document(words: list[str]) -> str:
    run = Run(compose_config(*words).run_dir)
    write_document(run, "runs/x")
    return run.document.read_text()


def other_optimizer(**changes: Any) -> Callable[..., torch.optim.Optimizer]:
    original = build.build_optimizer

    def changed(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = original(*arguments)
        for group in optimizer.param_groups:
            group.update(changes)
        return optimizer

    return changed


def other_schedule(self: optim.LearningRate, step: int) -> float:
    return self.peak / (1 + step)


def other_view(self: crop.Augmentation, picture: Any, epoch: int, index: int, copy: int, out: Tensor) -> None:
    out.zero_()


def other_model(*arguments: Any) -> nn.Module:
    model = BUILD_MODEL(*arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    return model


def altered(alter: Callable[..., None], *arguments: Any) -> Callable[..., nn.Module]:
    def changed(*given: Any) -> nn.Module:
        model = BUILD_MODEL(*given)
        alter(model, "small", *arguments)
        return model

    return changed


def other_norms(self: transforms.Normalisation, *arguments: Any) -> None:
    NORMALISE(self, *arguments)
    self.mean, self.std = self.std, self.mean


def other_average(self: ema.ModelEma, *arguments: Any) -> None:
    AVERAGE(self, *arguments)
    self.decay = 0.8


def named_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"name": "weights", "params": list(model.parameters())}]


BUILD_MODEL = build.build_model
NORMALISE = transforms.Normalisation.__init__
AVERAGE = ema.ModelEma.__init__
BUILD_AUGMENTATION = build.build_augmentation
TRAINING_MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "momentum": (build, "build_optimizer", other_optimizer(momentum=0.8)),
    "nesterov": (build, "build_optimizer", other_optimizer(nesterov=True)),
    "weight decay": (build, "build_optimizer", other_optimizer(weight_decay=1e-2)),
    "label smoothing": (build, "build_loss", lambda _: nn.CrossEntropyLoss(label_smoothing=0.2)),
    "loss": (build, "build_loss", lambda _: BinaryCrossEntropy(0.1, sum_classes=False, target_threshold=None)),
    "optimizer": (build, "build_optimizer", lambda _, model, device: torch.optim.AdamW(named_groups(model))),
    "blurred strides": (build, "build_model", altered(add_blur_pool)),
    "stochastic depth": (build, "build_model", altered(add_stochastic_depth, 0.1)),
    "bias of the head": (build, "build_model", altered(init_head_bias)),
    "form of the average": (
        build,
        "build_ema",
        lambda model, config, steps: ema.TorchvisionEma(model, config, steps),
    ),
    "schedule": (optim.LearningRate, "__call__", other_schedule),
    "augmentation, in its body": (crop.Augmentation, "write", other_view),
    "flip": (build, "build_augmentation", lambda *a: replace(BUILD_AUGMENTATION(*a), flip_probability=0.0)),
    "order of images": (batches, "epoch_order", lambda seed, epoch, images: batches.np.arange(images)),
    "batch-norm epsilon": (build, "build_model", other_model),
    "mean and deviation": (transforms.Normalisation, "__init__", other_norms),
    "decay of the average": (ema.ModelEma, "__init__", other_average),
    "threads of decoding": (loader, "threads_per_process", lambda *_: 5),
}


def test_the_unchanged_code_gives_the_same_recipe_twice(smoke: Words) -> None:
    assert train(smoke(*WORDS, run="one")) == train(smoke(*WORDS, run="two"))


@pytest.fixture
def baseline(smoke: Words) -> tuple[dict[str, Any], str]:
    words = smoke(*WORDS, run="baseline")
    return train(words), document(words)


@pytest.mark.parametrize("name", TRAINING_MUTATIONS)
def test_a_change_in_the_code_alone_changes_the_recipe(
    name: str, smoke: Words, baseline: tuple[dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*TRAINING_MUTATIONS[name])
    words = smoke(*WORDS, run="mutated")
    mutated = train(words)
    differing = {key for key in mutated if mutated[key] != baseline[0][key]}
    assert differing, f"nothing in the record shows the mutation of {name}"
    assert "config_sha256" not in differing, "the configuration did not change, only the code"
    assert document(words) != baseline[1]


def test_another_evaluation_view_in_the_code_alone_changes_the_recipe(
    smoke: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = smoke(*WORDS)
    train(words)
    before = performance.evaluate_run(compose_config(*words))
    monkeypatch.setattr(
        transforms.EvaluationTransform, "__call__", lambda self, image: image[:, : self.crop_pixels, : self.crop_pixels]
    )
    after = performance.evaluate_run(compose_config(*words))
    assert before is not None
    assert after is not None
    assert before.protocol.transform == after.protocol.transform
    assert before.protocol.transform_sha256 != after.protocol.transform_sha256


def test_flipped_views_in_the_code_alone_change_the_metrics_name(smoke: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    words = smoke(*WORDS)
    train(words)
    original = performance.predictor
    monkeypatch.setattr(performance, "predictor", lambda *arguments: original(*arguments[:5], True))
    found = performance.evaluate_run(compose_config(*words))
    assert found is not None
    assert found.protocol.name == "resize28-crop24-bilinear-flip-average"
    assert "views" in found.protocol.transform
    assert "views the image and its mirror image" in document(words)
