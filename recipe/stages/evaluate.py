"""The evaluation stage: a model on all validation images, and its record.

`evaluate_run` is called by `evaluate.py` in every process. It measures a checkpoint of the run, one of its exported
models, or published weights, by one evaluator. The configuration is the run's own. Only the `evaluation` group and
machine settings can be changed, and the protocol's name shows it.
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from recipe.config.identity import config_sha256
from recipe.config.schema import Backend, Config
from recipe.data.batches import EvaluationBatches
from recipe.data.manifest import Manifest, check_same_dataset, open_dataset
from recipe.data.shards import Split, open_split
from recipe.data.transforms import (
    EvaluationTransform,
    Normalisation,
    build_evaluation_transform,
    transform_of,
)
from recipe.data.worker_pool import open_loaders
from recipe.distributed import World, arithmetic_switches, device_versions, hardware_of, memory_format, start_world
from recipe.document.curves import MISTAKES
from recipe.errors import UserError
from recipe.evaluation import (
    FlipAverage,
    Predict,
    Predictions,
    check_finite,
    class_table,
    collect,
    evaluate,
    predictions_file,
    predictor,
    protocol_name,
    view_name,
)
from recipe.inference.onnx_file import OnnxModel, onnx_protocol, read_onnx
from recipe.inference.pictures import pixels_of
from recipe.models.build import build_model, check_forward, restored_model, weights_sha256
from recipe.models.checkpoint import State, checkpoint_files, eval_weights, load_checkpoint
from recipe.models.pretrained import GivenWeights, load_state, published_accuracy, published_weights
from recipe.run.directory import Run, append_to_journal
from recipe.run.files import display_path, write_atomically
from recipe.run.progress import ProgressPrinter
from recipe.run.provenance import Stage
from recipe.run.records import (
    MISTAKES_MAX,
    PAIRS_MAX,
    ConfusedPair,
    EvaluationRecord,
    Mistake,
    Protocol,
    Setting,
    TrainingRecord,
)

CHECKPOINT_NAME = re.compile(r"^step-\d{8}(\.pt)?$")
NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._+-]+")  # a file of weights may have any name


def evaluate_run(config: Config) -> EvaluationRecord | None:
    """Evaluate the run's checkpoint. Returns the record on rank 0, None on the others."""
    with start_world(config.trainer) as world:
        run = Run(config.run_dir)
        stage = Stage(run.directory) if world.is_rank0 else None
        if stage is not None:
            append_to_journal(run, "evaluate", "started", name=config.name)
        manifest, manifest_hash = open_dataset(config.data)
        evaluated = load_model(run, config, world, manifest, manifest_hash)
        run.predictions_file(evaluated.protocol)  # refuses an unusable name before the work
        measurement = _measure(config, world, evaluated)
        if stage is None or measurement.predictions is None:
            return None
        record = evaluation_record(run, world, stage, manifest, evaluated, measurement)
        (run.write if evaluated.is_the_runs_own else run.write_other_evaluation)(record)
        append_to_journal(
            run, "evaluate", "ended", protocol=record.protocol.name, top1_accuracy=record.correct_top1 / record.images
        )
        return record


