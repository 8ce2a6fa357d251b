"""A golden trace of a recipe (the canary): the numbers of ten training steps, computed again in a minute.

The steps are spread over the recipe's own schedule. They use a few dozen drawn images and the functions that train:
decoder, augmentation, mixing, network, loss, optimizer, EMA and evaluation. `canary_config` makes images, batches and
precision small enough for a laptop. Everything runs in fp32 on one CPU thread, so that the numbers agree between
machines but for the last digits.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recipe.config.identity import sha256_of
from recipe.config.schema import Accelerator, Config, DataConfig, Expectation, Precision, Source, TrainerConfig
from recipe.data.augment.crop import build_augmentation
from recipe.data.batches import BatchLayout, TrainingBatches
from recipe.data.transforms import build_evaluation_transform
from recipe.distributed import World
from recipe.evaluation import class_table, protocol_name, view_name
from recipe.models.build import build_model, model_facts
from recipe.preprocessing.pipeline import preprocess
from recipe.run.directory import Run
from recipe.run.environment import versions
from recipe.run.progress import ProgressPrinter
from recipe.run.provenance import source_sha256
from recipe.run.records import EvaluationProbe, Fingerprint, ModelFacts, ProbeStep, Schedule, Setting, TrainingRecord
from recipe.training.build import Training, build_training
from recipe.training.loop import take_step
from recipe.training.metrics import predict_validation, validation_predictor
from recipe.training.optim import build_schedule, loss_facts, optimizer_facts
from recipe.training.shutdown import StopRequest
from recipe.training.watchdog import Watchdog

TRACED_STEPS = 10
# Of the learning rate. With full steps the difference between two machines grows a hundredfold at each of them, to a
# percent after ten. With this share it stays within some ten-thousandths (measured: benchmarks/results/canary.md).
RATE_SHARE = 0.05
MANY_UPDATES = 10**6
LARGEST_PIXELS = 64
SMALLEST_BATCH = 16
IMAGES_PER_FORWARD = 8  # half of that, so that gradients of several passes are added up
TRAIN_IMAGES_PER_CLASS, VALIDATION_IMAGES_PER_CLASS = 8, 2
SCHEDULE_POINTS = 101
PARTS = BatchLayout(global_batch_size=SMALLEST_BATCH, processes=2, accumulation_steps=2)  # how batches are divided


def leave_fingerprint(run: Run, config: Config, record: TrainingRecord) -> None:
    """Store the fingerprint of the code that trained, unless the code has changed since."""
    stored = run.read(Fingerprint)
    trained_with = {record.provenance.source_sha256, record.provenance.source_sha256_at_end}
    if (stored is not None and {stored.source_sha256} == trained_with) or {source_sha256()} != trained_with:
        return
    run.write(take_fingerprint(config, record.schedule.steps_per_epoch, record.model.classes))


def take_fingerprint(config: Config, steps_per_epoch: int, classes: int, threads: int = 1) -> Fingerprint:
    """Compute the fingerprint. `steps_per_epoch` and `classes` are those of the recipe's own data.

    Several `threads` are for measuring how far the last digits move.
    """
    print("fingerprint of this code: ten training steps on drawn images", file=sys.stderr, flush=True)
    network = replace(config.model, weights=None, weights_sha256=None)  # those of a run are not needed
    model = build_model(network, classes, config.seed, config.optimization.bce.init_head_bias)
    facts = model_facts(model, network, classes)
    schedule = build_schedule(config.optimization, steps_per_epoch)
    augmentation = build_augmentation(config.augmentation, config.seed)
    progress = ProgressPrinter("fingerprint of this code", TRACED_STEPS, "training steps")
    with progress, _deterministic(threads), _small_training(config) as training:
        settings = _facts(config, training)
        groups = optimizer_facts(training.train_step.optimizer)
        start = _start(training)
        probes, tallies = zip(*progress.counted(_probes(training, start)), strict=True)
        _, top1, top5, images = (sum(column) for column in zip(*tallies, strict=True))
        evaluation = _evaluated(training)
        order = _order_sha256(training)
    return Fingerprint(
        source_sha256=source_sha256(),
        versions=versions(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        architecture_sha256=facts.architecture_sha256,
        parameters=facts.parameters,
        learning_rates=[schedule(step) for step in _evenly(schedule.steps, SCHEDULE_POINTS)],
        parameter_groups=groups,
        augmentation_sha256=augmentation.fingerprint(),
        evaluation_sha256=build_evaluation_transform(config.evaluation).fingerprint(),
        order_sha256=order,
        facts=settings
        | {
            "augmentation": augmentation.facts(config.optimization.epochs),
            "schedule": _schedule_facts(schedule.facts()),
        },
        steps=list(probes),
        training_counts=[round(images), round(top1), round(top5), int(training.train_step.skipped_steps)],
        evaluation=evaluation,
    )


def canary_config(config: Config, folder: Path) -> Config:
    """The recipe at a size that a laptop computes in seconds. Settings not named here stay."""
    optimization, augmentation, evaluation = config.optimization, config.augmentation, config.evaluation
    group_size = min(augmentation.mixup.group_size, 8)
    multiple = math.lcm(group_size, augmentation.repeated_augmentation)
    batch_size = math.ceil(SMALLEST_BATCH / multiple) * multiple
    ema = optimization.ema
    first_pixels, multiple_pixels = (
        augmentation.progressive_resizing.first_pixels,
        augmentation.progressive_resizing.multiple,
    )
    return replace(
        config,
        run_dir=str(folder / "run"),
        data=_drawn_data(config.data, folder),
        model=replace(config.model, weights=None, weights_sha256=None),
        optimization=replace(
            optimization,
            batch_size=batch_size,
            learning_rate=optimization.learning_rate * batch_size / optimization.batch_size * RATE_SHARE,
            ema=replace(
                ema,
                every_steps=min(ema.every_steps, 2),
                precise_bn_images=min(ema.precise_bn_images, SMALLEST_BATCH),
            ),
        ),
        augmentation=replace(
            augmentation,
            crop_pixels=_smaller(augmentation.crop_pixels, augmentation.crop_pixels),
            progressive_resizing=replace(
                augmentation.progressive_resizing,
                first_pixels=first_pixels and _smaller(first_pixels, augmentation.crop_pixels),
                multiple=min(multiple_pixels, 8),
            ),
            mixup=replace(augmentation.mixup, group_size=group_size),
        ),
        loader=replace(config.loader, workers=0, threads=1, prefetch_batches=1),
        trainer=_one_cpu(config.trainer),
        evaluation=replace(
            evaluation,
            resize_pixels=_smaller(evaluation.resize_pixels, evaluation.crop_pixels),
            crop_pixels=_smaller(evaluation.crop_pixels, evaluation.crop_pixels),
            batch_size=SMALLEST_BATCH,
        ),
    )


def _smaller(pixels: int, crop_pixels: int) -> int:
    """A size scaled as the crop is to `LARGEST_PIXELS`."""
    return max(8, round(pixels * min(1.0, LARGEST_PIXELS / crop_pixels)))


def _drawn_data(data: DataConfig, folder: Path) -> DataConfig:
    """A few images of each of the demo's classes, decoded and normalised as the recipe's own."""
    return replace(
        data,
        name="canary",
        source=Source.demo,
        raw_dir=str(folder / "raw"),
        directory=str(folder / "data"),
        expect=Expectation.nothing,
        processes=0,
        train_images_per_class=TRAIN_IMAGES_PER_CLASS,
        validation_images_per_class=VALIDATION_IMAGES_PER_CLASS,
    )


def _one_cpu(trainer: TrainerConfig) -> TrainerConfig:
    return replace(
        trainer,
        gpus=None,
        accelerator=Accelerator.cpu,
        precision=Precision.fp32,
        compile=False,
        deterministic=True,
        max_micro_batch_size=IMAGES_PER_FORWARD,
        torch_threads=1,
        log_every_steps=2**30,
        save_every_steps=None,
        timeout_seconds=600,
    )


@contextmanager
def _deterministic(count: int) -> Iterator[None]:
    """Use deterministic arithmetic with `count` threads. Restores torch's switches."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(count)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def _small_training(config: Config) -> Iterator[Training]:
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), backend="none")
    with tempfile.TemporaryDirectory(prefix="canary-") as folder:
        small = canary_config(config, Path(folder))
        with contextlib.redirect_stderr(io.StringIO()):
            preprocess(small)
        run = Run(small.run_dir)
        watchdog = Watchdog(world, run, small.trainer.timeout_seconds)  # off: one process
        with build_training(small, world, run, None, StopRequest(world), watchdog, None) as training:
            yield training


