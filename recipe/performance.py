"""The Performance metrics section: a run's checkpoint on the whole validation set, and the record of it.

`evaluate_run` is what `evaluate.py` calls in every process. The configuration is the run's own; only the `evaluation`
group and facts of the machine can be given anew, and the protocol's name says so.
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from tqdm import tqdm

from recipe.checkpoint import State, checkpoint_files, load_checkpoint, released_weights
from recipe.config import Config, config_sha256
from recipe.data.adoption import adopt_data_set
from recipe.data.loading import DecodingThreads, EvaluationBatches
from recipe.data.shards import Manifest, open_split
from recipe.data.transforms import Normalisation, build_decoder, build_evaluation_transform, fixed_image, pixels_sha256
from recipe.distributed import World, arithmetic_switches, device_versions, hardware, memory_format, start_world
from recipe.errors import UserError
from recipe.evaluation import (
    Predictions,
    class_table,
    collect,
    evaluate,
    predictions_file,
    predictor,
    protocol_name,
)
from recipe.model import build_model, weights_sha256
from recipe.provenance import Stage
from recipe.records import EvaluationRecord, Protocol
from recipe.run import Run, append_to_journal, shown_path, write_atomically

CHECKPOINT_NAME = re.compile(r"^step-\d{8}(\.pt)?$")


def evaluate_run(config: Config) -> EvaluationRecord | None:
    """Evaluate the run's checkpoint; returns the record on the first process, None on the others."""
    with start_world(config.trainer) as world:
        run = Run(config.run_dir)
        stage = Stage(run.directory) if world.is_first else None
        if stage is not None:
            append_to_journal(run, "evaluate", "started")
        manifest, manifest_hash = adopt_data_set(config.data)
        subject = load_subject(run, config, world, len(manifest.classes), manifest_hash)
        measured = _measure(config, world, subject)
        if stage is None or measured.predictions is None:
            return None
        record = _record(run, world, stage, manifest, subject, measured)
        run.write(record)
        append_to_journal(
            run, "evaluate", "ended", protocol=record.protocol.name, top1_accuracy=record.correct_top1 / record.images
        )
        return record


def pinned_by_training(run: Run) -> dict[str, object]:
    """The run's configuration as training wrote it, whatever this evaluation changed."""
    stored = run.read_config()
    assert stored is not None, "evaluate.py reads the configuration before it calls this"
    return stored


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    model: nn.Module
    weights_sha256: str
    manifest_sha256: str  # of the data set that they were trained on
    checkpoint: str
    epochs_completed: int
    is_average: bool


def load_subject(run: Run, config: Config, world: World, classes: int, manifest_hash: str) -> Subject:
    """The network with the weights of the asked checkpoint: the moving average where the run keeps one."""
    found: tuple[str, State] | None = None
    with world.first_decides():
        if world.is_first:
            path = chosen_checkpoint(run, config.evaluation.checkpoint)
            found = path.name, load_checkpoint(path)
    name, state = world.from_first(found)  # one process reads: a training that goes on may save another one meanwhile
    if state["manifest_sha256"] != manifest_hash:
        raise UserError(
            f"{name} was trained on another data set (manifest {state['manifest_sha256'][:16]}) than "
            f"{shown_path(config.data.directory)} holds ({manifest_hash[:16]}); give data.directory= of the right one"
        )
    model = build_model(replace(config.model, weights=None), classes, config.seed)
    model.load_state_dict(released_weights(state))
    return Subject(
        model=model,
        weights_sha256=weights_sha256(released_weights(state)),
        manifest_sha256=manifest_hash,
        checkpoint=name,
        epochs_completed=state["progress"]["epoch"],
        is_average=state["average"] is not None,
    )


