"""Composed configurations, and settings of a small demo data set."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipe.config.compose import to_config
from recipe.config.schema import Config
from recipe.run.files import CHECKOUT

if TYPE_CHECKING:
    from recipe.data.augment.crop import Augmentation


SMALL_DEMO = ["data.train_images_per_class=9", "data.validation_images_per_class=4", "data.images_per_shard=40"]


def compose_config(*overrides: str) -> Config:
    """The configuration that these command-line words give.

    A composition takes Hydra 0.1 s. It is done once for each choice of groups, such as `experiment=smoke`; other values
    are set in a copy, as Hydra sets them.
    """
    values = [
        one
        for one in OverridesParser.create().parse_overrides(list(overrides))
        if one.type is OverrideType.CHANGE
        and not one.is_sweep_override()
        and not (CHECKOUT / "conf" / one.key_or_group).is_dir()
    ]
    words = {one.input_line for one in values}
    composed = deepcopy(_composed(*(word for word in overrides if word not in words)))
    try:
        for one in values:
            OmegaConf.update(composed, one.key_or_group, one.value(), merge=True)
    except OmegaConfBaseException:
        composed = _composed(*overrides)  # raises Hydra's own error
    return to_config(composed)


@cache
def _composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CHECKOUT / "conf")):
        return compose("config", list(overrides))


def no_augmentation(pixels: int) -> Augmentation:
    """The central square of an image in this size, one copy, nothing mixed."""
    from torchvision.transforms import InterpolationMode

    from recipe.data.augment.crop import Augmentation

    return Augmentation(0, pixels, (1.0, 1.0), (1.0, 1.0), 0.0, InterpolationMode.BILINEAR)
