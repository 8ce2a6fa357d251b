"""Adapts a recipe to this machine: facts of the machine from here, processes and threads as the recipe records them.

Bits depend on the number of processes, on the images of one forward pass and on the CPU threads. These are set as
recorded if this machine can. All differences are listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from recipe.config.compose import config_from_overrides
from recipe.config.identity import RUNTIME_KEYS, differences
from recipe.config.schema import Accelerator, Config, TrainerConfig
from recipe.document.commands import EXPERIMENTS
from recipe.review.reproduce.parse import Recipe, shown
from recipe.run.environment import processor_name, usable_cores, versions
from recipe.run.provenance import source_sha256

PROCESSES_MAX_ON_CPU = 8
IMAGES_PER_FORWARD_MAX = 4096
THREADS_MAX_PER_CORE = 4
DIFFERENCES_SHOWN = 20


@dataclass(frozen=True)
class AdaptedConfig:
    """The configuration with the facts of this machine."""

    config: Config
    machine: dict[str, Any]  # facts that bits depend on
    notes: list[str]  # what could not be set as it was


def adapt_to_machine(
    config: Config, recipe: Recipe, run_dir: Path, data_dir: Path, raw_dir: Path | None
) -> AdaptedConfig:
    """The recipe's configuration for this machine, with directories from here."""
    notes: list[str] = []
    ours = config_from_overrides([])
    accelerator = _accelerator(recipe, notes)
    processes = _processes(recipe, accelerator, notes)
    machine = {
        "accelerator": accelerator,
        "gpus": processes,
        "max_micro_batch_size": _images(config, recipe, processes, ours.trainer, notes),
        "torch_threads": _threads(recipe, notes),
    }
    trainer = replace(config.trainer, **_runtime_values(ours, "trainer") | machine)
    loader = replace(config.loader, **_runtime_values(ours, "loader"))
    data = replace(config.data, directory=str(data_dir), raw_dir=None if raw_dir is None else str(raw_dir))
    adapted = replace(config, run_dir=str(run_dir), trainer=trainer, loader=loader, data=data)
    return AdaptedConfig(adapted, machine | {"accelerator": accelerator.value}, notes)


def _runtime_values(config: Config, group: str) -> dict[str, Any]:
    names = [key.removeprefix(f"{group}.") for key in RUNTIME_KEYS if key.startswith(f"{group}.")]
    return {name: getattr(getattr(config, group), name) for name in names}


def _accelerator(recipe: Recipe, notes: list[str]) -> Accelerator:
    training = recipe.claims.training
    if training is None or training.accelerator is None:
        return Accelerator.cpu
    if torch.cuda.is_available():
        return Accelerator.cuda
    notes.append(f"it ran on {shown(training.accelerator)}; this machine has no GPU, so it runs on the CPU")
    return Accelerator.cpu


def _recorded_count(recipe: Recipe, name: str, most: int, notes: list[str]) -> int | None:
    """A recorded circumstance, if it is a number from 1 to `most`. Else None, and a note."""
    value = recipe.determinism_context.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most:
        return value
    notes.append(f"{name}: {shown(value)} there, not possible here (1 to {most})")
    return None


def _processes(recipe: Recipe, accelerator: Accelerator, notes: list[str]) -> int:
    most = torch.cuda.device_count() if accelerator is Accelerator.cuda else PROCESSES_MAX_ON_CPU
    count = _recorded_count(recipe, "the number of processes", most, notes)
    if count is not None:
        return count
    return most if accelerator is Accelerator.cuda else 1


def _images(config: Config, recipe: Recipe, processes: int, ours: TrainerConfig, notes: list[str]) -> int:
    images = _recorded_count(recipe, "images per forward pass", IMAGES_PER_FORWARD_MAX, notes)
    if images is not None and config.optimization.batch_size % (images * processes) == 0:
        return images
    if images is not None:
        notes.append(f"images per forward pass: {images} there do not divide the batch over {processes} process(es)")
    return ours.max_micro_batch_size


def _threads(recipe: Recipe, notes: list[str]) -> int | None:
    return _recorded_count(recipe, "CPU threads", max(8, THREADS_MAX_PER_CORE * usable_cores()), notes)


def checkout_differences(config: Config, recipe: Recipe) -> list[str]:
    """Differences of this checkout and machine from the recipe's, in words."""
    return [*_code(recipe), *_experiment(config), *_machine(recipe)]


def _code(recipe: Recipe) -> list[str]:
    theirs, ours = recipe.code.source_sha256, source_sha256()
    if theirs == ours:
        return []
    commit = shown(recipe.code.commit or "unknown")
    return [f"code: source {theirs[:16]} there (commit {commit}, tree {shown(recipe.code.tree)}), {ours[:16]} here"]


def _experiment(config: Config) -> list[str]:
    """Against the file of the same name in conf/experiment. The schema allows no path as a name."""
    if not (EXPERIMENTS / f"{config.name}.yaml").is_file():
        return [f"configuration: conf/experiment has no {config.name}.yaml"]
    changed = differences(config_from_overrides([f"experiment={config.name}"]).pinned.values, config.pinned.values)
    rest = len(changed) - DIFFERENCES_SHOWN
    lines = [f"configuration, here -> there: {shown(line, 300)}" for line in changed[:DIFFERENCES_SHOWN]]
    return lines + ([f"configuration: {rest} more settings differ"] if rest > 0 else [])


def _machine(recipe: Recipe) -> list[str]:
    here = versions() | {
        "torch": str(torch.__version__),
        "the processor": processor_name(),
        "its instructions": torch.backends.cpu.get_cpu_capability(),
    }
    return changed_words(recipe.determinism_context, here)


def changed_words(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Each circumstance that differs, in words."""
    return [
        f"{name}: {shown(there.get(name))} there, {shown(value)} here"
        for name, value in here.items()
        if there.get(name) != value
    ]
