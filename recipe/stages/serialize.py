"""The serialization stage: a run's evaluated checkpoint -> ONNX files that passed the parity gate, and their record.

Files are made and compared in memory: none is written before it has passed. Only the checkpoint of the evaluation
record is exported, since its accuracy is known.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from recipe.config.identity import to_dict
from recipe.config.schema import Accelerator, Config, Precision, Variant
from recipe.data.batches import EvaluationBatches, EvaluationRequest
from recipe.data.manifest import check_same_dataset, open_dataset
from recipe.data.shards import Split, open_split
from recipe.data.transforms import Normalisation, build_evaluation_transform, transform_of
from recipe.data.worker_pool import open_loaders
from recipe.distributed import World, device_versions, hardware_of, start_world
from recipe.errors import UserError
from recipe.evaluation import Predictions, predictions_file, predictor
from recipe.inference.export import (
    OPSET,
    Evaluated,
    export_fp32,
    fp16_facts,
    int8_facts,
    load_evaluated,
    to_fp16,
    to_int8,
    with_properties,
)
from recipe.inference.onnx_file import MeasuredAccuracy, Metadata, OnnxModel, TrainingCode, onnx_protocol, to_properties
from recipe.inference.parity import Comparison, check_any_batch, check_parity, compare, limit_of
from recipe.run.directory import Run, append_to_journal
from recipe.run.files import CHECKOUT, display_path, write_atomically
from recipe.run.progress import ProgressPrinter
from recipe.run.provenance import Stage
from recipe.run.records import SerializationRecord, Setting, VariantFacts

CALIBRATION_STREAM = 4  # keeps this choice of images apart from the order's and the augmentation's draws
EXPORTING_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Export:
    run: Run
    config: Config
    checkpoint: Evaluated


def serialize_run(config: Config) -> SerializationRecord:
    """Export the run's evaluated checkpoint. Raises `ParityError` and writes no file if one does not agree."""
    trainer = replace(config.trainer, accelerator=Accelerator.cpu, precision=Precision.fp32, gpus=None)
    config = replace(config, trainer=trainer)
    with start_world(trainer) as world:
        run = Run(config.run_dir)
        stage = Stage(run.directory)
        append_to_journal(run, "serialize", "started", name=config.name)
        export = load_export(run, config)
        files = export_variants(export, world)
        split = open_split(config.data.directory, "val")
        comparisons = compared_with_eager(export, files, split, world)
        record = serialization_record(export, world, stage, files, comparisons, split)
        run.write(record)
        append_to_journal(run, "serialize", "ended", variants=[entry.variant for entry in record.variants])
        return record


def load_export(run: Run, config: Config) -> Export:
    """The checkpoint, evaluated by its own protocol. Raises `UserError` with the command to run first."""
    checkpoint = load_evaluated(run)
    _, manifest_hash = open_dataset(config.data)
    check_same_dataset(checkpoint.where, checkpoint.manifest_sha256, manifest_hash, config.data)
    _check_not_flipped(checkpoint, run)
    measured, own = checkpoint.evaluation.protocol, transform_of(checkpoint.interface, checkpoint.where)
    if measured.transform_sha256 != own.fingerprint():
        raise UserError(
            f"{checkpoint.where} was evaluated by the protocol {measured.name}, but its own is {own.name}, which the "
            f"exported model carries: run `python evaluate.py run_dir={display_path(run.directory)}` without other "
            "values"
        )
    return Export(run, config, checkpoint)


def _check_not_flipped(checkpoint: Evaluated, run: Run) -> None:
    """An exported model sees one view of an image, so its accuracy must be that of one view."""
    if "views" in checkpoint.evaluation.protocol.transform:
        raise UserError(
            f"{checkpoint.where} was evaluated by the protocol {checkpoint.evaluation.protocol.name}, which averages "
            "two views of an image, but an exported model sees one: run "
            f"`python evaluate.py run_dir={display_path(run.directory)} evaluation.flip=false` first"
        )


# ---- making the files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportedFile:
    """One file in memory."""

    variant: Variant
    content: bytes
    model: OnnxModel
    conversion: dict[str, Setting]

    @property
    def nodes(self) -> dict[str, int]:
        """Operator -> count, as in the file."""
        graph = onnx.load_model_from_string(self.content).graph
        return dict(sorted(Counter(node.op_type for node in graph.node).items()))


