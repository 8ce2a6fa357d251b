"""Identity of a configuration: pinned settings, their hashes, and differences between two configurations."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

# Settings of the machine, not part of a recipe, each with its neutral value.
RUNTIME_KEYS: dict[str, Any] = {
    "run_dir": ".",
    "reference": None,
    "data.raw_dir": None,
    "data.directory": ".",
    "data.processes": None,
    "model.weights": None,
    "evaluation.weights": None,
    "loader.workers": None,
    "loader.threads": None,
    "loader.prefetch_batches": 1,
    "trainer.gpus": None,
    "trainer.accelerator": "auto",
    "trainer.max_micro_batch_size": 1,
    "trainer.torch_threads": None,
    "trainer.cuda_graphs": False,
    "trainer.timeout_seconds": 1,
    "trainer.save_every_steps": None,
    "trainer.max_restarts": 0,
    "trainer.start_over": False,
}
# Settings without effect on training. Those of the evaluation can change the reported result.
NOT_TRAINING = re.compile(
    r"(\w+\.)?description\..*|(data\.)?name|trainer\.(log_every_steps|keep_checkpoints)"
    r"|(serialization|timing)\..*|evaluation\.(batch_size|checkpoint|backend|variant)"
)
RENAMED = {  # old key or group -> its current name, the longest first
    "optimization.averaging.recalibrate_images": "optimization.ema.precise_bn_images",
    "optimization.averaging": "optimization.ema",
    "optimization.binary_sum_classes": "optimization.bce.sum_classes",
    "optimization.binary_target_threshold": "optimization.bce.target_threshold",
    "optimization.binary_head_bias": "optimization.bce.init_head_bias",
    "augmentation.policy.kind": "augmentation.auto_augment.policy",
    "augmentation.policy.operations": "augmentation.auto_augment.num_ops",
    "augmentation.policy.strength": "augmentation.auto_augment.magnitude",
    "augmentation.policy.strength_std": "augmentation.auto_augment.magnitude_std",
    "augmentation.policy.operation_probability": "augmentation.auto_augment.probability",
    "augmentation.policy": "augmentation.auto_augment",
    "augmentation.mixing.cutmix_share": "augmentation.mixup.switch_probability",
    "augmentation.mixing.group_images": "augmentation.mixup.group_size",
    "augmentation.mixing": "augmentation.mixup",
    "augmentation.erasing": "augmentation.random_erasing",
    "augmentation.progressive": "augmentation.progressive_resizing",
    "augmentation.repeats": "augmentation.repeated_augmentation",
    "data.corrupt": "data.on_corrupt",
    "data.quality": "data.jpeg_quality",
    "data.decoder": "loader.decoder",
    "data.order": "loader.order",
    "trainer.data_threads": "loader.threads",
    "trainer.data_processes": "loader.workers",
    "trainer.prefetch_batches": "loader.prefetch_batches",
    "trainer.cpu_threads": "trainer.torch_threads",
    "trainer.max_images_per_process": "trainer.max_micro_batch_size",
    "trainer.restart": "trainer.start_over",
}


@dataclass(frozen=True)
class Pinned:
    """The settings that define a recipe, with their hashes."""

    values: dict[str, Any]  # nested, plain

    @cached_property
    def config_sha256(self) -> str:
        return config_sha256(self.values)

    @cached_property
    def recipe_id(self) -> str:
        return recipe_id(self.values)


def new_name(key: str) -> str | None:
    """The current name of a renamed key or group."""
    for old, new in RENAMED.items():
        if f"{key}.".startswith(f"{old}."):
            return new + key.removeprefix(old)
    return None


def to_dict(config: Any) -> Any:
    """Convert dataclasses and enums to plain dictionaries, lists, strings and numbers for JSON and YAML."""
    return msgspec.to_builtins(config)


def canonical_json(value: Any) -> bytes:
    """JSON in one spelling for hashes: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sha256_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of a plain value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def config_sha256(pinned_values: Mapping[str, Any]) -> str:
    """Identifies a pinned configuration, the seed included."""
    return sha256_of(pinned_values)


def recipe_id(pinned_values: Mapping[str, Any]) -> str:
    """Identifies a recipe: runs that share it differ in their seed only."""
    return sha256_of({key: value for key, value in pinned_values.items() if key != "seed"})


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries flattened: {"data": {"name": "demo"}} -> {"data.name": "demo"}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in flat.items():
        *groups, last = key.split(".")
        section = values
        for group in groups:
            section = section.setdefault(group, {})
        section[last] = value
    return values


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Each key whose value differs, as `key: before -> after`, in the order of the keys."""
    old, new = flatten(before), flatten(after)
    absent = "(absent)"
    return [
        f"{key}: {old.get(key, absent)} -> {new.get(key, absent)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, absent) != new.get(key, absent)
    ]
