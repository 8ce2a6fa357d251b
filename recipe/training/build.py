"""Builds everything that a process trains with, from the configuration and the data set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from recipe.config.schema import Config
from recipe.data.augment.crop import Augmentation, build_augmentation
from recipe.data.batches import EvaluationBatches, TrainingBatches, derive_layout
from recipe.data.manifest import open_dataset
from recipe.data.shards import open_split
from recipe.data.transforms import Normalisation, build_evaluation_transform, interface_from
from recipe.data.worker_pool import open_loaders
from recipe.distributed import World, device_versions, memory_format, threads_per_process
from recipe.models.build import build_model, check_forward, model_facts
from recipe.models.pretrained import GivenWeights
from recipe.run.directory import Run
from recipe.run.environment import processor_name, versions
from recipe.run.provenance import Stage, source_sha256
from recipe.run.records import Epoch, Interface, ModelFacts, Session
from recipe.training.ema import ModelEma, batch_norms, build_ema
from recipe.training.metric_log import DataWait, MetricLogger, StallProbe
from recipe.training.optim import LearningRate, build_loss, build_optimizer, build_schedule
from recipe.training.shutdown import StopRequest
from recipe.training.step import TrainStep, compiled, replicate
from recipe.training.watchdog import Watchdog

CPU_ARITHMETIC = ("ATEN_CPU_CAPABILITY", "ONEDNN_", "DNNL_", "MKL_")  # choose instructions, and so the last digits


@dataclass
class Progress:
    """Counters of a run, all saved with every checkpoint."""

    epoch: int = 0  # completed epochs, their validation included
    batch: int = 0  # completed batches of the epoch after those
    trained_epochs: int = 0  # whose last step is done
    step: int = 0  # completed optimizer steps
    images_seen: int = 0
    best_epoch: int = 0
    best_step: int = 0
    best_top1_accuracy: float = -1.0
    training_seconds: float = 0.0
    validation_seconds: float = 0.0
    epoch_seconds: float = 0.0  # of training, since the last completed epoch
    epoch_waited_seconds: float = 0.0  # of these, for data
    epoch_stalled_seconds: float = 0.0  # of these, as `StallProbe` estimates
    epoch_tally: list[float] = field(default_factory=lambda: [0.0] * 4)  # up to the last row, as `TrainStep.tally` sums
    peak_memory_bytes: int = 0  # of the accelerator
    window: dict[str, Any] = field(default_factory=dict)  # since the last row: a tally per process, and seconds
    epochs: list[Epoch] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)

    def tally_of(self, world: World) -> list[float]:
        """The counts of this process since the last row. With another number of processes, rank 0 gets all of them."""
        tallies = self.window.get("tallies", [])
        if len(tallies) == world.size:
            mine: list[float] = tallies[world.rank]
            return mine
        return [sum(column) for column in zip([0.0] * 4, *tallies, strict=True)] if world.is_rank0 else [0.0] * 4

    def lap(self) -> tuple[float, float]:
        """(seconds since the last row, seconds of it spent waiting for data)."""
        return self.window.get("seconds", 0.0), self.window.get("waited_seconds", 0.0)


@dataclass
class Training:
    """The live objects of one process. The record is read back from them."""

    config: Config
    world: World
    run: Run
    stage: Stage | None  # of the first process only
    manifest_sha256: str
    facts: ModelFacts
    model: nn.Module  # the bare one, not its replica
    ema: ModelEma
    train_step: TrainStep
    learning_rate: LearningRate
    augmentation: Augmentation
    batches: TrainingBatches
    validation: EvaluationBatches
    interface: Interface
    determinism_context: dict[str, Any]  # equal in two sessions where the second continues the first bit by bit
    stop_request: StopRequest
    watchdog: Watchdog
    wait: DataWait
    progress: Progress = field(default_factory=Progress)
    metric_log: MetricLogger | None = None  # of the first process only
    failed_saves: int = 0  # in a row, on the first process

    def note_memory(self) -> None:
        if self.world.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            self.progress.peak_memory_bytes = max(self.progress.peak_memory_bytes, peak)


@contextmanager
def build_training(
    config: Config,
    world: World,
    run: Run,
    stage: Stage | None,
    stop_request: StopRequest,
    watchdog: Watchdog,
    weights: GivenWeights | None,
) -> Iterator[Training]:
    """Open the data and build the network and its collaborators. Closes the loaders at the end.

    `config` and the initial `weights` come from `resolve_weights`.
    """
    with world.rank0_errors_everywhere():
        manifest, manifest_hash = open_dataset(config.data, run if world.is_rank0 else None)
    world.assert_equal_across_ranks("the data set's manifest", manifest_hash)
    bce = config.optimization.bce
    model = build_model(config.model, len(manifest.classes), config.seed, bce.init_head_bias, weights)
    facts = model_facts(model, config.model, len(manifest.classes))
    model = model.to(world.device).to(memory_format=memory_format(config.trainer))
    augmentation = build_augmentation(config.augmentation, config.seed)
    with ExitStack() as stack:
        batches, validation = _build_batches(config, world, augmentation, stack)
        _check_forward_passes(config, model, batches, validation)
        ema = build_ema(model, config.optimization, batches.batches_per_epoch)
        train_step = TrainStep(
            _replicated(model, config, world, batches),
            build_optimizer(config.optimization, model, world.device),
            build_loss(config.optimization),
            Normalisation(config.data.mean, config.data.std, world.device),
            config.trainer,
            world,
        )
        yield Training(
            config=config,
            world=world,
            run=run,
            stage=stage,
            manifest_sha256=manifest_hash,
            facts=facts,
            model=model,
            ema=ema,
            train_step=train_step,
            learning_rate=build_schedule(config.optimization, batches.batches_per_epoch),
            augmentation=augmentation,
            batches=batches,
            validation=validation,
            interface=interface_from(validation.transform, train_step.normalisation, manifest),
            determinism_context=_determinism_context(config, world, batches),
            stop_request=stop_request,
            watchdog=watchdog,
            wait=DataWait(StallProbe() if world.device.type == "cuda" else None),
        )


def _build_batches(
    config: Config, world: World, augmentation: Augmentation, stack: ExitStack
) -> tuple[TrainingBatches, EvaluationBatches]:
    """The loaders of both splits. Their threads or processes end with `stack`."""
    splits = [open_split(config.data.directory, name) for name in ("train", "val")]
    train, validation = stack.enter_context(open_loaders(splits, config.loader, world))
    layout = derive_layout(config.optimization, config.trainer, world.size)
    transform = build_evaluation_transform(config.evaluation)
    return (
        TrainingBatches(train, augmentation, layout, world.rank, config.seed, config.loader.order),
        EvaluationBatches(validation, transform, config.evaluation.batch_size, world),
    )


def _check_forward_passes(
    config: Config, model: nn.Module, batches: TrainingBatches, validation: EvaluationBatches
) -> None:
    """Refuse images that are too small or too few for the network, in every kind of forward pass to come."""
    layout, crop = batches.layout, config.augmentation.crop_pixels
    split = f"over {layout.processes} processes x {layout.accumulation_steps} accumulation steps"
    batch = f"optimization.batch_size={layout.global_batch_size} {split}"
    for pixels in sorted({crop, *map(batches.augmentation.pixels, range(config.optimization.epochs))}):
        at = f"augmentation.crop_pixels={crop}"
        if pixels < crop:
            first_pixels = config.augmentation.progressive_resizing.first_pixels
            at = f"augmentation.progressive_resizing.first_pixels={first_pixels}"
        check_forward(model, config.model.name, layout.images_per_forward, pixels, f"enlarge {at}, or {batch}")
    asked, crop = config.optimization.ema.precise_bn_images, config.evaluation.crop_pixels
    at = f"evaluation.crop_pixels={crop}"
    if asked:
        batch_norms(model)
        images = min(asked, validation.batch_size, batches.images)
        batch = f"optimization.ema.precise_bn_images={asked} and evaluation.batch_size={validation.batch_size}"
        check_forward(model, config.model.name, images, crop, f"enlarge {at}, or {batch}")
    check_forward(model.eval(), config.model.name, 1, crop, f"enlarge {at}")
    model.train()


def _replicated(model: nn.Module, config: Config, world: World, batches: TrainingBatches) -> nn.Module:
    """Compiled if asked, then replicated over processes."""
    size = config.augmentation.crop_pixels
    example = torch.zeros(batches.layout.images_per_forward, 3, size, size, device=world.device)
    example = example.to(memory_format=memory_format(config.trainer))
    return replicate(compiled(model, config.trainer), world, example, config.trainer.precision)


def _determinism_context(config: Config, world: World, batches: TrainingBatches) -> dict[str, Any]:
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    arithmetic = {name: value for name, value in os.environ.items() if name.startswith(CPU_ARITHMETIC)}
    return (
        versions()
        | device_versions(world)
        | {
            "the device": device,
            "the processor": processor_name(),
            "its instructions": torch.backends.cpu.get_cpu_capability(),
            "its libraries' settings": ", ".join(f"{name}={value}" for name, value in sorted(arithmetic.items())),
            "the number of processes": world.size,
            "images per forward pass": batches.layout.images_per_forward,
            "CPU threads": threads_per_process(config.trainer.torch_threads, world),
            "the source": source_sha256()[:16],
        }
    )
