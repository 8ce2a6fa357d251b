"""The records of a training, read back from its live objects: its course, its result and its energy."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import pynvml
import torch
from torch.nn.functional import one_hot

from recipe.data.augment.mixup import soft_targets
from recipe.distributed import World, arithmetic_switches, device_versions, hardware_of
from recipe.document.curves import TRAINING_INPUTS
from recipe.evaluation import protocol_name, view_name
from recipe.models.build import weights_sha256
from recipe.models.checkpoint import eval_weights, load_checkpoint
from recipe.run.files import write_atomically
from recipe.run.records import EnergyRecord, Session, Setting, TrainingRecord
from recipe.training.build import Training
from recipe.training.optim import loss_facts, optimizer_facts

SHOWN_INPUTS = 8  # images


def training_record(training: Training) -> TrainingRecord:
    """The record of a finished training, on rank 0."""
    config, world, progress = training.config, training.world, training.progress
    assert training.stage is not None, "it is the first process's"
    step = training.train_step
    return TrainingRecord(
        config_sha256=config.pinned.config_sha256,
        recipe_id=config.pinned.recipe_id,
        provenance=training.stage.finish(hardware_of(world), device_versions(world)),
        inputs={"manifest": training.manifest_sha256, "initial weights": training.facts.initial_weights_sha256},
        outputs=_outputs(training),
        seed=config.seed,
        model=training.facts,
        loss=loss_facts(step.loss),
        optimizer=type(step.optimizer).__name__,
        parameter_groups=optimizer_facts(step.optimizer),
        schedule=training.learning_rate.facts(),
        augmentation=training.augmentation.facts(config.optimization.epochs) | step.normalisation.facts(),
        augmentation_sha256=training.augmentation.fingerprint(),
        averaging=training.ema.facts(),
        loader=training.batches.facts(),
        precision=_arithmetic(training),
        processes=world.size,
        backend=world.backend,
        sessions=progress.sessions,
        epochs=progress.epochs,
        training_seconds=round(progress.training_seconds, 3),
        validation_seconds=round(progress.validation_seconds, 3),
        images_seen=progress.images_seen,
        peak_accelerator_memory_gib=round(progress.peak_memory_bytes / 2**30, 2) or None,
        skipped_steps=step.skipped_steps,
        validation_protocol=protocol_name(
            view_name(training.validation.transform, config.evaluation.flip), training.ema.is_on
        ),
        best_epoch=progress.best_epoch,
        selection="last: the weights after the final epoch",
        determinism_context=training.determinism_context,
    )


def _outputs(training: Training) -> dict[str, str]:
    """The hashes of the evaluated weights of the last epoch and of the best one, if its checkpoint is kept."""
    best = training.run.checkpoints / f"step-{training.progress.best_step:08d}.pt"
    outputs = {"weights": weights_sha256(training.ema.model.state_dict())}
    if best.exists():
        outputs["best weights"] = weights_sha256(eval_weights(load_checkpoint(best)))
    picture = training.run.content(training.run.directory / TRAINING_INPUTS)
    return outputs | {TRAINING_INPUTS: hashlib.sha256(picture).hexdigest()}


def draw_training_inputs(training: Training) -> None:
    """Draw images of the first step as the network sees them, augmented and mixed, with their classes.

    Called before training, while the other processes wait for rank 0 anyway.
    """
    from recipe.document.figures import Tile, sheet_png  # importing matplotlib takes a second

    step, classes = training.train_step, training.interface.classes
    first_epoch = training.batches.epoch(0)
    batch = next(first_epoch)[0]
    first_epoch.close()  # type: ignore[attr-defined]  # it is a generator
    images, labels, parameters = step.inputs(batch)
    images = images[:SHOWN_INPUTS].float() * step.normalisation.std + step.normalisation.mean
    pixels = images.round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    targets = soft_targets(labels, parameters, len(classes))[:SHOWN_INPUTS]
    if targets.dim() == 1:
        targets = one_hot(targets, len(classes))
    shares, indices = targets.float().topk(min(2, len(classes)))
    tiles = []
    for image, share, index in zip(pixels, shares.tolist(), indices.tolist(), strict=True):
        parts = [(classes[at].name, part) for at, part in zip(index, share, strict=True) if part > 0]
        names = [name if len(parts) == 1 else f"{part:.0%} {name}" for name, part in parts]
        tiles.append(Tile(image, names[0], names[1] if len(names) > 1 else ""))
    write_atomically(training.run.directory / TRAINING_INPUTS, sheet_png(tiles))


def _arithmetic(training: Training) -> dict[str, Setting]:
    parameter = next(parameter for parameter in training.model.parameters() if parameter.dim() == 4)
    return {
        "forward_and_backward": training.train_step.precision.value,
        "weights": str(parameter.dtype).removeprefix("torch."),
        "channels_last": parameter.is_contiguous(memory_format=torch.channels_last),
        "compiled": any(hasattr(module, "_orig_mod") for module in training.train_step.model.modules()),
        "gradient_scaler": training.train_step.scaler.is_enabled(),
    } | arithmetic_switches()


def accelerator_joules(uuids: Sequence[str] | None = None) -> float | None:
    """The sum over these devices (`GPU-...`), or over all of the machine, since the driver was loaded.

    It counts everything that uses a device. None without a driver, a device, or a counter (before Volta).
    """
    try:
        pynvml.nvmlInit()
        try:
            if uuids is None:
                devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            else:
                devices = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
            millijoules: int = sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, devices))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return millijoules / 1000 if devices else None


class EnergyMeter:
    """The energy of this run's accelerators since its start. Off if several machines run it."""

    def __init__(self, world: World) -> None:
        self.uuids = accelerator_uuids(world)
        self.began, self.joules = time.perf_counter(), self.read()

    def read(self) -> float | None:
        return accelerator_joules(self.uuids) if self.uuids else None

    def record(self, sessions: Sequence[Session]) -> EnergyRecord | None:
        """The energy since the start. None without a counter, or if another session trained a part."""
        now = self.read()
        if self.joules is None or now is None or len(sessions) != 1:
            return None
        return EnergyRecord(
            inputs={},
            joules=round(now - self.joules, 3),
            seconds=time.perf_counter() - self.began,
            accelerators=len(self.uuids),
            counter="NVML",
        )


def accelerator_uuids(world: World) -> list[str]:
    """NVML's names of this run's devices. Empty on a CPU, or if several machines run it."""
    if not world.is_rank0 or world.device.type != "cuda" or world.size != world.local_size:
        return []
    uuids = [getattr(torch.cuda.get_device_properties(index), "uuid", None) for index in range(world.local_size)]
    return [f"GPU-{uuid}" for uuid in uuids] if all(uuids) else []