def config_of_run(run: Run, config: Config) -> dict[str, Any]:
    """The configuration pinned by training, or this one if the run has none (published weights)."""
    return run.read_config() or config.pinned.values


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with its transform and its description for the record."""

    predict: Predict
    transform: EvaluationTransform
    normalisation: dict[str, list[float]]  # mean and deviation, applied here or in the graph
    backend: str
    precision: str
    protocol: str  # the name of the metric
    inputs: dict[str, str]  # name -> sha256
    checkpoint: str
    epochs_completed: int
    epochs: int
    weights: str  # in words
    is_the_runs_own: bool = False  # in torch: the record that the recipe's result is taken from


def load_model(run: Run, config: Config, world: World, manifest: Manifest, manifest_hash: str) -> EvaluatedModel:
    """The checkpoint, exported model or published weights that the configuration names."""
    if config.evaluation.weights is not None:
        return published_model(config, world, manifest, manifest_hash)
    if config.evaluation.backend is Backend.onnx:
        return onnx_model(run, config, manifest_hash)
    return checkpoint_model(run, config, world, manifest_hash)


def checkpoint_model(run: Run, config: Config, world: World, manifest_hash: str) -> EvaluatedModel:
    """The network with the weights of a checkpoint: the EMA if the run keeps one."""

    def read() -> tuple[str, State]:
        path = chosen_checkpoint(run, config.evaluation.checkpoint)
        return path.name, load_checkpoint(path)

    name, state = world.read_on_rank0(read)  # a training that goes on may save another one meanwhile
    check_same_dataset(name, state["manifest_sha256"], manifest_hash, config.data)
    is_average = state["average"] is not None
    predict, normalisation = _torch_predict(restored_model(state, name), config, world)
    transform = build_evaluation_transform(config.evaluation)
    return EvaluatedModel(
        predict=predict,
        transform=transform,
        normalisation=normalisation.values(),
        backend="torch",
        precision=config.trainer.precision.value,
        protocol=protocol_name(
            view_name(transform, isinstance(predict, FlipAverage)),
            is_average,
            config.evaluation.checkpoint.removesuffix(".pt"),
        ),
        inputs={"weights": weights_sha256(eval_weights(state)), "manifest": manifest_hash},
        checkpoint=name,
        epochs_completed=state["progress"].get("trained_epochs", state["progress"]["epoch"]),
        epochs=config.optimization.epochs,
        weights="moving average" if is_average else "as trained",
        is_the_runs_own=True,
    )


def _torch_predict(model: nn.Module, config: Config, world: World) -> tuple[Predict, Normalisation]:
    """Predict on the device of this process, in the precision of the run."""
    normalisation = Normalisation(config.data.mean, config.data.std, world.device)
    pixels = config.evaluation.crop_pixels
    check_forward(model.eval(), config.model.name, 1, pixels, f"enlarge evaluation.crop_pixels={pixels}")
    model = model.to(world.device).to(memory_format=memory_format(config.trainer))
    trainer = config.trainer
    predict = predictor(
        model, normalisation, trainer.precision, world.device, trainer.channels_last, config.evaluation.flip
    )
    return predict, normalisation


def onnx_model(run: Run, config: Config, manifest_hash: str) -> EvaluatedModel:
    variant = config.evaluation.variant
    path = run.onnx_file(variant.value)
    where = display_path(path)
    if not path.exists():
        raise UserError(
            f"{where} does not exist: make it with `python serialize.py run_dir={display_path(run.directory)}`"
        )
    content = read_onnx(path, where)
    model = OnnxModel(content, where)
    metadata = model.metadata
    check_same_dataset(where, metadata.manifest_sha256, manifest_hash, config.data)
    return EvaluatedModel(
        predict=model,
        transform=transform_of(metadata.interface, where),
        normalisation={"mean": metadata.interface.mean, "std": metadata.interface.std},
        backend=f"onnxruntime {model.provider}",
        precision=variant.value,
        protocol=onnx_protocol(metadata.accuracy.protocol, variant.value),
        inputs={
            path.name: hashlib.sha256(content).hexdigest(),
            "weights": metadata.weights_sha256,
            "manifest": manifest_hash,
        },
        checkpoint=path.name,
        epochs_completed=metadata.accuracy.epochs_completed,
        epochs=metadata.accuracy.epochs,
        weights=f"exported, {variant.value}",
    )


def published_model(config: Config, world: World, manifest: Manifest, manifest_hash: str) -> EvaluatedModel:
    """Published weights, by their name in torchvision or from a file."""
    asked = config.evaluation.weights
    assert asked is not None, "the caller looked"
    given: GivenWeights = world.read_on_rank0(lambda: published_weights(config.model.name, asked))
    if world.is_rank0:
        print(given, file=sys.stderr, flush=True)
    state = given.tensors
    blurs = any(name.endswith(".blur") for name in state)  # the weights say which network they are of
    network = replace(config.model, weights=None, zero_init_last_norm=False, blur_pool=blurs, stochastic_depth=0.0)
    model = build_model(network, len(manifest.classes), config.seed)
    load_state(model, state, given.where)
    predict, normalisation = _torch_predict(model, config, world)
    name, transform = NOT_IN_A_NAME.sub("-", Path(asked).stem)[:100], build_evaluation_transform(config.evaluation)
    return EvaluatedModel(
        predict=predict,
        transform=transform,
        normalisation=normalisation.values(),
        backend="torch",
        precision=config.trainer.precision.value,
        protocol=f"{view_name(transform, isinstance(predict, FlipAverage))}-{config.model.name}-{name}",
        inputs={"weights": weights_sha256(state), "manifest": manifest_hash},
        checkpoint=Path(asked).name,
        epochs_completed=0,
        epochs=0,
        weights=f"published, {name}" + (f", its {given.entry}" if given.entry else ""),
    )


def chosen_checkpoint(run: Run, name: str) -> Path:
    """The file of `last`, `best` or a file name. `last` is the newest, also of an unfinished training."""
    files = checkpoint_files(run.checkpoints)
    if not files:
        raise UserError(
            f"{display_path(run.directory)} has no checkpoint: run `python train.py "
            f"run_dir={display_path(run.directory)}` first"
        )
    if name == "last":
        return files[-1]
    if name == "best":
        return run.checkpoints / f"step-{_best_step(run, files[-1]):08d}.pt"
    if not CHECKPOINT_NAME.match(name):
        raise UserError(
            f"evaluation.checkpoint={name} is invalid: must be last, best or one of "
            + ", ".join(path.name for path in files)
        )
    return run.checkpoints / f"{name.removesuffix('.pt')}.pt"


def _best_step(run: Run, newest: Path) -> int:
    """The best step from the training record or, while training goes on, from its newest checkpoint."""
    training = run.read(TrainingRecord)
    if training is not None:
        return training.best_epoch * training.schedule.steps_per_epoch
    best_step: int = load_checkpoint(newest)["progress"]["best_step"]
    if best_step == 0:
        raise UserError(
            "evaluation.checkpoint=best does not exist yet: the newest checkpoint precedes the end of the first "
            "validation; use last, or continue training"
        )
    return best_step


@dataclass(frozen=True)
class Measurement:
    """The predictions and live objects of an evaluation. The record is read back from them."""

    config: Config
    batches: EvaluationBatches
    predictions: Predictions | None  # on the first process
    seconds: float  # wall time


def _measure(config: Config, world: World, evaluated: EvaluatedModel) -> Measurement:
    split = open_split(config.data.directory, "val")
    started = time.perf_counter()
    with open_loaders([split], config.loader, world) as (loader,):
        batches = EvaluationBatches(loader, evaluated.transform, config.evaluation.batch_size, world)
        if world.is_rank0:
            print(f"evaluating {evaluated.checkpoint} on {len(split):,} images", file=sys.stderr, flush=True)
        with ProgressPrinter("evaluating", len(batches), "batches", shows=world.is_rank0) as progress:
            predictions = collect(evaluate(evaluated.predict, progress.counted(batches)), world, len(split))
    return Measurement(config, batches, predictions, time.perf_counter() - started)


def evaluation_record(
    run: Run, world: World, stage: Stage, manifest: Manifest, evaluated: EvaluatedModel, measurement: Measurement
) -> EvaluationRecord:
    predictions, protocol = measurement.predictions, _protocol(evaluated, measurement)
    assert predictions is not None, "only the first process describes"
    check_finite(predictions, evaluated.checkpoint)
    split = measurement.batches.loader.split
    content = predictions_file(predictions, [split.key(index) for index in range(len(split))])
    path = run.predictions_file(protocol.name)
    write_atomically(path, content)
    outputs = {path.relative_to(run.directory).as_posix(): hashlib.sha256(content).hexdigest()}
    names = [entry.name for entry in manifest.classes]
    mistakes = largest_mistakes(predictions)
    if evaluated.is_the_runs_own and len(mistakes):
        picture = mistakes_png(measurement.config, split, predictions, mistakes, names)
        write_atomically(run.directory / MISTAKES, picture)
        outputs[MISTAKES] = hashlib.sha256(picture).hexdigest()
    return EvaluationRecord(
        config_sha256=config_sha256(config_of_run(run, measurement.config)),
        provenance=stage.finish(hardware_of(world), device_versions(world)),
        inputs=evaluated.inputs,
        outputs=outputs,
        protocol=protocol,
        images=predictions.images,
        correct_top1=int(predictions.correct(1).sum()),
        correct_top5=int(predictions.correct(5).sum()),
        loss=predictions.loss,
        published=published_accuracy(measurement.config.model.name, measurement.config.evaluation.weights),
        per_class=class_table(predictions, [(entry.id, entry.name) for entry in manifest.classes]),
        confused_pairs=confused_pairs(predictions, names),
        mistakes=[
            Mistake(
                key=split.key(index),
                label=names[predictions.labels[index]],
                predicted=names[predictions.top[index, 0]],
                margin=round(float(predictions.margins[index]), 4),
            )
            for index in mistakes
        ],
        processes=world.size,
        evaluation_seconds=round(measurement.seconds, 3),
        images_per_second=round(predictions.images / measurement.seconds, 2),
    )


def largest_mistakes(predictions: Predictions) -> list[int]:
    """Positions of misclassified images, the largest margins first."""
    wrong = np.flatnonzero(~predictions.correct(1))
    return [int(index) for index in wrong[np.argsort(-predictions.margins[wrong], kind="stable")][:MISTAKES_MAX]]


def confused_pairs(predictions: Predictions, names: list[str]) -> list[ConfusedPair]:
    """Classes whose images are taken for another class most often."""
    wrong = ~predictions.correct(1)
    pairs = np.stack([predictions.labels[wrong], predictions.top[wrong, 0]], axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    return [
        ConfusedPair(label=names[found[at, 0]], predicted=names[found[at, 1]], images=int(counts[at]))
        for at in np.argsort(-counts, kind="stable")[:PAIRS_MAX]
    ]


def mistakes_png(
    config: Config, split: Split, predictions: Predictions, mistakes: list[int], names: list[str]
) -> bytes:
    """The misclassified images with their class and the one they were taken for."""
    from recipe.document.figures import Tile, sheet_png  # importing matplotlib takes a second

    return sheet_png(
        [
            Tile(
                pixels_of(split.read(index), False, config.data.max_pixels, split.where(index)).numpy(),
                names[predictions.labels[index]],
                f"→ {names[predictions.top[index, 0]]}",
                is_wrong=True,
            )
            for index in mistakes
        ]
    )


def _views(predict: Predict) -> dict[str, Setting]:
    """The averaged views of an image, if there are several."""
    return {"views": "the image and its mirror image, logits averaged"} if isinstance(predict, FlipAverage) else {}


def _protocol(evaluated: EvaluatedModel, measurement: Measurement) -> Protocol:
    transform = measurement.batches.transform
    return Protocol(
        name=evaluated.protocol,
        backend=evaluated.backend,
        transform=transform.facts() | dict(evaluated.normalisation) | _views(evaluated.predict),
        transform_sha256=transform.fingerprint(),
        decoder=measurement.batches.loader.decoder_name,
        precision=evaluated.precision,
        arithmetic=arithmetic_switches(),
        batch_size=measurement.batches.batch_size,
        checkpoint=evaluated.checkpoint,
        epochs_completed=evaluated.epochs_completed,
        epochs=evaluated.epochs,
        weights=evaluated.weights,
    )