def _model_facts(facts: ModelFacts) -> dict[str, Setting]:
    return {
        "modules": dict(facts.modules),
        "batch_norm": facts.batch_norm,
        "zero_initialised_norms": facts.zero_initialised_norms,
        "alterations": facts.alterations,
        "initial_weights": facts.initial_weights,
    }


def _schedule_facts(schedule: Schedule) -> dict[str, Setting]:
    """The recorded schedule, its points as a hash."""
    return {
        "steps": schedule.steps,
        "warmup_steps": schedule.warmup_steps,
        "recorded_points": len(schedule.points),
        "recorded_steps_sha256": sha256_of([step for step, _ in schedule.points]),
    }


class Start(NamedTuple):
    """Copies of the tensors that move."""

    groups: list[list[Tensor]]
    average: list[Tensor]


def _start(training: Training) -> Start:
    groups = training.train_step.optimizer.param_groups
    return Start(
        [[parameter.detach().clone() for parameter in group["params"]] for group in groups],
        [tensor.clone() for tensor in _floating(training.ema.model)] if training.ema.is_on else [],
    )


def _floating(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]


def _evenly(total: int, count: int) -> list[int]:
    """Steps of a schedule of `total`, evenly spread from the first to the last."""
    count = min(count, total)
    return [round(place * (total - 1) / max(1, count - 1)) for place in range(count)]


