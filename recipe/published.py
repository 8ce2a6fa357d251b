"""Published weights, with which this evaluator can be checked on ImageNet.

`evaluation.weights=IMAGENET1K_V2` names weights of torchvision, which bring their own protocol (resize, crop,
interpolation); a file (see `recipe.weights`) can be given instead, for machines without a network.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torchvision.models import WeightsEnum

from recipe.config.schema import Config, Interpolation, Precision
from recipe.errors import UserError
from recipe.run import shown_path
from recipe.weights import GivenWeights, read_weights

METRICS_KEY = "ImageNet-1K"  # torchvision's key of the accuracies
FILE_HASH_DIGITS = 8  # of the SHA-256, at the end of the published file's name


def published_config(config: Config) -> Config:
    """The configuration with the protocol of the weights, in fp32 as they were measured."""
    weights = named_weights(config.model.name, config.evaluation.weights)
    config = replace(config, trainer=replace(config.trainer, precision=Precision.fp32))
    if weights is None:
        return config
    view = weights.transforms()
    protocol = replace(
        config.evaluation,
        resize_pixels=view.resize_size[0],
        crop_pixels=view.crop_size[0],
        interpolation=Interpolation(view.interpolation.value),
    )
    return replace(config, evaluation=protocol)


def published_weights(model_name: str, asked: str) -> GivenWeights:
    """Read the weights of that name or file; a download must have the hash in its name, and is read as plain data."""
    weights = named_weights(model_name, asked)
    if weights is None:
        return read_weights(Path(asked), "evaluation.weights")
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.rsplit("/", 1)[1])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(weights.url, str(path), path.stem[-FILE_HASH_DIGITS:])
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"evaluation.weights={asked} could not be downloaded from {weights.url} ({error}); fetch that file by "
                "other means and give its path"
            ) from error
    return read_weights(path, "evaluation.weights")


def published_accuracy(model_name: str, asked: str | None) -> dict[str, float]:
    """Top-1 and top-5 as fractions, from torchvision's metadata; empty where none are published."""
    weights = named_weights(model_name, asked)
    metrics: dict[str, float] = {} if weights is None else weights.meta["_metrics"].get(METRICS_KEY, {})
    return {f"top{within}_accuracy": metrics[f"acc@{within}"] / 100 for within in (1, 5) if f"acc@{within}" in metrics}


def named_weights(model_name: str, asked: str | None) -> Any | None:
    """torchvision's weights of that name for this network; None for a file. Raises `UserError` for neither."""
    if asked is None or os.path.exists(asked):  # `read_weights` refuses what is not a file of weights
        return None
    if model_name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(
            f"evaluation.weights={shown_path(asked)} does not exist, and torchvision has no weights of {model_name}"
        )
    known: type[WeightsEnum] = torchvision.models.get_model_weights(model_name)
    names = list(known.__members__)
    if asked not in names:
        raise UserError(
            f"evaluation.weights={shown_path(asked)} is neither a file nor weights of {model_name}; torchvision "
            f"{torchvision.__version__} knows {', '.join(names)}"
        )
    return known[asked]