def export_variants(export: Export, world: World) -> list[ExportedFile]:
    """Every variant that the configuration asks for, fp32 first: the others are made from its graph."""
    print_step("exporting fp32")
    graph = export_fp32(export.checkpoint.model, export.checkpoint.interface)
    made = {Variant.fp32: graph}
    conversion: dict[Variant, dict[str, Setting]] = {Variant.fp32: {"method": "torch.onnx.export, dynamo"}}
    config = export.config.serialization
    if Variant.fp16 in config.variants:
        print_step("converting to fp16")
        made[Variant.fp16], conversion[Variant.fp16] = to_fp16(graph), fp16_facts()
    if Variant.int8 in config.variants:
        count = min(config.int8_calibration_images, len(open_split(export.config.data.directory, "train")))
        print_step(f"calibrating int8 on {count} training images")
        with closing(calibration_images(export, world, count)) as images:
            made[Variant.int8] = to_int8(graph, images, config.int8_reduce_range)
        conversion[Variant.int8] = int8_facts(count, config.int8_reduce_range)
    return [_as_file(export, variant, made[variant], conversion[variant]) for variant in made]


def _as_file(export: Export, variant: Variant, graph: onnx.ModelProto, conversion: dict[str, Setting]) -> ExportedFile:
    """Add the metadata, check that the file names no path of this machine, and open it as a user would."""
    content = with_properties(graph, to_properties(metadata(export, variant)))
    for path in (str(CHECKOUT), str(Path.home()), sys.prefix):
        assert len(path) < 4 or path.encode() not in content, f"the exported file contains the path {path}"
    return ExportedFile(variant, content, OnnxModel(content, f"the exported {variant.value} model"), conversion)


def metadata(export: Export, variant: Variant) -> Metadata:
    """The metadata of a file: of training and evaluation, and the versions of this export."""
    training, evaluation = export.checkpoint.training, export.checkpoint.evaluation
    return Metadata(
        name=export.config.name,
        variant=variant.value,
        interface=export.checkpoint.interface,
        config_sha256=training.config_sha256,
        recipe_id=training.recipe_id,
        weights_sha256=export.checkpoint.weights_sha256,
        manifest_sha256=export.checkpoint.manifest_sha256,
        training=TrainingCode(
            commit=training.provenance.commit,
            tree=training.provenance.tree_at_start.state,
            source_sha256=training.provenance.source_sha256,
        ),
        accuracy=MeasuredAccuracy(
            protocol=evaluation.protocol.name,
            precision=evaluation.protocol.precision,
            epochs_completed=evaluation.protocol.epochs_completed,
            epochs=evaluation.protocol.epochs,
            images=evaluation.images,
            correct_top1=evaluation.correct_top1,
            correct_top5=evaluation.correct_top5,
        ),
        licence=export.config.data.description.licence,
        versions=exporting_versions(),
    )


def exporting_versions() -> dict[str, str]:
    return {package: version(package) for package in EXPORTING_PACKAGES}


def calibration_images(export: Export, world: World, count: int) -> Generator[Tensor, None, None]:
    """Single training images in the view of the evaluation. The choice depends on the seed alone."""
    config = export.config
    split = open_split(config.data.directory, "train")
    chosen = np.random.default_rng((CALIBRATION_STREAM, config.seed)).permutation(len(split))[:count]
    transform = transform_of(export.checkpoint.interface, "the checkpoint")
    with open_loaders([split], config.loader, world) as (loader,):
        parts = (np.array([index], dtype=np.int64) for index in chosen)
        requests = (EvaluationRequest(indices, transform) for indices in parts)
        with ProgressPrinter("calibrating int8", count, "images") as progress:
            for batch in progress.counted(loader.load(requests)):
                yield batch.images


# ---- the gate ---------------------------------------------------------------------------------------


