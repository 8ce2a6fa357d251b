"""The network: ResNet-50 v1.5 as torchvision builds it, any other torchvision classifier, or `small`.

ResNet-50 v1.5 has the stride on the 3x3 convolution of a bottleneck, not on the first 1x1 as in He et al. It is about
half a point more accurate. torchvision, timm and NVIDIA all train this variant. Initialisation is torchvision's: He
normal (fan out) for convolutions, ones and zeros for norms, and with `zero_init_last_norm` zeros for the last norm of
every residual block (Goyal et al., arXiv 1706.02677).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from recipe.config.identity import canonical_json
from recipe.config.schema import Config, ModelConfig
from recipe.errors import UserError
from recipe.models.checkpoint import State, eval_weights, interface_of
from recipe.models.layers import add_blur_pool, add_stochastic_depth, alteration_facts, init_head_bias
from recipe.models.pretrained import GivenWeights, load_state, read_weights
from recipe.run.files import display_path
from recipe.run.records import ModelFacts, Setting

ARCHITECTURE = ("name", "norm", "zero_init_last_norm", "blur_pool", "stochastic_depth")  # keys of the network
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm)


def build_model(
    config: ModelConfig, classes: int, seed: int, has_low_head_bias: bool = False, weights: GivenWeights | None = None
) -> nn.Module:
    """Build the network on the CPU, initialised from `seed` or with the weights of `config.weights`.

    `has_low_head_bias` is `optimization.bce.init_head_bias`. `weights` are those of `config.weights` if already read.
    Raises `UserError` for an unknown name, a network without a place for an option, and weights that do not fit.
    """
    torch.manual_seed(seed)
    if config.name == "small":
        model: nn.Module = SmallResNet(classes, norm=config.norm, zero_init_last_norm=config.zero_init_last_norm)
    else:
        model = _torchvision_model(config, classes)
    if config.blur_pool:
        add_blur_pool(model, config.name)
    if config.stochastic_depth:
        add_stochastic_depth(model, config.name, config.stochastic_depth)
    if weights is None and config.weights is not None:
        weights = read_weights(Path(config.weights))
    if weights is not None:
        load_state(model, weights.tensors, weights.where)
    if has_low_head_bias:
        init_head_bias(model, config.name)
    return model


def restored_model(state: State, where: str) -> nn.Module:
    """Build the network of a checkpoint on the CPU, with its evaluated weights."""
    try:
        values = state["config"]["model"]
        config = msgspec.convert({name: values[name] for name in ARCHITECTURE}, ModelConfig)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:  # msgspec's are ValueErrors
        raise UserError(f"{where} does not name its network: {type(error).__name__} {error}") from error
    model = build_model(config, len(interface_of(state, where).classes), seed=0)
    load_state(model, eval_weights(state), where)
    return model


def _torchvision_model(config: ModelConfig, classes: int) -> nn.Module:
    if config.name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(
            f"model.name={config.name} is neither `small` nor a classifier of torchvision {torchvision.__version__} "
            "(torchvision.models.list_models() lists them)"
        )
    arguments: dict[str, Any] = {"weights": None, "num_classes": classes}
    builder = torchvision.models.get_model_builder(config.name)
    if builder.__module__.endswith(".resnet"):
        arguments["zero_init_residual"] = config.zero_init_last_norm
    elif config.zero_init_last_norm:
        raise UserError(f"model.zero_init_last_norm=true, but {config.name} is not a residual network; set it to false")
    if config.name in ("googlenet", "inception_v3"):
        raise UserError(
            f"model.name={config.name} trains with auxiliary outputs, which this loop does not have; "
            "choose another classifier"
        )
    model: nn.Module = builder(**arguments)
    return model


class SmallResNet(nn.Module):
    """Three stages of one basic block for images of 8 to 64 pixels. `norm="none"` has no normalisation."""

    def __init__(self, classes: int, norm: str = "batch", zero_init_last_norm: bool = True, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=norm == "none")
        self.stem_norm = _norm_layer(norm, width)
        self.blocks = nn.Sequential(
            SmallBlock(width, width, 1, norm),
            SmallBlock(width, 2 * width, 2, norm),
            SmallBlock(2 * width, 4 * width, 2, norm),
        )
        self.head = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, SmallBlock) and zero_init_last_norm and isinstance(module.norm2, nn.BatchNorm2d):
                nn.init.zeros_(module.norm2.weight)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> logits [N, classes]."""
        features = functional.relu(self.stem_norm(self.stem(images)))
        features = self.blocks(features).mean(dim=(2, 3))
        logits: Tensor = self.head(features)
        return logits


class SmallBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, as in He et al., figure 5 (left)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        bias = norm == "none"
        self.convolution1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)
        self.norm1 = _norm_layer(norm, outputs)
        self.convolution2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        self.norm2 = _norm_layer(norm, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        residual = functional.relu(self.norm1(self.convolution1(features)))
        return functional.relu(self.norm2(self.convolution2(residual)) + self.shortcut(features))


def _norm_layer(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.Identity()


def check_forward(model: nn.Module, name: str, images: int, pixels: int, remedy: str) -> None:
    """Check that `model` accepts images of shape [images, 3, pixels, pixels], without changing it.

    Tensors of torch's meta device have shapes only, so the pass takes milliseconds and no memory. Raises `UserError`
    with torch's reason and a remedy: a batch norm in training mode needs two values per channel, and a strided layer
    a large enough input.
    """
    shapes = {key: torch.empty_like(value, device="meta") for key, value in model.state_dict(keep_vars=True).items()}
    shapes |= {key: torch.empty_like(value, device="meta") for key, value in model.named_buffers()}
    example = torch.empty(images, 3, pixels, pixels, device="meta")
    try:
        with torch.no_grad():
            functional_call(model, shapes, (example,))
    except (ValueError, RuntimeError, AssertionError) as error:
        count = "1 image" if images == 1 else f"{images} images"
        purpose = "train on" if model.training else "evaluate"
        raise UserError(
            f"{name} cannot {purpose} {count} of {pixels} x {pixels} pixels in a forward pass "
            f"({' '.join(str(error).split())[:200]}); {remedy}"
        ) from error


def resolve_weights(config: Config) -> tuple[Config, GivenWeights | None]:
    """The configuration with the hash of its initial weights, and these weights if given.

    Raises `UserError` if the recipe names other weights than those of the file, or the file is not given.
    """
    expected = config.model.weights_sha256
    if config.model.weights is None:
        if expected is not None:
            raise UserError(f"this recipe starts from the weights {expected}: give their file as model.weights=FILE")
        return config, None
    weights = read_weights(Path(config.model.weights))
    digest = weights_sha256(weights.tensors)
    if expected not in (None, digest):
        raise UserError(
            f"model.weights={display_path(config.model.weights)} has the weights {digest}, but the recipe "
            f"starts from {expected}"
        )
    return replace(config, model=replace(config.model, weights_sha256=digest)), weights


def weights_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 over sorted (name, type, shape, bytes) of weights. The bytes of a file would depend on its name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def model_facts(model: nn.Module, config: ModelConfig, classes: int) -> ModelFacts:
    """Facts of the network, read from its modules and tensors. Call before the first step."""
    norms: list[nn.Module] = [module for module in model.modules() if isinstance(module, NORMS)]
    return ModelFacts(
        name=config.name,
        class_name=f"{type(model).__module__}.{type(model).__name__}",
        classes=classes,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        architecture_sha256=architecture_sha256(model),
        modules=dict(Counter(type(module).__name__ for module in model.modules() if not list(module.children()))),
        batch_norm=_batch_norm_settings(norms),
        zero_initialised_norms=sum(_starts_at_zero(norm) for norm in norms),
        alterations=alteration_facts(model),
        initial_weights="random" if config.weights is None else "given",
        initial_weights_sha256=weights_sha256(model.state_dict()),
    )


def _starts_at_zero(norm: nn.Module) -> bool:
    weight = getattr(norm, "weight", None)
    return isinstance(weight, Tensor) and not torch.any(weight)


def _batch_norm_settings(norms: list[nn.Module]) -> dict[str, Setting]:
    """eps and momentum of the batch norms: one value, or a list of all different values."""
    batch_norms = [norm for norm in norms if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    return {
        name: values[0] if len(values) == 1 else list(values)
        for name in ("eps", "momentum")
        if (values := sorted({getattr(norm, name) for norm in batch_norms}))
    }


def architecture_sha256(model: nn.Module) -> str:
    """SHA-256 over the class and arguments of each module and the name, shape and type of each tensor."""
    modules = [[name, type(module).__name__, _arguments(module)] for name, module in model.named_modules()]
    tensors = [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in model.state_dict().items()]
    return hashlib.sha256(canonical_json([modules, tensors])).hexdigest()


def _arguments(module: nn.Module) -> str:
    """The arguments of a module as it prints them, without the bias of batch norms that torch 2.15 adds."""
    printed = module.extra_repr()
    return printed.replace(", bias=True", "") if isinstance(module, nn.modules.batchnorm._NormBase) else printed
