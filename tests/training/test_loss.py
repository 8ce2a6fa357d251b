"""Both losses on labels and on soft targets, beside torch's own, timm's and closed forms (T29, T30)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from recipe.alterations import lower_head
from recipe.config.schema import LossKind
from recipe.errors import UserError
from recipe.training.loss import BinaryCrossEntropy, Loss, build_loss, loss_facts
from tests.conftest import compose_config

IMAGES, CLASSES = 9, 7
KINDS = [kind.value for kind in LossKind]


def loss_of(kind: str, **changes: Any) -> Loss:
    words = {"loss": kind, "label_smoothing": 0.0, **changes}
    return build_loss(compose_config(*(f"optimization.{key}={value}" for key, value in words.items())).optimization)


def example(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(IMAGES, CLASSES, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, CLASSES, (IMAGES,), generator=generator)


def one_hot(labels: Tensor) -> Tensor:
    return torch.eye(CLASSES, dtype=torch.float64)[labels]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_torchs_over_smoothed_targets(smoothing: float) -> None:
    logits, labels = example()
    targets = torch.full((IMAGES, CLASSES), smoothing / CLASSES, dtype=torch.float64)
    targets[range(IMAGES), labels] += 1 - smoothing
    found = loss_of("binary_cross_entropy", label_smoothing=smoothing)(logits, labels)
    torch.testing.assert_close(found, nn.BCEWithLogitsLoss()(logits, targets))
    logs, against = functional.logsigmoid(logits), functional.logsigmoid(-logits)
    torch.testing.assert_close(found, -(targets * logs + (1 - targets) * against).sum() / (IMAGES * CLASSES))


def test_mosaics_sums_over_classes() -> None:
    logits, labels = example()
    summed = loss_of("binary_cross_entropy", binary_sum_classes="true")(logits, labels)
    expected = nn.BCEWithLogitsLoss(reduction="none")(logits, one_hot(labels)).sum(dim=1).mean()
    torch.testing.assert_close(summed, expected)
    torch.testing.assert_close(summed, CLASSES * loss_of("binary_cross_entropy")(logits, labels))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_soft_targets_are_smoothed_once_as_labels_are(kind: str, smoothing: float) -> None:
    """T29: both losses are linear in the target, so a mixed target costs the mixture of what its labels cost."""
    loss = loss_of(kind, label_smoothing=smoothing)
    logits, labels = example()
    others = example(1)[1]
    torch.testing.assert_close(loss(logits, one_hot(labels)), loss(logits, labels))
    mixed = loss(logits, 0.3 * one_hot(labels) + 0.7 * one_hot(others))
    torch.testing.assert_close(mixed, 0.3 * loss(logits, labels) + 0.7 * loss(logits, others))


def test_a_threshold_counts_each_class_of_a_mixed_image_as_present() -> None:
    loss = loss_of("binary_cross_entropy", binary_target_threshold=0.2)
    logits, labels = example()
    others = (labels + 1) % CLASSES
    both = one_hot(labels) + one_hot(others)
    torch.testing.assert_close(
        loss(logits, 0.75 * one_hot(labels) + 0.25 * one_hot(others)), nn.BCEWithLogitsLoss()(logits, both)
    )
    torch.testing.assert_close(
        loss(logits, 0.8 * one_hot(labels) + 0.2 * one_hot(others)), nn.BCEWithLogitsLoss()(logits, one_hot(labels))
    )
    smoothed = loss_of("binary_cross_entropy", binary_target_threshold=0.2, label_smoothing=0.1)
    torch.testing.assert_close(smoothed(logits, labels), loss_of(KINDS[1], label_smoothing=0.1)(logits, labels))


@pytest.mark.parametrize(("smoothing", "threshold"), [(0.0, None), (0.1, None), (0.0, 0.2)])
@pytest.mark.parametrize("sum_classes", [False, True])
def test_it_is_timms(smoothing: float, threshold: float | None, sum_classes: bool) -> None:
    losses = pytest.importorskip("timm.loss", reason="the extra `lamb` brings timm, which is not installed")
    theirs = losses.BinaryCrossEntropy(smoothing, target_threshold=threshold, sum_classes=sum_classes)
    mine = BinaryCrossEntropy(smoothing, sum_classes, threshold)
    logits, labels = example()
    torch.testing.assert_close(mine(logits, labels), theirs(logits, labels))
    if not smoothing:  # timm leaves the smoothing of mixed targets to its mixup
        soft = 0.7 * one_hot(labels) + 0.3 * one_hot((labels + 1) % CLASSES)
        torch.testing.assert_close(mine(logits, soft), theirs(logits, soft))


@pytest.mark.parametrize("lowered", [False, True])
def test_the_loss_begins_where_the_bias_of_the_head_puts_it(lowered: bool) -> None:
    """T30: log 2 for each class with a bias of 0; with -log(C) about (1 + log C) / C, some 90 times less for 1000."""
    head = nn.Linear(3, 1000)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if lowered:
        lower_head(head, "the head")
    found = float(loss_of("binary_cross_entropy")(head(torch.randn(5, 3)), torch.arange(5)).detach())
    own, others = (math.log(1001), 999 * math.log(1 + 1 / 1000)) if lowered else (math.log(2), 999 * math.log(2))
    assert found == pytest.approx((own + others) / 1000, rel=1e-5)
    assert not lowered or found == pytest.approx((1 + math.log(1000)) / 1000, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("soft", [False, True])
def test_half_precision_costs_no_accuracy_of_the_loss(kind: str, soft: bool) -> None:
    """The logits are rounded before, the loss is computed in fp32."""
    logits, labels = example()
    rounded = logits.bfloat16()
    targets = one_hot(labels).float() if soft else labels
    loss = loss_of(kind, label_smoothing=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(rounded, targets)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, loss(rounded.float(), targets), rtol=1e-6, atol=0)


def test_facts_are_the_live_loss() -> None:
    loss = loss_of("binary_cross_entropy", label_smoothing=0.1, binary_target_threshold=0.2)
    assert loss_facts(loss) == {
        "class": "BinaryCrossEntropy",
        "label_smoothing": 0.1,
        "reduction": "mean over images and classes",
        "target_threshold": 0.2,
    }
    loss.sum_classes = True  # type: ignore[union-attr]
    assert loss_facts(loss)["reduction"] == "sum over classes, mean over images"


@pytest.mark.parametrize("word", ["binary_sum_classes=true", "binary_target_threshold=0.2", "binary_head_bias=true"])
def test_a_setting_without_effect_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"or optimization\.loss=binary_cross_entropy"):
        compose_config(f"optimization.{word}")
