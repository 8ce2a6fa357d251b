"""Traps and contradictions that no single module can rule out: what a finished run, its records and its document say.

`tests/TRAPS.md` and `tests/CONTRADICTIONS.md` name the test of each row.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import numpy as np
import pytest
import torch
from PIL import features
from torch import Tensor, nn
from torch.nn import functional
from torchvision.datasets import imagenet as torchvision_imagenet
from torchvision.transforms.v2 import functional as transforms_functional

from recipe.config import schema as configuration
from recipe.config.schema import Config
from recipe.data.augment.crop import build_augmentation
from recipe.data.batches import Batch, BatchLayout, EvaluationBatches, TrainingBatches
from recipe.data.decoding import EncodedImage, NvImageCodecDecoder, PillowDecoder, build_decoder
from recipe.data.loader import ThreadedLoader
from recipe.data.shards import open_split
from recipe.data.transforms import Normalisation, build_evaluation_transform, uses_native_kernel
from recipe.distributed import World
from recipe.document import figures
from recipe.document.formatting import accuracy
from recipe.document.render import write_document
from recipe.document.run_data import load
from recipe.errors import NonFiniteError
from recipe.models.build import build_model
from recipe.run.directory import Run
from recipe.run.files import CHECKOUT
from recipe.run.provenance import source_files
from recipe.run.records import EvaluationRecord, PreprocessingRecord, TrainingRecord
from recipe.stages import evaluate as performance
from recipe.training import build, checkpointing, loop, metrics
from recipe.training.optim import build_schedule
from recipe.training.step import TrainStep
from tests.builders.configs import SMALL_DEMO, compose_config, no_augmentation

Words = Callable[..., list[str]]
ALONE = World(0, 1, 0, 1, torch.device("cpu"), "none")
IMAGES_PER_EPOCH = 96  # of 108 training images, in batches of 24


@dataclass(frozen=True)
class Proven:
    """One finished run of the smoke experiment, trained, evaluated and written up."""

    config: Config
    run: Run
    preprocessing: PreprocessingRecord
    training: TrainingRecord
    evaluation: EvaluationRecord
    rows: list[dict[str, Any]]
    document: str
    journal: list[dict[str, Any]]

    def rows_of(self, split: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["split"] == split]

    def block(self, block_id: str) -> str:
        found = re.search(rf"<!-- recipe:begin {block_id} .*?<!-- recipe:end {block_id} -->", self.document, re.DOTALL)
        assert found, block_id
        return found[0]


@pytest.fixture(scope="module")
def proven(data_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proven]:
    """Two epochs of four steps, every step logged, with the journal in a separate directory."""
    here = tmp_path_factory.mktemp("proven")
    words = [
        "experiment=smoke",
        *SMALL_DEMO,
        f"data.directory={data_directory}",
        "run_dir=runs/proven",
        "optimization.batch_size=24",
        "trainer.log_every_steps=1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        config = compose_config(*words)
        training, evaluation = loop.train(config), performance.evaluate_run(config)
        run = Run(here / "runs" / "proven")
        write_document(run, "runs/proven")
        preprocessing = run.read(PreprocessingRecord)
        assert training is not None
        assert evaluation is not None
        assert preprocessing is not None
        yield Proven(
            config,
            run,
            preprocessing,
            training,
            evaluation,
            run.metric_rows(),
            run.document.read_text(),
            [json.loads(line) for line in (here / "runs" / "journal.jsonl").read_text().splitlines()],
        )


# ---- the protocol of the metric (T6, T7, T11; contradictions 9, 13, 14, 17) ----------------------------


def test_the_protocol_records_the_batch_size_of_the_live_batches(smoke: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """T6: another shape of a batch changes logits, so a batch size that the code alone changed must show."""
    words = smoke("optimization.epochs=1")
    loop.train(compose_config(*words))
    before = performance.evaluate_run(compose_config(*words))
    original = EvaluationBatches.__init__

    def in_small_batches(self: EvaluationBatches, threads: Any, transform: Any, batch_size: int, world: World) -> None:
        original(self, threads, transform, batch_size // 2, world)

    monkeypatch.setattr(EvaluationBatches, "__init__", in_small_batches)
    after = performance.evaluate_run(compose_config(*words))
    assert before is not None
    assert after is not None
    assert before.protocol.batch_size == 64
    assert after.protocol.batch_size == 32


def test_the_protocol_records_the_pixels_of_the_live_view(smoke: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contradiction 9: a resize that only the measuring code uses must show, not the one that was configured."""
    words = smoke("optimization.epochs=1")
    loop.train(compose_config(*words))
    before = performance.evaluate_run(compose_config(*words))
    original = EvaluationBatches.__init__

    def with_other_view(self: EvaluationBatches, threads: Any, transform: Any, batch_size: int, world: World) -> None:
        original(self, threads, replace(transform, resize_pixels=transform.resize_pixels + 4), batch_size, world)

    monkeypatch.setattr(EvaluationBatches, "__init__", with_other_view)
    after = performance.evaluate_run(compose_config(*words))
    assert before is not None
    assert after is not None
    assert before.protocol.transform_sha256 != after.protocol.transform_sha256
    assert before.protocol.transform["resize_short_side_pixels"] != after.protocol.transform["resize_short_side_pixels"]


