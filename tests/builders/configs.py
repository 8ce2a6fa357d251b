"""Composed configurations, and settings of a small demo data set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hydra import compose, initialize_config_dir

from recipe.config.compose import to_config
from recipe.config.schema import Config
from recipe.run.files import CHECKOUT

if TYPE_CHECKING:
    from recipe.data.augment.crop import Augmentation


SMALL_DEMO = ["data.train_images_per_class=9", "data.validation_images_per_class=4", "data.images_per_shard=40"]


def compose_config(*overrides: str) -> Config:
    """The configuration that these command-line words give."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CHECKOUT / "conf")):
        return to_config(compose("config", list(overrides)))


def no_augmentation(pixels: int) -> Augmentation:
    """The central square of an image in this size, one copy, nothing mixed."""
    from torchvision.transforms import InterpolationMode

    from recipe.data.augment.crop import Augmentation

    return Augmentation(0, pixels, (1.0, 1.0), (1.0, 1.0), 0.0, InterpolationMode.BILINEAR)