def _probes(training: Training, start: Start) -> Iterator[tuple[ProbeStep, StepCounts]]:
    """Take all steps. From the middle on the EMA has as many updates as late in a training: its decay has warmed up."""
    for number, position in enumerate(_evenly(training.learning_rate.steps, TRACED_STEPS)):
        if number == TRACED_STEPS // 2:
            training.ema.updates = MANY_UPDATES
        yield _probe(training, position, start)


def _probe(training: Training, position: int, start: Start) -> tuple[ProbeStep, StepCounts]:
    """Take the step at `position` and note its effects."""
    progress = training.progress
    epoch, batch = divmod(position, training.batches.batches_per_epoch)
    progress.step, progress.epoch, progress.batch = position, epoch, 0  # batch 0: no row is measured
    batches = training.batches.epoch(epoch, batch)
    parts = next(batches)
    batches.close()  # type: ignore[attr-defined]  # it is a generator
    seen = StepTensors([], [])
    with _hooked(training, seen):
        take_step(training, parts)
    tally = StepCounts(*training.train_step.take_tally().tolist())
    images = torch.cat([batch.flatten() for batch in seen.images])
    probe = ProbeStep(
        step=position,
        epoch=epoch,
        indices=[index for batch in parts for index in batch.indices.tolist()],
        learning_rate=training.train_step.optimizer.param_groups[0]["lr"],
        images_mean=images.mean().item(),
        images_std=images.std().item(),
        loss=tally.loss / tally.images,
        gradient_norm=_l2_norm(seen.gradients),
        distances=_distances(training, start),
    )
    return probe, tally


class StepCounts(NamedTuple):
    """The counts of a step. The loss is a sum over its images."""

    loss: float
    top1: float
    top5: float
    images: float


class StepTensors(NamedTuple):
    """The inputs of the network in each forward pass, and the gradients that the optimizer gets."""

    images: list[Tensor]
    gradients: list[Tensor]


@contextmanager
def _hooked(training: Training, seen: StepTensors) -> Iterator[None]:
    """Collect both during a step."""

    def look_at_images(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.images.append(arguments[0].detach())

    def look_at_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        # in place of those before: torch calls this again for the step of a base class, where that was wrapped
        seen.gradients[:] = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]

    hooks = [
        training.train_step.model.register_forward_pre_hook(look_at_images),
        training.train_step.optimizer.register_step_pre_hook(look_at_gradients),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _distances(training: Training, start: Start) -> dict[str, float]:
    """The distance of each parameter group, and of the EMA if it is on, from its start."""
    distances = {}
    for group, before in zip(training.train_step.optimizer.param_groups, start.groups, strict=True):
        distances[group["name"]] = _l2_norm([now - then for now, then in zip(group["params"], before, strict=True)])
    if training.ema.is_on:
        now = _floating(training.ema.model)
        distances["average"] = _l2_norm([one - other for one, other in zip(now, start.average, strict=True)])
    return distances


def _l2_norm(tensors: list[Tensor]) -> float:
    """Euclidean, over all elements, summed in double precision."""
    return math.sqrt(sum(tensor.detach().double().square().sum().item() for tensor in tensors))


def _evaluated(training: Training) -> EvaluationProbe:
    predict = validation_predictor(training)
    logits = predict(next(iter(training.validation)).images)
    predictions = predict_validation(training, predict)
    assert predictions is not None, "one process is the first"
    classes = [("", "")] * logits.shape[1]
    return EvaluationProbe(
        logits=logits.double().flatten().tolist(),
        labels=predictions.labels.tolist(),
        losses=predictions.losses.tolist(),
        margins=predictions.margins.astype(float).tolist(),
        best_classes=predictions.top.shape[1],
        correct=[int(predictions.correct(within).sum()) for within in range(1, 6)],
        loss=predictions.loss,
        accuracies=[predictions.accuracy(1), predictions.accuracy(5)],
        class_counts=[(row.images, row.correct_top1, row.correct_top5) for row in class_table(predictions, classes)],
    )


def _order_sha256(training: Training) -> str:
    """The order of images in one process and in several."""
    batches = training.batches
    divided = TrainingBatches(batches.loader, batches.augmentation, PARTS, 1, batches.seed)
    orders: list[Callable[[], Any]] = [batches.facts, divided.facts]
    return hashlib.sha256("".join(facts().order_sha256 for facts in orders).encode()).hexdigest()


def _facts(config: Config, training: Training) -> dict[str, Setting]:
    """Facts of the live objects. Those of the evaluation have the recipe's own sizes."""
    transform = build_evaluation_transform(config.evaluation)
    averaging = {name: value for name, value in training.ema.facts().items() if name != "updates"}
    return {
        "model": _model_facts(training.facts),
        "loss": loss_facts(training.train_step.loss),
        "optimizer": type(training.train_step.optimizer).__name__,
        "gradient_scaler": training.train_step.scaler.is_enabled(),
        "averaging": averaging,
        "normalisation": training.train_step.normalisation.facts(),
        "evaluation": transform.facts(),
        "protocol": protocol_name(view_name(transform, config.evaluation.flip), training.ema.is_on),
        "decoder": training.batches.loader.decoder_name,
    }
