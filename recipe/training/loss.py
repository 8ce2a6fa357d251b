"""What the logits are compared with: cross entropy, or one yes-or-no question for each class.

Both take labels [N] or soft targets [N, classes] (mixed images), and smooth either kind here and nowhere else:
(1 - s) x target + s / classes. Binary cross entropy is that of ResNet strikes back (Wightman et al., arXiv 2110.00476),
the mean over images *and* classes; with `binary_sum_classes` it is Mosaic's, `classes` times as large, and so is the
learning rate that fits SGD.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from recipe.config.schema import LossKind, OptimizationConfig
from recipe.records import Setting


class BinaryCrossEntropy(nn.Module):
    """Logits [N, classes] and labels [N] or targets [N, classes] -> a scalar."""

    def __init__(self, label_smoothing: float, sum_classes: bool, target_threshold: float | None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.sum_classes = sum_classes
        self.target_threshold = target_threshold

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The threshold comes before the smoothing: timm has it behind, which then smooths nothing."""
        classes = logits.shape[1]
        wide = logits if logits.dtype is torch.float64 else logits.float()
        wanted = functional.one_hot(targets, classes) if targets.dim() == 1 else targets
        if self.target_threshold is not None:
            wanted = wanted > self.target_threshold
        smoothed = wanted.to(wide.dtype) * (1 - self.label_smoothing) + self.label_smoothing / classes
        loss = functional.binary_cross_entropy_with_logits(wide, smoothed)
        return loss * classes if self.sum_classes else loss


Loss = nn.CrossEntropyLoss | BinaryCrossEntropy


def build_loss(config: OptimizationConfig) -> Loss:
    """The loss that the configuration asks for."""
    if config.loss is LossKind.cross_entropy:
        return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    return BinaryCrossEntropy(config.label_smoothing, config.binary_sum_classes, config.binary_target_threshold)


def loss_facts(loss: Loss) -> dict[str, Setting]:
    """The live loss, for the record."""
    facts: dict[str, Setting] = {"class": type(loss).__name__, "label_smoothing": loss.label_smoothing}
    if isinstance(loss, nn.CrossEntropyLoss):
        return facts | {"reduction": loss.reduction}
    reduction = "sum over classes, mean over images" if loss.sum_classes else "mean over images and classes"
    return facts | {"reduction": reduction, "target_threshold": loss.target_threshold}
