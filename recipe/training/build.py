"""Builds everything that a process trains with, from the configuration and the data set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from recipe.alterations import lower_head
from recipe.checkpoint import State
from recipe.config.schema import Config
from recipe.data.adoption import adopt_data_set
from recipe.data.interface import interface_from
from recipe.data.loading import EvaluationBatches, TrainingBatches, derive_layout
from recipe.data.processes import open_decoding
from recipe.data.shards import Manifest, open_split
from recipe.data.transforms import Normalisation, build_evaluation_transform
from recipe.distributed import World, device_versions, memory_format, threads_per_process
from recipe.environment import processor_name, versions
from recipe.model import build_model, model_facts
from recipe.provenance import Stage, source_sha256
from recipe.records import ModelFacts
from recipe.rehearsal import rehearse
from recipe.run import Run
from recipe.training.augmentation import Augmentation, build_augmentation
from recipe.training.averaging import WeightAverage, build_average
from recipe.training.hanging import HangWatch
from recipe.training.journal import DataWait, Journal
from recipe.training.loss import build_loss
from recipe.training.optimization import Stepper, compiled, replicate
from recipe.training.optimizer import build_optimizer
from recipe.training.recalibration import batch_norms
from recipe.training.schedule import LearningRate, build_schedule
from recipe.training.state import Progress, TrainingState, saved_state
from recipe.training.stopping import StopWish

CPU_ARITHMETIC = ("ATEN_CPU_CAPABILITY", "ONEDNN_", "DNNL_", "MKL_")  # choose instructions, and so the last digits


@dataclass
class Failures:
    """Checkpoints that could not be written, on the first process."""

    in_a_row: int = 0


@dataclass(frozen=True)
class Training:
    """The live objects of one process; the record is read back from these."""

    config: Config
    world: World
    run: Run
    stage: Stage | None  # of the first process only
    manifest: Manifest
    manifest_sha256: str
    facts: ModelFacts
    model: nn.Module
    average: WeightAverage
    stepper: Stepper
    learning_rate: LearningRate
    augmentation: Augmentation
    batches: TrainingBatches
    validation: EvaluationBatches
    state: TrainingState
    journal: Journal | None  # of the first process only
    wish: StopWish
    watch: HangWatch
    wait: DataWait
    failures: Failures = field(default_factory=Failures)

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        return self.state.progress


@contextmanager
def build_training(
    config: Config,
    world: World,
    run: Run,
    stage: Stage | None,
    wish: StopWish,
    watch: HangWatch,
    keeps_journal: bool = True,
) -> Iterator[Training]:
    """Open the data, build the network and its collaborators, continue from the newest checkpoint; close at the end.

    `config.model.weights_sha256` must already be known where the run starts from given weights.
    """
    with world.first_decides():
        manifest, manifest_hash = adopt_data_set(config.data, run if world.is_first else None)
    world.must_agree("the data set's manifest", manifest_hash)
    model = build_model(config.model, len(manifest.classes), config.seed)
    if config.optimization.binary_head_bias:
        lower_head(model, config.model.name)
    facts = model_facts(model, config.model, len(manifest.classes))
    model = model.to(world.device).to(memory_format=memory_format(config.trainer))
    augmentation = build_augmentation(config.augmentation, config.seed)
    with ExitStack() as held:
        batches, validation = _build_batches(config, world, augmentation, held)
        _rehearse(config, model, batches, validation)
        average = build_average(model, config.optimization, batches.batches_per_epoch)
        stepper = _build_stepper(config, world, model, batches)
        state = TrainingState(
            run=run,
            model=model,
            average=average,
            stepper=stepper,
            progress=Progress(),
            pinned=config.pinned,
            interface=interface_from(validation.transform, stepper.normalisation, manifest),
            manifest_sha256=manifest_hash,
            circumstances=_circumstances(config, world, batches),
        )
        state.restore(_newest_state(run, world), world)
        wait = DataWait()
        wait.continue_from(*state.progress.lap())
        yield Training(
            config=config,
            world=world,
            run=run,
            stage=stage,
            manifest=manifest,
            manifest_sha256=manifest_hash,
            facts=facts,
            model=model,
            average=average,
            stepper=stepper,
            learning_rate=build_schedule(config.optimization, batches.batches_per_epoch),
            augmentation=augmentation,
            batches=batches,
            validation=validation,
            state=state,
            journal=_open_journal(config, world, state, batches, held) if keeps_journal else None,
            wish=wish,
            watch=watch,
            wait=wait,
        )


def _build_batches(
    config: Config, world: World, augmentation: Augmentation, held: ExitStack
) -> tuple[TrainingBatches, EvaluationBatches]:
    """The loaders of both splits, with threads or processes that end with `held`."""
    splits = [open_split(config.data.directory, name) for name in ("train", "val")]
    train, validation = held.enter_context(open_decoding(splits, config.data.decoder, config.trainer, world))
    layout = derive_layout(config.optimization, config.trainer, world.size)
    transform = build_evaluation_transform(config.evaluation)
    return (
        TrainingBatches(train, augmentation, layout, world.rank, config.seed, config.data.order),
        EvaluationBatches(validation, transform, config.evaluation.batch_size, world),
    )


def _rehearse(config: Config, model: nn.Module, batches: TrainingBatches, validation: EvaluationBatches) -> None:
    """Refuse images that are too small or too few for the network, in every kind of forward pass to come."""
    layout, crop = batches.layout, config.augmentation.crop_pixels
    split = f"over {layout.processes} processes x {layout.accumulation_steps} accumulation steps"
    batch = f"optimization.batch_size={layout.global_batch_size} {split}"
    for pixels in sorted({crop, *map(batches.augmentation.pixels, range(config.optimization.epochs))}):
        at = f"augmentation.crop_pixels={crop}"
        if pixels < crop:
            at = f"augmentation.progressive.first_pixels={config.augmentation.progressive.first_pixels}"
        rehearse(model, config.model.name, layout.images_per_forward, pixels, f"enlarge {at}, or {batch}")
    asked, crop = config.optimization.averaging.recalibrate_images, config.evaluation.crop_pixels
    at = f"evaluation.crop_pixels={crop}"
    if asked:
        batch_norms(model)
        images = min(asked, validation.batch_size, batches.images)
        batch = f"optimization.averaging.recalibrate_images={asked} and evaluation.batch_size={validation.batch_size}"
        rehearse(model, config.model.name, images, crop, f"enlarge {at}, or {batch}")
    rehearse(model.eval(), config.model.name, 1, crop, f"enlarge {at}")
    model.train()


def _build_stepper(config: Config, world: World, model: nn.Module, batches: TrainingBatches) -> Stepper:
    """Replica, optimizer, loss and normalisation."""
    return Stepper(
        _stepped(model, config, world, batches),
        build_optimizer(config.optimization, model, world.device),
        build_loss(config.optimization),
        Normalisation(config.data.mean, config.data.std, world.device),
        config.trainer,
        world,
    )


def _open_journal(
    config: Config, world: World, state: TrainingState, batches: TrainingBatches, held: ExitStack
) -> Journal | None:
    """The first process's notes, cut back to where the run continues."""
    journal = None
    with world.first_decides():
        if world.is_first:
            journal = Journal(
                state.run,
                config.optimization.epochs,
                batches.batches_per_epoch,
                config.trainer.log_every_steps,
                state.progress.step,
                state.progress.epoch,
            )
            held.enter_context(closing(journal))
            if journal.missing:
                state.progress.sessions[-1]["note"] += f"; {journal.missing}"
    return journal


def _newest_state(run: Run, world: World) -> State | None:
    """The newest valid checkpoint as the first process finds it, on every process."""
    state: State | None = world.read_by_first(lambda: saved_state(run))
    return state


def _stepped(model: nn.Module, config: Config, world: World, batches: TrainingBatches) -> nn.Module:
    """The model as it is stepped: compiled if asked, replicated over processes."""
    size = config.augmentation.crop_pixels
    example = torch.zeros(batches.layout.images_per_forward, 3, size, size, device=world.device)
    example = example.to(memory_format=memory_format(config.trainer))
    return replicate(compiled(model, config.trainer), world, example, config.trainer.precision)


def _circumstances(config: Config, world: World, batches: TrainingBatches) -> dict[str, Any]:
    """What must be equal in two sessions for the second to continue the first bit by bit."""
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
            "CPU threads": threads_per_process(config.trainer.cpu_threads, world),
            "the source": source_sha256()[:16],
        }
    )