def chosen_checkpoint(run: Run, name: str) -> Path:
    """The file behind `last`, `best` or a file name; `last` is the newest, whether training is finished or not."""
    files = checkpoint_files(run.checkpoints)
    if not files:
        raise UserError(
            f"{shown_path(run.directory)} holds no checkpoint: run `python train.py "
            f"run_dir={shown_path(run.directory)}` first"
        )
    if name == "last":
        return files[-1]
    if name == "best":
        best_step = load_checkpoint(files[-1])["progress"]["best_step"]
        return run.checkpoints / f"step-{best_step:08d}.pt"
    if not CHECKPOINT_NAME.match(name):
        raise UserError(
            f"evaluation.checkpoint={name} cannot be: it must be last, best or one of "
            + ", ".join(path.name for path in files)
        )
    return run.checkpoints / f"{name.removesuffix('.pt')}.pt"


@dataclass(frozen=True)
class Measured:
    """The live objects of an evaluation, which the record is read back from, and what they gave."""

    config: Config
    batches: EvaluationBatches
    normalisation: Normalisation
    predictions: Predictions | None  # on the first process
    seconds: float  # wall time


def _measure(config: Config, world: World, subject: Subject) -> Measured:
    """Predict every image of the validation set."""
    normalisation = Normalisation(config.data.mean, config.data.std, world.device)
    model = subject.model.to(world.device).to(memory_format=memory_format(config.trainer))
    predict = predictor(model, normalisation, config.trainer.precision, world.device, config.trainer.channels_last)
    split = open_split(config.data.directory, "val")
    started = time.perf_counter()
    with closing(DecodingThreads(split, build_decoder(config.data.decoder), config.trainer, world)) as threads:
        transform = build_evaluation_transform(config.evaluation)
        batches = EvaluationBatches(threads, transform, config.evaluation.batch_size, world)
        shown = tqdm(batches, unit="batch", file=sys.stderr, disable=not (world.is_first and sys.stderr.isatty()))
        predictions = collect(evaluate(predict, shown), world, len(split))
    return Measured(config, batches, normalisation, predictions, time.perf_counter() - started)


def _record(
    run: Run, world: World, stage: Stage, manifest: Manifest, subject: Subject, measured: Measured
) -> EvaluationRecord:
    """Write the predictions and describe them."""
    predictions, protocol = measured.predictions, _protocol(subject, measured)
    assert predictions is not None, "only the first process describes"
    split = measured.batches.threads.split
    content = predictions_file(predictions, [split.key(index) for index in range(len(split))])
    write_atomically(run.predictions / f"{protocol.name}.npz", content)
    return EvaluationRecord(
        config_sha256=config_sha256(pinned_by_training(run)),
        provenance=stage.finish(hardware(world), device_versions(world)),
        inputs={"weights": subject.weights_sha256, "manifest": subject.manifest_sha256},
        outputs={f"predictions/{protocol.name}.npz": hashlib.sha256(content).hexdigest()},
        protocol=protocol,
        images=predictions.images,
        correct_top1=int(predictions.correct(1).sum()),
        correct_top5=int(predictions.correct(5).sum()),
        loss=predictions.loss,
        per_class=class_table(predictions, [(entry.id, entry.name) for entry in manifest.classes]),
        processes=world.size,
        evaluation_seconds=round(measured.seconds, 3),
        images_per_second=round(predictions.images / measured.seconds, 2),
    )


def _protocol(subject: Subject, measured: Measured) -> Protocol:
    """How the metric was measured, read back from what measured it."""
    transform, config = measured.batches.transform, measured.config
    fixed = [fixed_image(*size) for size in ((300, 400), (40, 30), (512, 256))]
    return Protocol(
        name=protocol_name(transform.name, subject.is_average, config.evaluation.checkpoint.removesuffix(".pt")),
        transform=transform.facts() | measured.normalisation.facts(),
        transform_sha256=pixels_sha256([transform(image) for image in fixed]),
        decoder=measured.batches.threads.decoder_name,
        precision=config.trainer.precision.value,
        arithmetic=arithmetic_switches(),
        batch_size=measured.batches.batch_size,
        checkpoint=subject.checkpoint,
        epochs_completed=subject.epochs_completed,
        epochs=config.optimization.epochs,
        weights="moving average" if subject.is_average else "as trained",
    )