def test_the_protocol_records_the_live_arithmetic(smoke: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """T6: TF32 and cuDNN's choice of algorithms change accuracies in the second decimal."""
    words = smoke("optimization.epochs=1")
    loop.train(compose_config(*words))
    before = performance.evaluate_run(compose_config(*words))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32)
    after = performance.evaluate_run(compose_config(*words))
    assert before is not None
    assert after is not None
    assert before.protocol != after.protocol


def test_pillow_and_its_jpeg_library_are_recorded(proven: Proven) -> None:
    """T7: the library that decoded the images in preprocessing, and the versions of later stages."""
    decoded_with = proven.preprocessing.decoded_with
    assert decoded_with.startswith(f"Pillow {proven.preprocessing.provenance.versions['pillow']}, libjpeg")
    assert str(features.version("libjpeg_turbo") or features.version("jpg")) in decoded_with
    assert decoded_with in proven.block("processing_methods")
    assert proven.evaluation.protocol.decoder == proven.training.loader.decoder == "nvimgcodec"


def test_every_stage_has_versions_of_its_own(proven: Proven) -> None:
    """Contradiction 13."""
    for record in (proven.preprocessing, proven.training, proven.evaluation):
        packages = ("torch", "torchvision", "nvidia-nvimgcodec-cu13", "pillow")
        assert {"python", "numpy", *packages} <= record.provenance.versions.keys()
        for package in packages:
            assert f"{package} {record.provenance.versions[package]}" in proven.block("where_it_ran").replace("`", "")
        assert str(torch.__version__).startswith(record.provenance.versions["torch"])


def test_the_reported_weights_are_the_last_ones(proven: Proven) -> None:
    """T11: nothing is chosen by the validation set unless asked, and then the metric's name says so."""
    assert proven.evaluation.inputs["weights"] == proven.training.outputs["weights"]
    assert proven.evaluation.protocol.checkpoint == "step-00000008.pt"
    assert not proven.evaluation.protocol.name.endswith("-best")
    assert "last: the weights after the final epoch" in proven.block("outputs")


def test_one_accuracy_has_one_spelling_everywhere(proven: Proven) -> None:
    """Contradiction 14: summary, metrics and the last row of the dynamics."""
    record = proven.evaluation
    whole = str(accuracy(record.correct_top1, record.images))
    percent = whole.partition(" (")[0]
    assert whole in proven.block("summary")
    assert whole in proven.block("performance_metrics")
    top_one = re.findall(r"op-1\b[^|]*?(?:accuracy\*\* \| )?\*\*([^*]+)\*\*", proven.document)
    assert set(top_one) == {whole}
    last_row = re.findall(r"^\| 2 \|.*$", proven.block("dynamics"), re.MULTILINE)[-1]
    assert last_row.split("|")[6].strip() == percent
    assert proven.training.epochs[-1].validation_top1 == record.correct_top1 / record.images


