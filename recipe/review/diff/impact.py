"""The likely impact of each setting on a result: the order of the differences in `diff`, and the inert settings.

The first group is in the order of how often a setting was the answer to "why is mine different?": the learning rate and
its relatives, the images of a batch norm, augmentation, data, network, arithmetic, protocol. A key that is in no table
belongs to the first group: it can matter until the opposite is known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

from recipe.config.identity import NOT_TRAINING

Values = Mapping[str, Any]  # flat: "optimization.epochs" -> 90


class Group(IntEnum):
    """The effect that a difference can have."""

    accuracy = 0
    last_digits = 1
    cosmetic = 2


TITLES = {
    Group.accuracy: "Can explain a difference in accuracy, the likeliest first",
    Group.last_digits: "May explain the last digits",
    Group.cosmetic: "Cosmetic, or without effect here",
}

OF_RESULTS = ("evaluation.batch_size", "evaluation.checkpoint")  # which weights are measured, and their last digits
LAST_DIGITS = re.compile(r"loader\.decoder|data\.images_per_shard|evaluation\.batch_size|trainer\.(?!precision$).*")
RANKS = [  # theme, keys
    ("optimization", r"optimization\.(learning_rate|weight_decay)"),
    ("optimization", r"optimization\.(batch_size|epochs)"),
    ("optimization", r"learning-rate curve"),
    ("optimization", r"optimization\.(schedule|warmup_\w+|step_\w+)"),
    ("optimization", r"optimization\.(optimizer|momentum|nesterov|decay_norms_and_biases)"),
    ("optimization", r"optimization\.(loss|label_smoothing|bce\..*)"),
    ("optimization", r"optimization\..*"),
    ("optimization", r"images seen"),
    ("batch norm", r"images per batch norm"),
    ("augmentation", r"augmentation\..*"),
    ("data", r"(data|loader)\..*"),
    ("model", r"model\.(?!initial).*"),
    ("initial weights", r"model\.initial.*"),
    ("precision", r"trainer\.precision.*"),
    ("evaluation", r"evaluation\..*"),
    ("seed", r"seed"),
    ("code", r"code\..*"),
]
INERT: list[tuple[str, Callable[[Values], bool]]] = [
    (r"optimization\.step_\w+", lambda values: values.get("optimization.schedule") != "step"),
    (r"optimization\.warmup_start_factor", lambda values: values.get("optimization.warmup_epochs") == 0),
    (r"optimization\.ema\.(?!decay).*", lambda values: values.get("optimization.ema.decay") == 0),
    (
        r"augmentation\.auto_augment\.(?!policy).*",
        lambda values: values.get("augmentation.auto_augment.policy") != "rand_augment",
    ),
    (
        r"augmentation\.random_erasing\.(?!probability).*",
        lambda values: values.get("augmentation.random_erasing.probability") == 0,
    ),
    (
        r"augmentation\.mixup\.(?!\w+_alpha).*",
        lambda values: (
            values.get("augmentation.mixup.mixup_alpha") == 0 and values.get("augmentation.mixup.cutmix_alpha") == 0
        ),
    ),
    (
        r"augmentation\.progressive_resizing\.(?!first_pixels).*",
        lambda values: values.get("augmentation.progressive_resizing.first_pixels") is None,
    ),
    (r"data\.jpeg_quality", lambda values: values.get("data.resize_short_side") is None),
    (r"data\.\w+_images_per_class", lambda values: values.get("data.source") != "demo"),
]


def group_of(key: str) -> Group:
    if NOT_TRAINING.fullmatch(key) and key not in OF_RESULTS:
        return Group.cosmetic
    return Group.last_digits if LAST_DIGITS.fullmatch(key) else Group.accuracy


def rank_of(key: str) -> int:
    """The position of a key in its group. Unknown keys come last."""
    return next((rank for rank, (_, keys) in enumerate(RANKS) if re.fullmatch(keys, key)), len(RANKS))


def theme_of(key: str) -> str:
    rank = rank_of(key)
    return RANKS[rank][0] if rank < len(RANKS) else key


def is_inert(key: str, values: Values) -> bool:
    """Whether a setting has no effect beside these values, such as a step's epochs under a cosine."""
    return any(re.fullmatch(keys, key) and rests(values) for keys, rests in INERT)