def compared_with_eager(
    export: Export, files: list[ExportedFile], split: Split, world: World
) -> dict[Variant, Comparison]:
    """Compare every variant on all validation images. Returns only if all pass."""
    config = export.config
    normalisation = Normalisation(config.data.mean, config.data.std, world.device)
    eager = predictor(export.checkpoint.model, normalisation, Precision.fp32, world.device, channels_last=False)
    interface = files[0].model.metadata.interface  # the file's, not the configuration's
    views = (build_evaluation_transform(config.evaluation), transform_of(interface, "the exported model"))
    print_step(f"comparing {', '.join(file.variant.value for file in files)} with PyTorch on {len(split):,} images")
    with open_loaders([split], config.loader, world) as (loader,):
        ours, theirs = (EvaluationBatches(loader, view, config.serialization.batch_size, world) for view in views)
        comparisons = compare(eager, {file.variant: file.model for file in files}, ours, theirs, len(split))
    check_parity(comparisons, config.serialization, split.key)
    for file in files:
        check_any_batch(file.model, noise_images(interface.crop_pixels))
    return comparisons


def noise_images(pixels: int) -> Tensor:
    """Eight images of noise, uint8 [8, 3, pixels, pixels], the same on every machine."""
    return torch.randint(0, 256, (8, 3, pixels, pixels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ---- the record -------------------------------------------------------------------------------------


def serialization_record(
    export: Export,
    world: World,
    stage: Stage,
    files: list[ExportedFile],
    comparisons: dict[Variant, Comparison],
    split: Split,
) -> SerializationRecord:
    """Write the files and their predictions, and return their record."""
    first = comparisons[Variant.fp32]
    written = [write_variant(export, file, comparisons[file.variant].exported, split) for file in files]
    return SerializationRecord(
        config_sha256=export.checkpoint.training.config_sha256,
        settings=to_dict(export.config.serialization),
        provenance=stage.finish(hardware_of(world), exporting_versions() | device_versions(world)),
        inputs={"weights": export.checkpoint.weights_sha256, "manifest": export.checkpoint.manifest_sha256},
        outputs={name: sha256 for entry in written for name, sha256 in entry.items()},
        checkpoint=export.checkpoint.evaluation.protocol.checkpoint,
        protocol=export.checkpoint.evaluation.protocol.name,
        provider=files[0].model.provider,
        opset=OPSET,
        input_shape=["batch", "3", *[str(export.checkpoint.interface.crop_pixels)] * 2],
        images=first.eager.images,
        largest_logit=first.largest_logit,
        eager_correct_top1=int(first.eager.correct(1).sum()),
        eager_correct_top5=int(first.eager.correct(5).sum()),
        eager_images_per_second=round(first.eager_images_per_second, 2),
        evaluated_correct_top1=export.checkpoint.evaluation.correct_top1,
        variants=[variant_facts(export, file, comparisons[file.variant], split) for file in files],
        properties=sorted(to_properties(files[0].model.metadata)),
    )


def write_variant(export: Export, file: ExportedFile, predictions: Predictions, split: Split) -> dict[str, str]:
    """Write the file and its predictions. Returns name -> SHA-256."""
    run = export.run
    target = run.onnx_file(file.variant.value)
    beside = run.predictions_file(onnx_protocol(export.checkpoint.evaluation.protocol.name, file.variant.value))
    contents = {
        target: file.content,
        beside: predictions_file(predictions, [split.key(index) for index in range(len(split))]),
    }
    for path, content in contents.items():
        write_atomically(path, content)
    return {
        path.relative_to(run.directory).as_posix(): hashlib.sha256(content).hexdigest()
        for path, content in contents.items()
    }


def variant_facts(export: Export, file: ExportedFile, found: Comparison, split: Split) -> VariantFacts:
    return VariantFacts(
        variant=file.variant.value,
        file=export.run.onnx_file(file.variant.value).relative_to(export.run.directory).as_posix(),
        bytes=len(file.content),
        sha256=hashlib.sha256(file.content).hexdigest(),
        nodes=file.nodes,
        conversion=file.conversion,
        relative_logit_error=found.relative_logit_error,
        limit=limit_of(file.variant, export.config.serialization),
        correct_top1=int(found.exported.correct(1).sum()),
        correct_top5=int(found.exported.correct(5).sum()),
        flips=len(found.flips),
        flip_examples=found.flip_examples(split.key),
        images_per_second=round(found.exported_images_per_second, 2),
    )


def print_step(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)
