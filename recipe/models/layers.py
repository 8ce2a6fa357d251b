"""Changes of a network after it is built: blur pooling, stochastic depth, the initial bias of the head.

Parameters keep their tensors and names, so initialisation, parameter groups and checkpoints do not change. Each
function raises `UserError` for a network without a place for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import stochastic_depth

from recipe.errors import UserError
from recipe.run.records import Setting

BLURRED_CHANNELS_MIN = 16  # as FFCV and Mosaic: the stem has 3 and is not blurred
LAST_NORMS = {"Bottleneck": "bn3", "BasicBlock": "bn2", "SmallBlock": "norm2"}  # of each block's residual branch


class BlurredConv2d(nn.Conv2d):
    """A strided convolution with a fixed binomial 3x3 filter on its input (Zhang, arXiv 1904.11486).

    As in FFCV's ResNet-50 and Mosaic's `blur_first`, the filter runs before the convolution and pads with zeros. Zhang
    blurs after a convolution of stride 1, with reflection, at 4 times the arithmetic. For a 1x1 convolution the filter
    has the stride, with the same result at a quarter of the cost.
    """

    blur: Tensor  # [channels, 1, 3, 3], saved with the weights: those of a plain network do not fit

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,  # type: ignore[arg-type]
            convolution.stride,  # type: ignore[arg-type]
            convolution.padding,  # type: ignore[arg-type]
            convolution.dilation,  # type: ignore[arg-type]
            convolution.groups,
            convolution.bias is not None,
            convolution.padding_mode,
            device="meta",  # draws no random numbers: the tensors are those of the replaced convolution
        )
        self._parameters = convolution._parameters
        binomial = torch.tensor([1.0, 2.0, 1.0], device=self.weight.device) / 4
        self.register_buffer("blur", torch.outer(binomial, binomial).repeat(self.in_channels, 1, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H / stride, W / stride]."""
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            blurred = functional.conv2d(features, self.blur, stride=self.stride, padding=1, groups=self.in_channels)
            return functional.conv2d(blurred, self.weight, self.bias, groups=self.groups)
        return super().forward(functional.conv2d(features, self.blur, padding=1, groups=self.in_channels))


def add_blur_pool(model: nn.Module, name: str) -> None:
    """Replace each strided convolution of at least 16 input channels."""
    strided = [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent.named_children()
        if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= BLURRED_CHANNELS_MIN
    ]
    if not strided:
        raise UserError(f"model.blur_pool=true, but {name} has no strided convolution to blur before; set it to false")
    for parent, key, convolution in strided:
        setattr(parent, key, BlurredConv2d(convolution))


class DropPathBatchNorm2d(nn.BatchNorm2d):
    """The last norm of a residual branch. In training its output is dropped for some images: they skip the block.

    The other outputs are divided by the keep probability, as in timm and torchvision.
    """

    def __init__(self, norm: nn.BatchNorm2d, drop_probability: float) -> None:
        super().__init__(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
        )
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.drop_probability = drop_probability

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape. One draw per image from torch's global generator."""
        branch: Tensor = stochastic_depth(super().forward(features), self.drop_probability, "row", self.training)
        return branch

    def extra_repr(self) -> str:
        """Print the probability, so that it is part of the architecture's hash."""
        plain: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, drop_probability={self.drop_probability}"


def residual_blocks(model: nn.Module) -> list[nn.Module]:
    """All residual blocks in the order of the forward pass."""
    return [module for module in model.modules() if type(module).__name__ in LAST_NORMS]


def add_stochastic_depth(model: nn.Module, name: str, last_probability: float) -> None:
    """Stochastic depth (Huang et al., arXiv 1603.09382), linear from 0 at the first block to `last_probability`.

    As in timm (ResNet strikes back). Huang and Mosaic start above 0.
    """
    blocks = residual_blocks(model)
    ends = [(block, LAST_NORMS[type(block).__name__]) for block in blocks]
    if len(ends) < 2 or not all(isinstance(getattr(block, end), nn.BatchNorm2d) for block, end in ends):
        raise UserError(
            f"model.stochastic_depth={last_probability}, but {name} has no residual blocks that end in a batch norm; "
            "set it to 0"
        )
    for number, (block, end) in enumerate(ends[1:], start=1):
        setattr(block, end, DropPathBatchNorm2d(getattr(block, end), last_probability * number / (len(ends) - 1)))


def classifier_head(model: nn.Module) -> nn.Linear | None:
    """The last linear layer, which outputs the logits."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None


def init_head_bias(model: nn.Module, name: str) -> None:
    """Set the bias of the last layer to -log(classes), as Mosaic: each class starts near probability 1 / classes.

    With a bias of zero, binary cross entropy starts at probability 1/2 for each class.
    """
    head = classifier_head(model)
    if head is None or head.bias is None:
        raise UserError(
            f"optimization.bce.init_head_bias=true, but {name} does not end in a linear layer; set it to false"
        )
    nn.init.constant_(head.bias, -math.log(head.out_features))


def alteration_facts(model: nn.Module) -> dict[str, Setting]:
    """The changes, read back from the modules. Empty for a plain network."""
    facts: dict[str, Setting] = {}
    blurred = [module for module in model.modules() if isinstance(module, BlurredConv2d)]
    if blurred:
        facts["blurred_convolutions"] = len(blurred)
        facts["blur_filter"] = blurred[0].blur[0, 0].tolist()
    dropped = [_drop_probability(block) for block in residual_blocks(model)]
    if any(dropped):
        facts["drop_probability_of_each_block"] = dropped
    head = classifier_head(model)
    if head is not None and head.bias is not None and torch.all(head.bias == head.bias[0]):
        facts["bias_of_the_last_layer"] = round(float(head.bias[0].detach()), 6)
    return facts


def _drop_probability(block: nn.Module) -> float:
    end = getattr(block, LAST_NORMS[type(block).__name__])
    return round(end.drop_probability, 6) if isinstance(end, DropPathBatchNorm2d) else 0.0
