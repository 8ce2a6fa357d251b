"""A recipe on this machine: the facts of the machine that it leaves open, and how code and machine differ from its own.

Bits depend on the number of processes, on the images of one forward pass and on the threads of the CPU. A recipe says
what they were; here they are set to the same where this machine allows, and said where it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from recipe.composition import composed_outside
from recipe.config import MACHINE_FACTS, Accelerator, Config, TrainerConfig, differences, pinned
from recipe.document.commands import EXPERIMENTS
from recipe.environment import processor_name, usable_cores, versions
from recipe.provenance import source_sha256
from recipe.review.reproduce.parse import Recipe, shown

PROCESSES_MAX_ON_CPU = 8
IMAGES_PER_FORWARD_MAX = 4096
THREADS_MAX_PER_CORE = 4
DIFFERENCES_SHOWN = 20


@dataclass(frozen=True)
class Fitted:
    """The configuration with the facts of this machine, and what could not be as it was."""

    config: Config
    machine: dict[str, Any]  # the facts that bits depend on
    notes: list[str]


def fitted(config: Config, recipe: Recipe, run_dir: Path, data_dir: Path, raw_dir: Path | None) -> Fitted:
    """The recipe's configuration for this machine; places come from here, never from the recipe."""
    notes: list[str] = []
    ours = composed_outside([]).trainer
    defaults = {name: getattr(ours, name) for name in (key.removeprefix("trainer.") for key in _trainer_facts())}
    accelerator = _accelerator(recipe, notes)
    processes = _processes(recipe, accelerator, notes)
    machine = {
        "accelerator": accelerator,
        "gpus": processes,
        "max_images_per_process": _images(config, recipe, processes, ours, notes),
        "cpu_threads": _threads(recipe, notes),
    }
    trainer = replace(config.trainer, **(defaults | machine))
    data = replace(config.data, directory=str(data_dir), raw_dir=None if raw_dir is None else str(raw_dir))
    made = replace(config, run_dir=str(run_dir), trainer=trainer, data=data)
    return Fitted(made, machine | {"accelerator": accelerator.value}, notes)


def _trainer_facts() -> list[str]:
    return [key for key in MACHINE_FACTS if key.startswith("trainer.")]


def _accelerator(recipe: Recipe, notes: list[str]) -> Accelerator:
    training = recipe.claims.training
    if training is None or training.accelerator is None:
        return Accelerator.cpu
    if torch.cuda.is_available():
        return Accelerator.cuda
    notes.append(f"it ran on {shown(training.accelerator)}; this machine shows no GPU, so that it runs on the CPU")
    return Accelerator.cpu


def _whole(recipe: Recipe, name: str, most: int, notes: list[str]) -> int | None:
    """A circumstance that is a number from 1 to `most`; else None, and why."""
    value = recipe.circumstances.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most:
        return value
    notes.append(f"{name}: {shown(value)} there, which cannot be set here (1 to {most})")
    return None


def _processes(recipe: Recipe, accelerator: Accelerator, notes: list[str]) -> int:
    most = torch.cuda.device_count() if accelerator is Accelerator.cuda else PROCESSES_MAX_ON_CPU
    found = _whole(recipe, "the number of processes", most, notes)
    if found is not None:
        return found
    return most if accelerator is Accelerator.cuda else 1


def _images(config: Config, recipe: Recipe, processes: int, ours: TrainerConfig, notes: list[str]) -> int:
    found = _whole(recipe, "images per forward pass", IMAGES_PER_FORWARD_MAX, notes)
    if found is not None and config.optimization.batch_size % (found * processes) == 0:
        return found
    if found is not None:
        notes.append(f"images per forward pass: {found} there do not divide the batch over {processes} process(es)")
    return ours.max_images_per_process


def _threads(recipe: Recipe, notes: list[str]) -> int | None:
    return _whole(recipe, "CPU threads", max(8, THREADS_MAX_PER_CORE * usable_cores()), notes)


def checkout_differences(config: Config, recipe: Recipe) -> list[str]:
    """How this checkout and this machine differ from the recipe's, in words, before anything runs."""
    return [*_code(recipe), *_experiment(config), *_machine(recipe)]


def _code(recipe: Recipe) -> list[str]:
    theirs, ours = recipe.code.source_sha256, source_sha256()
    if theirs == ours:
        return []
    commit = shown(recipe.code.commit or "unknown")
    return [f"code: source {theirs[:16]} there (commit {commit}, tree {shown(recipe.code.tree)}), {ours[:16]} here"]


def _experiment(config: Config) -> list[str]:
    """The file of the same name in conf/experiment; `name` is letters, digits, '.', '_' and '-'."""
    if not (EXPERIMENTS / f"{config.name}.yaml").is_file():
        return [f"configuration: conf/experiment has no {config.name}.yaml"]
    changed = differences(pinned(composed_outside([f"experiment={config.name}"])), pinned(config))
    rest = len(changed) - DIFFERENCES_SHOWN
    lines = [f"configuration, here -> there: {shown(line, 300)}" for line in changed[:DIFFERENCES_SHOWN]]
    return lines + ([f"configuration: {rest} more settings differ"] if rest > 0 else [])


def _machine(recipe: Recipe) -> list[str]:
    here = versions() | {
        "torch": str(torch.__version__),
        "the processor": processor_name(),
        "its instructions": torch.backends.cpu.get_cpu_capability(),
    }
    return changed_words(recipe.circumstances, here)


def changed_words(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Each circumstance of here that was otherwise there."""
    return [
        f"{name}: {shown(there.get(name))} there, {shown(value)} here"
        for name, value in here.items()
        if there.get(name) != value
    ]