def test_images_evaluated_are_the_images_of_the_split(proven: Proven) -> None:
    """Contradiction 17: counted by the loop, in the data set, over the classes, and by the file of predictions."""
    record = proven.evaluation
    split = open_split(proven.config.data.directory, "val")
    keys = {split.key(index) for index in range(len(split))}
    name = next(name for name in record.outputs if name.endswith(".npz"))
    with np.load(proven.run.directory / name, allow_pickle=False) as stored:
        assert len(stored["key"]) == len(keys)
        assert set(stored["key"].tolist()) == keys
        hits = int((stored["top5"][:, 0] == stored["label"]).sum())
    assert record.images == len(keys) == proven.preprocessing.splits["val"].images == 48
    assert sum(row.images for row in record.per_class) == record.images
    assert sum(row.correct_top1 for row in record.per_class) == record.correct_top1 == hits


# ---- labels (T32; contradiction 12) -----------------------------------------------------------------


@dataclass(frozen=True)
class Devkit:
    """The oracle: torchvision's reading of the demo's devkit."""

    wnids: list[str]  # sorted, so that their places are the labels
    names: dict[str, str]
    validation: list[str]  # the WNID of each validation image


@pytest.fixture
def devkit(data_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Devkit:
    archive = data_directory.parent / "raw" / "ILSVRC2012_devkit_t12.tar.gz"
    (tmp_path / archive.name).write_bytes(archive.read_bytes())
    digest = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setitem(torchvision_imagenet.ARCHIVE_META, "devkit", (archive.name, digest))
    monkeypatch.setattr(torchvision_imagenet, "extract_archive", extract)
    torchvision_imagenet.parse_devkit_archive(tmp_path)
    names, validation = torchvision_imagenet.load_meta_file(tmp_path)
    return Devkit(sorted(names), {wnid: ", ".join(words) for wnid, words in names.items()}, validation)


def extract(path: str, target: str) -> None:
    """torchvision's extraction without the warning about filters."""
    with tarfile.open(path) as archive:
        archive.extractall(target, filter="data")


def test_class_names_belong_to_their_indices(proven: Proven, devkit: Devkit) -> None:
    """A name that is off by one would change no metric."""
    expected = [(index, wnid, devkit.names[wnid]) for index, wnid in enumerate(devkit.wnids)]
    assert [(row.index, row.class_id, row.name) for row in proven.evaluation.per_class] == expected
    for index, wnid, name in expected:
        assert f"| {index} | `{wnid}` | {name} |" in proven.block("performance_metrics")


def test_label_examples_are_images_of_their_classes(proven: Proven, devkit: Devkit) -> None:
    split = open_split(proven.config.data.directory, "train")
    labels = {split.key(index): int(split.labels[index]) for index in range(len(split))}
    examples = proven.preprocessing.label_examples
    assert [example.index for example in examples] == [0, 6, 11]
    for example in examples:
        assert example.class_id == devkit.wnids[example.index]
        assert example.key.startswith(f"{example.class_id}_")
        assert labels[example.key] == example.index
        assert example.name == devkit.names[example.class_id]
        assert f"`{example.key}` is {example.index}, {example.name} (`{example.class_id}`)" in proven.block("raw_data")


def test_predictions_carry_the_devkits_labels(proven: Proven, devkit: Devkit) -> None:
    name = next(name for name in proven.evaluation.outputs if name.endswith(".npz"))
    with np.load(proven.run.directory / name, allow_pickle=False) as stored:
        found = dict(zip(stored["key"].tolist(), stored["label"].tolist(), strict=True))
    assert found == {
        f"ILSVRC2012_val_{number:08d}": devkit.wnids.index(wnid)
        for number, wnid in enumerate(devkit.validation, start=1)
    }


# ---- augmentation (T12, T13, T15; contradiction 22) -------------------------------------------------


def augmented(data_directory: Path, epoch: int, processes: int, threads: int) -> dict[int, str]:
    """Image -> hash of its augmented pixels, over all ranks of an epoch."""
    config = compose_config("experiment=smoke", f"loader.threads={threads}")
    augmentation = build_augmentation(config.augmentation, 3)
    found: dict[int, str] = {}
    for rank in range(processes):
        split, decoder = open_split(data_directory, "train"), build_decoder(config.loader.decoder)
        with closing(ThreadedLoader(split, decoder, config.loader, ALONE)) as pool:
            layout = BatchLayout(36, processes, 1)
            for (batch,) in TrainingBatches(pool, augmentation, layout, rank, 3).epoch(epoch):
                for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
                    assert index not in found
                    found[index] = hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()
    return found


def test_pixels_differ_over_images_and_epochs_and_not_over_ranks_and_threads(data_directory: Path) -> None:
    first, second = (augmented(data_directory, epoch, processes=3, threads=2) for epoch in (0, 1))
    assert len(first) == len(second) == 108
    assert len({*first.values(), *second.values()}) == 216
    assert augmented(data_directory, 0, processes=1, threads=3) == first


def states_of_global_generators() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, keys.tobytes(), rest, torch.get_rng_state().numpy().tobytes()  # type: ignore[union-attr]


def test_augmentation_neither_reads_nor_moves_a_global_generator(data_directory: Path) -> None:
    found = []
    for seed in (1, 1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = states_of_global_generators()
        found.append(augmented(data_directory, 0, processes=1, threads=1))
        assert states_of_global_generators() == before
    assert found[0] == found[1] == found[2]


def test_a_change_in_torchvision_changes_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contradiction 22: the effective augmentation lives in a dependency."""
    augmentation = build_augmentation(compose_config("experiment=smoke").augmentation, 0)
    before, original = augmentation.fingerprint(), transforms_functional.resize

    def later_version(*arguments: Any, **options: Any) -> Tensor:
        return original(*arguments, **(options | {"antialias": False}))

    uses_native_kernel.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(transforms_functional, "resize", later_version)
        assert augmentation.fingerprint() != before
    uses_native_kernel.cache_clear()
    assert augmentation.fingerprint() == before


# ---- the order (T14; contradiction 18) --------------------------------------------------------------


def delivered_orders(config: Config, epochs: int) -> list[list[int]]:
    """The indices that the live loader hands out."""
    split, decoder = open_split(config.data.directory, "train"), build_decoder(config.loader.decoder)
    with closing(ThreadedLoader(split, decoder, config.loader, ALONE)) as pool:
        batches = TrainingBatches(pool, no_augmentation(8), BatchLayout(24, 1, 1), 0, config.seed)
        return [
            [index for (batch,) in batches.epoch(epoch) for index in batch.indices.tolist()] for epoch in range(epochs)
        ]


def test_the_order_differs_by_epoch_and_the_recorded_one_is_delivered(proven: Proven) -> None:
    first, second = delivered_orders(proven.config, 2)
    assert first != second
    assert proven.training.loader.first_indices == first[:8]
    shown = ", ".join(str(index) for index in first[:8])
    assert f"| Order of images | the first are {shown} |" in proven.block("optimization_methods")
    assert f"| order of the images of two epochs | `{proven.training.loader.order_sha256}` |" in proven.block("hashes")


def test_a_loader_that_forgets_the_epoch_changes_the_record(
    data_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is to be read back from the batches that are handed out."""
    config = compose_config("experiment=smoke")
    with closing(ThreadedLoader(open_split(data_directory, "train"), PillowDecoder(), config.loader, ALONE)) as pool:
        batches = TrainingBatches(pool, no_augmentation(8), BatchLayout(24, 1, 1), 0, 0)
        before = batches.facts().order_sha256
        original = TrainingBatches._requests
        monkeypatch.setattr(TrainingBatches, "_requests", lambda self, epoch, *others: original(self, 0, *others))
        assert batches.facts().order_sha256 != before


# ---- steps and rates (T20, T22; contradictions 1-4) -------------------------------------------------


def test_the_rates_that_were_applied_are_the_recorded_curve(proven: Proven) -> None:
    """Rows have the rates of the optimizer's groups at each step. The record has the schedule, evaluated."""
    schedule, rows = proven.training.schedule, proven.rows_of("train")
    assert [(row["step"] - 1, row["learning_rate"]) for row in rows] == schedule.points
    live = build_schedule(proven.config.optimization, IMAGES_PER_EPOCH // 24)
    assert [row["learning_rate"] for row in rows] == [live(step) for step in range(8)]
    assert len({row["learning_rate"] for row in rows}) > 4


def test_steps_are_counted_from_the_live_loader(proven: Proven) -> None:
    training = proven.training
    assert training.schedule.steps_per_epoch * training.loader.global_batch_size == training.loader.images_per_epoch
    assert training.schedule.steps == proven.rows_of("train")[-1]["step"] == 8
    assert training.images_seen == proven.rows_of("train")[-1]["images_seen"] == 2 * IMAGES_PER_EPOCH
    assert training.loader.images_per_epoch + training.loader.images_left_out_per_epoch == 108
    assert "8 steps, 4 an epoch" in proven.block("optimization_methods")


def test_the_figures_show_the_recorded_schedule_and_rows(proven: Proven) -> None:
    """Contradiction 4: another schedule, or another course, is another picture."""
    facts = load(proven.run, "runs/proven")
    drawn = figures.draw(facts)
    assert {name: (proven.run.figures / name).read_bytes() for name in drawn} == drawn
    points = [(step, 2 * rate) for step, rate in proven.training.schedule.points]
    other_schedule = msgspec.structs.replace(
        proven.training, schedule=msgspec.structs.replace(proven.training.schedule, points=points)
    )
    assert figures.draw(replace(facts, training=other_schedule))["learning_rate.png"] != drawn["learning_rate.png"]
    other_rows = [{**row, "loss": row["loss"] / 2} for row in proven.rows]
    halved = [msgspec.structs.replace(epoch, train_top1=epoch.train_top1 / 2) for epoch in proven.training.epochs]
    other_training = msgspec.structs.replace(proven.training, epochs=halved)
    changed = figures.draw(replace(facts, training=other_training, metrics=other_rows))
    assert {name for name in drawn if changed[name] != drawn[name]} == {"accuracy.png", "loss.png"}


def test_the_document_shows_both_parameter_groups(proven: Proven) -> None:
    """Contradiction 19: the tensors that decay are printed, not left to the reader."""
    weights, exempt = proven.training.parameter_groups
    assert weights.settings["weight_decay"] == proven.config.optimization.weight_decay > 0
    assert exempt.settings["weight_decay"] == 0.0
    live = build_model(proven.config.model, 12, 0)
    assert weights.tensors == sum(parameter.dim() > 1 for parameter in live.parameters())
    assert exempt.tensors == sum(parameter.dim() <= 1 for parameter in live.parameters()) > 0
    for group in (weights, exempt):
        row = re.search(
            rf"^\| Parameters: {group.name} \| [\d,]+ in {group.tensors} tensors;.*$", proven.document, re.MULTILINE
        )
        assert row
        assert re.search(r"weight_decay[^,|]*?" + re.escape(f"{group.settings['weight_decay']:g}"), row[0])


# ---- train rows and validation rows (contradiction 16) ----------------------------------------------


def mean_loss_and_hits(
    model: nn.Module, batches: Iterator[list[Batch]] | list[list[Batch]], config: Config, smoothing: float
) -> tuple[float, float]:
    """Over all images, written out without the code that is tested."""
    normalisation = Normalisation(config.data.mean, config.data.std, torch.device("cpu"))
    losses, hits = [], []
    with torch.no_grad():
        for batch in (batch for step in batches for batch in step):
            logits = model(normalisation(batch.images))
            losses.append(functional.cross_entropy(logits, batch.labels, label_smoothing=smoothing, reduction="none"))
            hits.append((logits.argmax(dim=1) == batch.labels).float())
    return float(torch.cat(losses).mean()), float(torch.cat(hits).mean())


def test_train_rows_come_from_training_batches_and_validation_rows_from_validation(smoke: Words) -> None:
    """With a rate of nearly zero and no norm the network stays as it was, so both rows can be computed again."""
    config = compose_config(
        *smoke(
            "optimization.epochs=1",
            "optimization.learning_rate=1e-12",
            "optimization.label_smoothing=0.1",
            "model.norm=none",
            "model.zero_init_last_norm=false",
        )
    )
    loop.train(config)
    model = build_model(config.model, 12, config.seed)
    augmentation = build_augmentation(config.augmentation, config.seed)
    transform = build_evaluation_transform(config.evaluation)
    pools = [
        ThreadedLoader(
            open_split(config.data.directory, name), build_decoder(config.loader.decoder), config.loader, ALONE
        )
        for name in ("train", "val")
    ]
    with closing(pools[0]), closing(pools[1]):
        training = TrainingBatches(pools[0], augmentation, BatchLayout(24, 1, 1), 0, config.seed)
        expected = {
            "train": mean_loss_and_hits(model, training.epoch(0), config, smoothing=0.1),
            "validation": mean_loss_and_hits(
                model, [list(EvaluationBatches(pools[1], transform, 16, ALONE))], config, smoothing=0.0
            ),
        }
    rows = Run(config.run_dir).metric_rows()
    assert [row["split"] for row in rows] == ["train", "validation"]
    for row in rows:
        loss, hits = expected[row["split"]]
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["top1_accuracy"] == pytest.approx(hits, abs=1e-6)
    assert expected["train"][0] != pytest.approx(expected["validation"][0], rel=1e-3)


# ---- the network in training (T26, T28, T41) --------------------------------------------------------


def test_the_model_is_channels_last_before_it_is_wrapped(smoke: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[nn.Module, Tensor]] = []

    def watched(model: nn.Module, world: World, example: Tensor, precision: Any) -> nn.Module:
        filters = [parameter for parameter in model.parameters() if parameter.dim() == 4 and parameter.shape[1] > 1]
        assert filters
        assert all(filter_.is_contiguous(memory_format=torch.channels_last) for filter_ in filters)
        assert any(not filter_.is_contiguous() for filter_ in filters)
        seen.append((model, example))
        return model

    monkeypatch.setattr(build, "replicate", watched)
    config = compose_config(*smoke("optimization.epochs=1"))
    assert config.trainer.channels_last
    loop.train(config)
    ((_, example),) = seen
    assert example.is_contiguous(memory_format=torch.channels_last)


def test_statistics_are_made_equal_before_they_are_used_and_saved(
    smoke: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T26: model and average are copied from the first process, then saved, then validated."""
    events: list[str] = []
    validate, save = metrics.evaluate, checkpointing.save_checkpoint

    def validating(*arguments: Any) -> Any:
        events.append("validate")
        return validate(*arguments)

    def saving(*arguments: Any) -> Any:
        events.append("save")
        return save(*arguments)

    monkeypatch.setattr(World, "broadcast_module", lambda self, module: events.append("copy"))
    monkeypatch.setattr(metrics, "evaluate", validating)
    monkeypatch.setattr(checkpointing, "save_checkpoint", saving)
    loop.train(compose_config(*smoke("optimization.ema.decay=0.9")))
    assert events == ["copy", "copy", "save", "validate"] * 2


def names_in(path: Path) -> set[str]:
    """Every name and attribute that a source file mentions."""
    tree = ast.parse(path.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            names |= {part for name in imported for part in name.split(".")}
    return names


def test_there_is_no_other_way_to_run_on_several_devices() -> None:
    """T41, T16, T27: no DataParallel, no spawned ranks, no DistributedSampler, no DALI, no SyncBatchNorm."""
    used = set().union(*(names_in(path) for path in source_files() if path.suffix == ".py"))
    assert "DistributedDataParallel" in used
    assert not used & {"DataParallel", "spawn", "start_processes", "DistributedSampler", "SyncBatchNorm", "dali"}


# ---- time (T37, T38) --------------------------------------------------------------------------------


def test_throughput_is_global_images_over_wall_time(proven: Proven) -> None:
    for epoch in (1, 2):
        rows = [row for row in proven.rows_of("train") if row["epoch"] == epoch]
        cost = proven.training.epochs[epoch - 1]
        assert cost.images_per_second * cost.seconds == pytest.approx(IMAGES_PER_EPOCH, rel=0.02)
        assert sum(24 / row["images_per_second"] for row in rows) == pytest.approx(cost.seconds, rel=0.02)
    assert sum(cost.seconds for cost in proven.training.epochs) == pytest.approx(
        proven.training.training_seconds, abs=0.01
    )
    elapsed = proven.training.training_seconds + proven.training.validation_seconds
    assert elapsed <= proven.training.provenance.seconds


def waiting_share(words: list[str]) -> float:
    record = loop.train(compose_config(*words))
    assert record is not None
    return record.epochs[0].data_wait_fraction


def test_the_data_share_distinguishes_slow_data_from_slow_steps(smoke: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["optimization.epochs=1", "loader.threads=1"]
    opened, step = NvImageCodecDecoder.open, TrainStep.__call__

    def slowly_opened(self: NvImageCodecDecoder, content: bytes) -> EncodedImage:
        time.sleep(0.008)
        return opened(self, content)

    def slow_step(self: TrainStep, batches: list[Batch], learning_rate: float) -> None:
        time.sleep(0.15)
        step(self, batches, learning_rate)

    with monkeypatch.context() as patch:
        patch.setattr(NvImageCodecDecoder, "open", slowly_opened)
        slow_data = waiting_share(smoke(*words, run="data"))
    monkeypatch.setattr(TrainStep, "__call__", slow_step)
    slow_steps = waiting_share(smoke(*words, run="steps"))
    assert slow_data > slow_steps + 0.05


def test_the_first_epoch_is_reported_apart(proven: Proven) -> None:
    cold, warm = proven.training.epochs
    block = proven.block("dynamics")
    assert re.search(r"[\d,.]+ images/s in the first \(cold\) epoch", block)
    assert re.search(r"[\d,.]+ in warm epochs \(median of 1\)", block)
    assert f"{cold.images_per_second:,.0f}" in block
    assert f"{warm.images_per_second:,.0f}" in block


# ---- the code and the document (T40; contradictions 5, 6, 8, 9, 21) ---------------------------------


def python_files() -> list[Path]:
    return [path for path in source_files() if path.suffix == ".py"]


def test_every_source_file_compiles() -> None:
    """Contradiction 6."""
    assert len(python_files()) > 40
    for path in python_files():
        compile(path.read_text(), path.name, "exec", dont_inherit=True)


def knobs(schema: type) -> set[str]:
    """The leaves of a configuration, but for what people declare."""
    found: set[str] = set()
    for name, kind in get_type_hints(schema).items():
        if name == "description":
            continue
        nested = isinstance(kind, type) and is_dataclass(kind)
        found |= knobs(kind) if nested else {name}  # type: ignore[arg-type]
    return found


def test_every_knob_is_read_somewhere() -> None:
    """Contradiction 9: a parameter that nothing uses would be printed and change nothing."""
    used = set().union(*(names_in(path) for path in python_files() if path.name != "config.py"))
    assert len(knobs(Config)) > 50
    assert knobs(Config) - used == set()


def test_every_description_is_printed() -> None:
    templates = (CHECKOUT / "recipe" / "document" / "templates").glob("*.j2")
    template = "".join(path.read_text() for path in templates)
    render = (CHECKOUT / "recipe" / "document" / "render.py").read_text()
    for prefix, schema in (
        ("description", configuration.ExperimentDescription),
        ("data.description", configuration.DataDescription),
        ("model.description", configuration.ModelDescription),
    ):
        for field in fields(schema):
            assert f'"{prefix}.{field.name}"' in template + render


def test_the_commands_of_the_document_can_be_typed(proven: Proven) -> None:
    """Contradiction 6: the script parses, and a stage that was not run yet is named by a command that composes."""
    (script,) = re.findall(r"```bash\n(.*?)```", proven.block("run_again"), re.DOTALL)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    named = re.findall(r"run `(python [^`]+)`", proven.document)
    before = proven.run.directory.with_name("before")
    Run(before).write(proven.preprocessing)
    write_document(Run(before), "runs/before")
    named += re.findall(r"run `(python [^`]+)`", Run(before).document.read_text())
    for command in named:
        _, *words = shlex.split(command)
        name = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
        assert (CHECKOUT / name).is_file()
        compose_config(*[word for word in words if word.startswith(("experiment=", "run_dir="))])


def test_no_link_of_the_document_points_at_a_line(proven: Proven) -> None:
    """Contradiction 8: the work of the code is printed, with no reference to line numbers."""
    links = re.findall(r"\]\(([^)]*)\)", proven.document)
    assert links
    assert not [link for link in links if "#L" in link or "://" in link]
    assert not re.search(r"\w\.py(?:#L|:)\d", proven.document)
    absent = [link for link in links if not (proven.run.directory / link).exists()]
    assert not absent


def test_the_recorded_commit_is_in_the_repository(proven: Proven) -> None:
    """Contradiction 5, as far as this checkout can tell."""
    commit = proven.training.provenance.commit
    if commit is None:
        assert proven.training.provenance.tree_at_start.state == "no git"
        return
    found = subprocess.run(["git", "cat-file", "-t", commit], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "commit"
    assert f"git checkout --force --detach {commit}" in proven.document


def test_every_stage_leaves_its_lines_in_the_journal(proven: Proven) -> None:
    """Contradiction 21."""
    assert [(line["run"], line["stage"], line["event"]) for line in proven.journal] == [
        ("runs/proven", stage, event) for stage in ("train", "evaluate") for event in ("started", "ended")
    ]
    assert proven.journal[1]["config_sha256"] == proven.training.config_sha256
    assert proven.journal[3]["top1_accuracy"] == proven.evaluation.correct_top1 / proven.evaluation.images


@pytest.mark.filterwarnings("ignore:overflow")
def test_an_attempt_that_failed_stays_in_the_journal(smoke: Words, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        loop.train(compose_config(*smoke("optimization.learning_rate=1e30", "optimization.warmup_epochs=0")))
    (line,) = (tmp_path / "runs" / "journal.jsonl").read_text().splitlines()
    assert (json.loads(line)["stage"], json.loads(line)["event"]) == ("train", "started")


@pytest.mark.process
def test_preprocessing_leaves_its_lines_in_the_journal(data_directory: Path, tmp_path: Path) -> None:
    words = ["experiment=smoke", *SMALL_DEMO, f"data.directory={data_directory}", "run_dir=x"]
    subprocess.run(
        [sys.executable, str(CHECKOUT / "preprocess.py"), *words], cwd=tmp_path, check=True, capture_output=True
    )
    lines = [json.loads(line) for line in (tmp_path / "runs" / "journal.jsonl").read_text().splitlines()]
    assert [(line["run"], line["stage"], line["event"]) for line in lines] == [
        ("x", "preprocess", "started"),
        ("x", "preprocess", "ended"),
    ]


def test_every_recorded_number_of_cores_and_threads_is_the_live_one(proven: Proven) -> None:
    """T42."""
    assert proven.training.provenance.hardware.cores == len(os.sched_getaffinity(0))
    assert proven.training.precision["cpu_threads_per_process"] == 1
    assert proven.training.loader.threads_per_process >= 1
    assert "threads a process" in proven.block("optimization_methods")


def test_an_expectation_without_a_source_is_marked_so(proven: Proven) -> None:
    """Contradiction 15: "below published" is not to be read without a reference, or the word unknown in its place."""
    (row,) = re.findall(r"^\| \*\*Expected\*\* \|.*$", proven.block("summary"), re.MULTILINE)
    said = proven.config.description
    for value in (said.expected_accuracy, said.expected_source):
        assert not value
    assert row.count("*unknown*") >= 2
    assert "*declared*" not in row
