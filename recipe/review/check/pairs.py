"""The table of pairs: two places of a recipe that state one fact.

A function of `TABLE` gives the pairs of the records that its parameters name, and is left out where one of them is
absent. Counts are compared exactly, rounded seconds and sums in floating point within the tolerance of their pair.
A configuration is compared by what its settings look like when they are live: a setting that was accepted and ignored
is found on the run that it made.
"""

from __future__ import annotations

import inspect
import math
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import Any

import yaml

from recipe.config.identity import differences, flatten, recipe_id, sha256_of, to_dict
from recipe.config.schema import (
    AutoAugmentPolicy,
    Config,
    EmaForm,
    LossKind,
    OptimizerKind,
    Precision,
    ScheduleKind,
    config_from_pinned,
)
from recipe.data.images import GREY
from recipe.data.manifest import data_settings
from recipe.document.run_data import MetricRow, RunData
from recipe.errors import UserError
from recipe.preprocessing.imagenet import PUBLISHED_MD5
from recipe.review.findings import Finding, Kind, Level, shorten
from recipe.run.metric_rows import EPOCH_FIELDS
from recipe.run.records import (
    FLIPS_MAX,
    MISTAKES_MAX,
    PAIRS_MAX,
    ClassCounts,
    EnergyRecord,
    EvaluationRecord,
    InferenceRecord,
    JournalRecord,
    PreprocessingRecord,
    Protocol,
    Provenance,
    PublicationRecord,
    ReproductionRecord,
    SeedsRecord,
    SerializationRecord,
    TimingRecord,
    TrainingRecord,
)

MEND = "take the record from version control, or run its stage again"
MILLISECOND = 0.0011  # seconds are rounded to one
EPOCHS_MAX = 10_000  # whose sizes are computed
SHOWN_MAX = 8  # contradictions of one function
PLAIN_VALUE = re.compile(r"[\w.+-]+|\[[\w.,+ -]*\]")
SHARD = re.compile(r"(.+)-\d+\.tar")


@dataclass(frozen=True)
class Pair:
    """One fact in two places."""

    place: str  # record and field
    value: Any
    other: str
    expected: Any
    within: float = 0.0  # tolerated difference of numbers
    is_bound: bool = False  # `value` may be at most `expected`

    @property
    def agrees(self) -> bool:
        if self.is_bound:
            return bool(self.value <= self.expected + self.within)
        return is_same(self.value, self.expected, self.within)

    def finding(self) -> Finding:
        relation = "more than" if self.is_bound else "but"
        what = f"it is {_shown(self.value)}, {relation} {self.other}: {_shown(self.expected)}"
        place = self.place if self.place.startswith("metrics.jsonl") else f"records/{self.place}"
        return Finding(Level.resolvable, place, what, MEND)


def is_same(value: Any, expected: Any, within: float = 0.0) -> bool:
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return abs(value - expected) <= within
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(is_same(*both, within) for both in zip(value, expected, strict=True))
    return bool(value == expected)


def _shown(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:,}" if is_number else "absent" if value is None else shorten(value)


def pair_findings(facts: RunData) -> Iterator[Finding]:
    """Pairs that do not agree. A function whose records cannot be compared at all is a finding too."""
    sources: dict[str, Any] = {name: getattr(facts, name) for name in RunData.__dataclass_fields__} | {"facts": facts}
    if facts.config is not None:
        try:
            sources["config"] = config_from_pinned(facts.config)
        except UserError as error:
            sources["config"] = None
            what = f"it does not fit this version of the code, and no setting was compared with it: {error}"
            yield Finding(Level.resolvable, "config.yaml", what, "check with the code of the recipe", Kind.cannot_tell)
    if facts.training and facts.evaluation and validated_epoch(facts.evaluation, facts.training) is None:
        what = f"no validation of the training is by {facts.evaluation.protocol.name} after that epoch: not compared"
        yield Finding(Level.resolvable, "records/evaluation.json", what, kind=Kind.cannot_tell)
    for pairs_of in TABLE:
        arguments = [sources[name] for name in inspect.signature(pairs_of).parameters]
        if any(argument is None for argument in arguments):
            continue
        try:
            wrong = [pair.finding() for pair in pairs_of(*arguments) if not pair.agrees]
            yield from wrong[:SHOWN_MAX]
            if len(wrong) > SHOWN_MAX:
                what = f"{len(wrong) - SHOWN_MAX:,} more values contradict each other"
                yield Finding(Level.resolvable, wrong[-1].place, what, MEND)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            place = f"records, {pairs_of.__name__.strip('_').replace('_', ' ')}"
            what = f"they have a value that no run records, and were not compared: {shorten(error)}"
            yield Finding(Level.resolvable, place, what, MEND)


def _settings(place: str, live: Mapping[str, Any], expected: Mapping[str, Any], within: float = 0.0) -> Iterator[Pair]:
    for key, value in expected.items():
        yield Pair(f"{place}.{key}", live.get(key), "config.yaml asks for", value, within)


# ---- data -------------------------------------------------------------------------------------------


def _data(preprocessing: PreprocessingRecord) -> Iterator[Pair]:
    here, data = "preprocessing.json", preprocessing
    shards = Counter(found[1] for name in data.outputs if (found := SHARD.fullmatch(name)))
    for name, split in data.splits.items():
        field, counts = f"{here}, splits.{name}", [count for count in split.images_per_class if count > 0]
        yield Pair(f"{field}.classes", split.classes, "class_count", data.class_count, is_bound=True)
        most = split.classes * split.images_per_class_max
        yield Pair(f"{field}.images", split.images, "classes x images_per_class_max", most, is_bound=True)
        least = split.classes * split.images_per_class_min
        yield Pair(f"{field}.images_per_class_min x classes", least, "images", split.images, is_bound=True)
        if counts:
            yield Pair(f"{field}.images", split.images, "the sum of images_per_class", sum(counts))
            yield Pair(f"{field}.images_per_class_min", split.images_per_class_min, "of images_per_class", min(counts))
            yield Pair(f"{field}.images_per_class_max", split.images_per_class_max, "of images_per_class", max(counts))
            yield Pair(f"{field}.classes", split.classes, "classes with images", len(counts))
        for axis in ("width", "height"):
            pixels = getattr(split, f"{axis}_percentiles")
            yield Pair(f"{field}.{axis}_percentiles", pixels, "in order", sorted(pixels))
        yield Pair(f"{field}.grey_images", split.grey_images, "images", split.images, is_bound=True)
        if shards:
            yield Pair(f"{field}.shards", split.shards, "shards of the outputs", shards[name])
        if f"raw/{name}" in data.inputs:
            yield Pair(f"{field}.raw_sha256", split.raw_sha256, "inputs", data.inputs[f"raw/{name}"])
    for archive in data.archives:
        if archive.name in data.inputs:
            yield Pair(f"{here}, archives, {archive.name}", archive.sha256, "inputs", data.inputs[archive.name])
        if archive.is_published_md5 and archive.name in PUBLISHED_MD5:
            published = PUBLISHED_MD5[archive.name]
            yield Pair(f"{here}, archives, {archive.name}, md5", archive.md5, "published was", published)
    grey = sum(split.grey_images for split in data.splits.values())
    yield Pair(f"{here}, unusual_images.{GREY}", data.unusual_images.get(GREY, 0), "grey_images of the splits", grey)


def _data_and_configuration(preprocessing: PreprocessingRecord, config: Config) -> Iterator[Pair]:
    here = "preprocessing.json"
    yield Pair(f"{here}, data_set", preprocessing.data_set, "data.name of config.yaml", config.data.name)
    expected = config.data.expect.value
    yield Pair(f"{here}, expectation", preprocessing.expectation, "data.expect of config.yaml", expected)
    is_checked = expected == "ilsvrc2012" and not preprocessing.rejected
    yield Pair(f"{here}, is_ilsvrc2012", preprocessing.is_ilsvrc2012, "data.expect of config.yaml", is_checked)
    digest = sha256_of(data_settings(config.data))
    yield Pair(f"{here}, config_sha256", preprocessing.config_sha256, "the data settings of config.yaml", digest)


def _data_and_training(preprocessing: PreprocessingRecord, training: TrainingRecord) -> Iterator[Pair]:
    loader, train = training.loader, preprocessing.splits.get("train")
    classes = preprocessing.class_count
    yield Pair("training.json, model.classes", training.model.classes, "class_count of the data", classes)
    if train is not None:
        seen = loader.unique_images_per_epoch + loader.images_left_out_per_epoch
        place = "training.json, loader.unique_images_per_epoch + images_left_out_per_epoch"
        yield Pair(place, seen, "the training images of the data", train.images)
        last = max(loader.first_indices, default=0) + 1
        yield Pair("training.json, loader.first_indices", last, "the training images", train.images, is_bound=True)


# ---- training ---------------------------------------------------------------------------------------


def _training(training: TrainingRecord) -> Iterator[Pair]:
    here, schedule, loader, epochs = "training.json", training.schedule, training.loader, training.epochs
    groups = sum(group.parameters for group in training.parameter_groups)
    yield Pair(f"{here}, parameter_groups", groups, "model.parameters", training.model.parameters)
    names = [group.name for group in training.parameter_groups]
    yield Pair(f"{here}, parameter_groups, names", names, "each once", list(dict.fromkeys(names)))
    steps = f"{len(epochs)} epochs of {schedule.steps_per_epoch} steps"
    yield Pair(f"{here}, schedule.steps", schedule.steps, steps, len(epochs) * schedule.steps_per_epoch)
    batches = f"{schedule.steps:,} steps of {loader.global_batch_size:,} images"
    yield Pair(f"{here}, images_seen", training.images_seen, batches, schedule.steps * loader.global_batch_size)
    images = schedule.steps_per_epoch * loader.global_batch_size
    yield Pair(f"{here}, loader.images_per_epoch", loader.images_per_epoch, "steps_per_epoch x batch", images)
    batch = training.processes * loader.images_per_forward * loader.accumulation_steps
    parts = "processes x images_per_forward x accumulation_steps"
    yield Pair(f"{here}, loader.global_batch_size", loader.global_batch_size, parts, batch)
    normed = loader.batch_norm_batch_size
    yield Pair(f"{here}, loader.batch_norm_batch_size", normed, "images_per_forward", loader.images_per_forward)
    initial = training.model.initial_weights_sha256
    stated = training.inputs.get("initial weights", initial)
    yield Pair(f"{here}, model.initial_weights_sha256", initial, "inputs", stated)
    yield Pair(f"{here}, backend", training.backend == "none" and training.processes > 1, "several processes", False)
    if epochs:
        yield Pair(f"{here}, epochs", [epoch.epoch for epoch in epochs], "counted", list(range(1, len(epochs) + 1)))
        best = max(epochs, key=lambda epoch: epoch.validation_top1).epoch
        yield Pair(f"{here}, best_epoch", training.best_epoch, "the first with the best validation_top1", best)
    for name, part in (("training_seconds", "seconds"), ("validation_seconds", "validation_seconds")):
        total = sum(getattr(epoch, part) for epoch in epochs)
        sums = f"the sum of {part} over the epochs"
        yield Pair(f"{here}, {name}", getattr(training, name), sums, round(total, 3), MILLISECOND * (len(epochs) + 1))
    for epoch in epochs:
        place, rate = f"{here}, epochs, {epoch.epoch}", epoch.images_per_second
        seconds = loader.images_per_epoch / rate if rate else 0.0
        yield Pair(
            f"{place}, seconds",
            epoch.seconds,
            "images / images_per_second",
            seconds,
            0.002 + 0.006 * seconds / (rate or 1),
        )
        yield Pair(f"{place}, validation_top1", epoch.validation_top1, "top5", epoch.validation_top5, is_bound=True)
        yield Pair(f"{place}, data_wait_fraction", epoch.data_wait_fraction, "all of it", 1.0, is_bound=True)
    yield from _sessions(training)


def _sessions(training: TrainingRecord) -> Iterator[Pair]:
    """The last session trained on the recorded machine. Of one session, the stage took at least its time."""
    here, sessions, context, provenance = (
        "training.json",
        training.sessions,
        training.determinism_context,
        training.provenance,
    )
    firsts = [session.first_step for session in sessions]
    yield Pair(f"{here}, sessions, first_step", firsts, "in order", sorted(firsts))
    if sessions:
        last = sessions[-1]
        yield Pair(f"{here}, processes", training.processes, "of the last session", last.processes)
        normed = last.batch_norm_batch_size
        yield Pair(f"{here}, loader.batch_norm_batch_size", training.loader.batch_norm_batch_size, "sessions", normed)
    if len(sessions) == 1:
        seconds = training.training_seconds + training.validation_seconds
        place = f"{here}, training_seconds + validation_seconds"
        yield Pair(place, round(seconds, 3), "the seconds of the stage", provenance.seconds, MILLISECOND, is_bound=True)
    if not context:
        return
    source, device = provenance.source_sha256[:16], provenance.hardware.accelerator or "cpu"
    expected = {
        "the device": device,
        "the processor": provenance.hardware.processor,
        "the number of processes": training.processes,
        "images per forward pass": training.loader.images_per_forward,
        "CPU threads": training.precision.get("cpu_threads_per_process"),
        "the source": source,
    } | {name: version for name, version in provenance.versions.items() if name in context}
    for key, value in expected.items():
        yield Pair(f"{here}, determinism_context, {key}", context.get(key), "provenance, loader and precision", value)
    if sessions:
        yield Pair(f"{here}, sessions, source", sessions[-1].source, "determinism_context", context.get("the source"))


def _rows(training: TrainingRecord, metrics: Sequence[MetricRow]) -> Iterator[Pair]:
    """Every row counts the images of its steps. Its rate is the recorded one where the schedule names its step."""
    rates, batch = dict(training.schedule.points), training.loader.global_batch_size
    for row in metrics:
        place = f"metrics.jsonl, step {row['step']}"
        yield Pair(f"{place}, images_seen", row["images_seen"], f"steps of {batch} images", row["step"] * batch)
        yield Pair(f"{place}, top1_accuracy", row["top1_accuracy"], "top-5", row["top5_accuracy"], is_bound=True)
        if row["step"] - 1 in rates:
            rate = rates[row["step"] - 1]
            yield Pair(f"{place}, learning_rate", row["learning_rate"], "schedule.points", rate, abs(rate) * 1e-9)
    seconds = [row["seconds"] for row in metrics]
    yield Pair("metrics.jsonl, seconds", seconds, "in order", sorted(seconds))
    last = max((row["step"] for row in metrics if row["split"] == "train"), default=training.schedule.steps)
    yield Pair("metrics.jsonl, step of the last train row", last, "of the training", training.schedule.steps)
    ends = {row["epoch"]: row for row in metrics if row["split"] == "validation"}
    for epoch in training.epochs:
        row = ends.get(epoch.epoch, {})
        for name, field in EPOCH_FIELDS.items() if row else ():
            place = f"training.json, epochs, {epoch.epoch}, {name}"
            yield Pair(place, getattr(epoch, name), "its validation row", row.get(field))
    if metrics and metrics[-1] in ends.values():
        total = round(training.training_seconds + training.validation_seconds, 3)
        place = "training.json, training_seconds + validation_seconds"
        yield Pair(place, total, "seconds of the last row", metrics[-1]["seconds"], 2 * MILLISECOND)


def _means(training: TrainingRecord, config: Config, metrics: Sequence[MetricRow]) -> Iterator[Pair]:
    """The means of an epoch are those of its train rows, where none was left out for publication."""
    steps, every = training.schedule.steps_per_epoch, config.trainer.log_every_steps
    rows_of: dict[int, list[MetricRow]] = {}
    for row in metrics:
        if row["split"] == "train":
            rows_of.setdefault(row["epoch"], []).append(row)
    for epoch in training.epochs:
        first, rows = (epoch.epoch - 1) * steps, rows_of.get(epoch.epoch, [])
        if len(rows) != -(-steps // every):
            continue
        ends = [*range(every, steps, every), steps]
        if [row["step"] - first for row in rows] != ends:
            continue
        counts = [end - begin for begin, end in pairwise([0, *ends])]
        for name, field in (("train_loss", "loss"), ("train_top1", "top1_accuracy"), ("train_top5", "top5_accuracy")):
            mean = sum(row[field] * count for row, count in zip(rows, counts, strict=True)) / steps
            place = f"training.json, epochs, {epoch.epoch}, {name}"
            yield Pair(place, getattr(epoch, name), f"the mean {field} of its rows", mean, 1e-5 * max(1.0, abs(mean)))
        for before, row, count in zip(rows, rows[1:], counts[1:], strict=False):
            rate = row["images_per_second"]
            took, images = row["seconds"] - before["seconds"], count * training.loader.global_batch_size
            within = 2 * MILLISECOND + 0.006 * images / (rate * rate or 1)
            place = f"metrics.jsonl, step {row['step']}, seconds since the row before"
            yield Pair(place, took, "images / images_per_second", images / (rate or 1), within)


def _identity(training: TrainingRecord, facts: RunData) -> Iterator[Pair]:
    if facts.config is not None:
        yield Pair("training.json, recipe_id", training.recipe_id, "that of config.yaml", recipe_id(facts.config))


def _live_settings(training: TrainingRecord, config: Config) -> Iterator[Pair]:
    """The live objects of training, beside the configuration."""
    here, wanted, trainer, loader = "training.json", config.optimization, config.trainer, config.loader
    yield from _settings(
        here,
        {name: getattr(training, name) for name in ("seed", "optimizer", "validation_protocol")}
        | {"epochs": len(training.epochs), "model": training.model.name},
        {
            "seed": config.seed,
            "optimizer": {"sgd": "SGD", "sgdw": "DecoupledSGD", "lamb": "Lamb"}[wanted.optimizer.value],
            "validation_protocol": view_of(config) + ("-average" if wanted.ema.decay else ""),
            "epochs": wanted.epochs,
            "model": config.model.name,
        },
    )
    for group in training.parameter_groups:
        yield from _settings(f"{here}, parameter_groups, {group.name}", group.settings, _live_group(group.name, config))
    yield from _settings(f"{here}, loss", training.loss, _live_loss(config))
    augmentation = _live_augmentation(config)
    yield from _settings(f"{here}, augmentation", training.augmentation, augmentation, 2e-6)
    more = [key for key in training.augmentation if key not in augmentation]
    yield Pair(f"{here}, augmentation", more, "config.yaml asks for no more", [])
    yield from _settings(f"{here}, averaging", training.averaging, _live_averaging(training, config), 1e-12)
    yield Pair(f"{here}, averaging", training.averaging.get("kind") == "none", "config.yaml", not wanted.ema.decay)
    arithmetic = {
        "forward_and_backward": trainer.precision.value,
        "weights": "float32",
        "channels_last": trainer.channels_last,
        "compiled": trainer.compile,
        "gradient_scaler": trainer.precision is Precision.fp16,
        "deterministic_algorithms": trainer.deterministic,
        "cudnn_benchmark": not trainer.deterministic,
    }
    yield from _settings(f"{here}, precision", training.precision, arithmetic)
    asked = {
        "global_batch_size": wanted.batch_size,
        "decoder": loader.decoder.value,
        "order": loader.order.value,
    }
    yield from _settings(f"{here}, loader", {key: getattr(training.loader, key) for key in asked}, asked)
    altered = training.model.alterations
    for key, is_on in (
        ("blurred_convolutions", config.model.blur_pool),
        ("drop_probability_of_each_block", config.model.stochastic_depth > 0),
    ):
        yield Pair(f"{here}, model.alterations.{key}", key in altered, "config.yaml", is_on)
    if wanted.bce.init_head_bias:
        bias = round(-math.log(training.model.classes), 6)
        found = altered.get("bias_of_the_last_layer")
        yield Pair(f"{here}, model.alterations.bias_of_the_last_layer", found, "-log(classes)", bias, 2e-6)
    if config.model.weights_sha256 is None:
        has_zeros = training.model.zero_initialised_norms > 0
        yield Pair(f"{here}, model.zero_initialised_norms", has_zeros, "config.yaml", config.model.zero_init_last_norm)
    given = "random" if config.model.weights_sha256 is None else "given"
    yield Pair(f"{here}, model.initial_weights", training.model.initial_weights, "config.yaml", given)


def _command(training: TrainingRecord, config: Config) -> Iterator[Pair]:
    """The settings of the recorded command, without facts of the machine and values that a multirun sweeps over."""
    pinned, command = flatten(config.pinned.values), training.provenance.command
    experiment = re.search(r"(?<= )experiment=([\w.-]+)", command)
    if experiment and " name=" not in command:
        yield Pair("training.json, provenance.command, experiment", experiment[1], "config.yaml", config.name)
    for word in shlex.split(command):
        key, _, written = word.partition("=")
        if key in pinned and not key.endswith("sha256") and ("," not in written or written.startswith("[")):
            value = yaml.safe_load(written) if PLAIN_VALUE.fullmatch(written) else pinned[key]
            value = float(value) if isinstance(pinned[key], float) and isinstance(value, str | int) else value
            yield Pair(f"training.json, provenance.command, {key}", value, "config.yaml", pinned[key], 1e-12)


def view_of(config: Config) -> str:
    """The name of the evaluation view that the configuration asks for."""
    asked = config.evaluation
    name = f"resize{asked.resize_pixels}-crop{asked.crop_pixels}-{asked.interpolation.value}"
    return name + ("-flip" if asked.flip else "")


def _live_group(name: str, config: Config) -> dict[str, Any]:
    asked = config.optimization
    decay = asked.weight_decay if name == "weights" or asked.decay_norms_and_biases else 0.0
    if asked.optimizer is OptimizerKind.lamb:
        return {"weight_decay": decay, "betas": [asked.momentum, 0.999], "eps": 1e-6, "max_grad_norm": 1.0}
    settings = {"momentum": asked.momentum, "nesterov": asked.nesterov, "dampening": 0, "maximize": False}
    if asked.optimizer is OptimizerKind.sgdw:
        rate = {"decoupled_weight_decay": decay, "full_learning_rate": asked.learning_rate}
        return settings | rate | {"weight_decay": 0.0}
    return settings | {"weight_decay": decay}


def _live_loss(config: Config) -> dict[str, Any]:
    asked = config.optimization
    if asked.loss is LossKind.cross_entropy:
        return {"class": "CrossEntropyLoss", "label_smoothing": asked.label_smoothing, "reduction": "mean"}
    return {
        "class": "BinaryCrossEntropy",
        "label_smoothing": asked.label_smoothing,
        "reduction": "sum over classes, mean over images" if asked.bce.sum_classes else "mean over images and classes",
        "target_threshold": asked.bce.target_threshold,
    }


def _live_augmentation(config: Config) -> dict[str, Any]:
    asked, mixup, erasing = config.augmentation, config.augmentation.mixup, config.augmentation.random_erasing
    policy = asked.auto_augment
    live: dict[str, Any] = {
        "random_resized_crop_pixels": _live_sizes(config),
        "scale": [asked.scale_min, asked.scale_max],
        "ratio": [asked.ratio_min, asked.ratio_max],
        "interpolation": asked.interpolation.value,
        "antialias": True,
        "horizontal_flip_probability": asked.flip_probability,
        "mean": config.data.mean,
        "std": config.data.std,
    }
    if policy.policy is AutoAugmentPolicy.trivial_augment:
        live["policy"] = "TrivialAugment, wide"
    if policy.policy is AutoAugmentPolicy.rand_augment:
        names = ("num_ops", "magnitude", "magnitude_std", "probability")
        live |= {"policy": "RandAugment"} | {f"policy_{name}": getattr(policy, name) for name in names}
    if asked.repeated_augmentation > 1:
        live["repeats_in_a_global_batch"] = asked.repeated_augmentation
    if erasing.probability:
        live |= {
            "erasing_probability": erasing.probability,
            "erasing_scale": [erasing.scale_min, erasing.scale_max],
            "erasing_ratio": [erasing.ratio_min, erasing.ratio_max],
        }
    if mixup.probability and (mixup.mixup_alpha or mixup.cutmix_alpha):
        live |= {name: getattr(mixup, name) for name in ("mixup_alpha", "cutmix_alpha", "switch_probability")}
        live |= {"mixing_probability": mixup.probability, "mixing_group_images": mixup.group_size}
    return live


def _live_sizes(config: Config) -> Any:
    """One size, or each size with its first epoch, counted from 1."""
    last, growth = config.augmentation.crop_pixels, config.augmentation.progressive_resizing
    sizes = []
    for epoch in range(min(config.optimization.epochs, EPOCHS_MAX)):
        size: float = last
        if growth.first_pixels is not None and epoch < growth.end_epoch:
            size = growth.first_pixels
            if epoch > growth.start_epoch:
                slope = (last - growth.first_pixels) / (growth.end_epoch - growth.start_epoch)
                size += slope * (epoch - growth.start_epoch)
            size = round(size / growth.multiple) * growth.multiple
        sizes.append(size)
    begins = [0, *(epoch for epoch in range(1, len(sizes)) if sizes[epoch] != sizes[epoch - 1])]
    return sizes[0] if len(begins) == 1 else [f"{sizes[epoch]} from epoch {epoch + 1}" for epoch in begins]


def _live_averaging(training: TrainingRecord, config: Config) -> dict[str, Any]:
    ema, asked = config.optimization.ema, config.optimization
    if not ema.decay:
        return {"kind": "none"}
    live: dict[str, Any] = {"every_steps": ema.every_steps}
    if ema.precise_bn_images:
        live["batch_norm_recalibrated_on_training_images"] = ema.precise_bn_images
    if ema.form is EmaForm.warmup:
        return live | {"decay": ema.decay, "updates": training.schedule.steps // ema.every_steps}
    rescaled = 1 - min(1.0, (1 - ema.decay) * asked.batch_size * ema.every_steps / asked.epochs)
    return live | {"decay": rescaled, "decay_before_rescaling": ema.decay}


def _schedule(training: TrainingRecord, config: Config, metrics: Sequence[MetricRow]) -> Iterator[Pair]:
    """The learning rate by its closed form: at the recorded points, in the rows and at the end of each epoch."""
    schedule, asked = training.schedule, config.optimization
    warmup = round(asked.warmup_epochs * schedule.steps_per_epoch)
    yield Pair("training.json, schedule.warmup_steps", schedule.warmup_steps, "optimization.warmup_epochs", warmup)
    stated = [(f"training.json, schedule.points, step {step}", step, rate) for step, rate in schedule.points]
    stated += [(f"metrics.jsonl, step {row['step']}", row["step"] - 1, row["learning_rate"]) for row in metrics]
    stated += [
        (f"training.json, epochs, {epoch.epoch}, rate", epoch.epoch * schedule.steps_per_epoch - 1, epoch.learning_rate)
        for epoch in training.epochs
    ]
    for place, step, rate in stated:
        expected = _rate_at(step, schedule.steps, schedule.steps_per_epoch, warmup, config)
        yield Pair(place, rate, "the schedule of config.yaml gives", expected, 1e-9 * asked.learning_rate)


def _rate_at(step: int, steps: int, steps_per_epoch: int, warmup: int, config: Config) -> float:
    asked, peak = config.optimization, config.optimization.learning_rate
    if step < warmup:
        return peak * (asked.warmup_start_factor + (1 - asked.warmup_start_factor) * step / warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    if asked.schedule is ScheduleKind.step:
        return peak * asked.step_factor ** sum(step >= epoch * steps_per_epoch for epoch in asked.step_epochs)
    return peak * (1 - progress if asked.schedule is ScheduleKind.linear else (1 + math.cos(math.pi * progress)) / 2)


# ---- evaluation -------------------------------------------------------------------------------------


def _evaluations(facts: RunData) -> Iterator[Pair]:
    for record in (facts.evaluation, *facts.other_evaluations):
        if record is not None:
            yield from _evaluation(record, record is facts.evaluation)


def _evaluation(record: EvaluationRecord, is_own: bool) -> Iterator[Pair]:
    here = "evaluation.json" if is_own else f"evaluations/{record.protocol.name}.json"
    for name in ("images", "correct_top1", "correct_top5"):
        total = sum(getattr(row, name) for row in record.per_class)
        yield Pair(f"{here}, {name}", getattr(record, name), f"the sum of {name} over per_class", total)
    counted: list[tuple[str, EvaluationRecord | ClassCounts]] = [("", record)]
    for field, row in [*counted, *((f"per_class.{row.index}.", row) for row in record.per_class)]:
        yield Pair(f"{here}, {field}correct_top1", row.correct_top1, "correct_top5", row.correct_top5, is_bound=True)
        yield Pair(f"{here}, {field}correct_top5", row.correct_top5, "images", row.images, is_bound=True)
    indices = [row.index for row in record.per_class]
    yield Pair(f"{here}, per_class, index", indices, "counted", list(range(len(indices))))
    seconds = record.images / record.images_per_second if record.images_per_second else 0.0
    within = 0.002 + 0.006 * seconds / (record.images_per_second or 1)
    yield Pair(f"{here}, evaluation_seconds", record.evaluation_seconds, "images / images_per_second", seconds, within)
    most = record.provenance.seconds
    yield Pair(f"{here}, evaluation_seconds", record.evaluation_seconds, "the stage", most, MILLISECOND, is_bound=True)
    yield Pair(f"{here}, runs", record.runs, "evaluations of a record", 1)
    yield from _protocol(here, record.protocol)
    yield from _mistakes(here, record)


def _protocol(here: str, protocol: Protocol) -> Iterator[Pair]:
    """The name of a protocol says its view."""
    pixels = protocol.transform
    name = f"resize{pixels.get('resize_short_side_pixels')}-crop{pixels.get('center_crop_pixels')}"
    name += f"-{pixels.get('interpolation')}" + ("-flip" if "views" in pixels else "")
    shown = protocol.name[: len(name)]
    yield Pair(f"{here}, protocol.name", shown, "its transform", name)
    is_flipped = protocol.name.removeprefix(name).startswith("-flip")
    yield Pair(f"{here}, protocol.name, flip", is_flipped, "its transform", False)
    completed = protocol.epochs_completed
    yield Pair(f"{here}, protocol.epochs_completed", completed, "epochs", protocol.epochs, is_bound=True)


def _mistakes(here: str, record: EvaluationRecord) -> Iterator[Pair]:
    """The lists of mistakes, beside the counts of the classes. Names can be of two classes. Older records have none."""
    wrong, names = Counter[str](), Counter(row.name for row in record.per_class)
    for row in record.per_class:
        wrong[row.name] += row.images - row.correct_top1
    total, pairs, shown = record.images - record.correct_top1, record.confused_pairs, record.mistakes
    named = {name for pair in pairs for name in (pair.label, pair.predicted)}
    named |= {name for one in shown for name in (one.label, one.predicted)}
    yield Pair(f"{here}, confused_pairs and mistakes, names", sorted(named - set(names)), "not in per_class", [])
    counts = [pair.images for pair in pairs]
    yield Pair(f"{here}, confused_pairs", counts, "the most frequent first", sorted(counts, reverse=True))
    field = f"{here}, confused_pairs, images"
    yield Pair(field, sum(counts), "images that are wrong", total, is_bound=True)
    if 0 < len(pairs) < PAIRS_MAX:
        yield Pair(field, sum(counts), "images that are wrong", total)
        listed = {(pair.label, pair.predicted) for pair in pairs}
        unlisted = sorted(
            {f"{one.label} taken for {one.predicted}" for one in shown if (one.label, one.predicted) not in listed}
        )
        yield Pair(f"{here}, mistakes", unlisted, "not in confused_pairs", [])
    of_labels = Counter[str]()
    for pair in pairs:
        of_labels[pair.label] += pair.images
    for label, of_label in of_labels.items():
        place = f"{field} of {shorten(label)}"
        yield Pair(place, of_label, "wrong images of the class", wrong[label], is_bound=True)
    margins = [one.margin for one in shown]
    yield Pair(f"{here}, mistakes, margins", margins, "the largest first", sorted(margins, reverse=True))
    if shown:
        yield Pair(f"{here}, mistakes", len(shown), "of the wrong images", min(MISTAKES_MAX, total))
    same = [one.key for one in shown if one.label == one.predicted and names[one.label] == 1]
    yield Pair(f"{here}, mistakes, taken for their own class", same, "none", [])


def _evaluation_and_data(evaluation: EvaluationRecord, preprocessing: PreprocessingRecord) -> Iterator[Pair]:
    here, rows = "evaluation.json", evaluation.per_class
    yield Pair(f"{here}, per_class", len(rows), "class_count of the data", preprocessing.class_count)
    digest = sha256("\n".join(row.class_id for row in rows).encode()).hexdigest()
    yield Pair(f"{here}, per_class, class_id", digest, "class_list_sha256 of the data", preprocessing.class_list_sha256)
    split = preprocessing.splits.get("val") or preprocessing.splits.get("validation")
    if split:
        yield Pair(f"{here}, images", evaluation.images, "the validation images of the data", split.images)
        if split.images_per_class:
            counts = [row.images for row in rows]
            counted = [*split.images_per_class, *[0] * (len(counts) - len(split.images_per_class))]
            yield Pair(f"{here}, per_class, images", counts, "images_per_class of the data", counted)
    yield from _named_classes("preprocessing.json, label_examples", preprocessing.label_examples, evaluation)


def _named_classes(place: str, classes: Iterable[Any], evaluation: EvaluationRecord) -> Iterator[Pair]:
    """A class by its index, ID and name is that of the evaluation."""
    known = {row.index: [row.class_id, row.name] for row in evaluation.per_class}
    for one in classes:
        yield Pair(f"{place}, class {one.index}", [one.class_id, one.name], "per_class", known.get(one.index))


def _evaluation_and_configuration(evaluation: EvaluationRecord, config: Config) -> Iterator[Pair]:
    """`evaluate.py` may change its own group, which the protocol's name and the command show."""
    here, protocol = "evaluation.json, protocol", evaluation.protocol
    live = {"mean": config.data.mean, "std": config.data.std, "antialias": True}
    yield from _settings(f"{here}.transform", protocol.transform, live, 2e-6)
    own: dict[str, Any] = {
        "decoder": config.loader.decoder.value,
        "precision": config.trainer.precision.value,
        "epochs": config.optimization.epochs,
        "weights": "moving average" if config.optimization.ema.decay else "as trained",
    }
    if "evaluation.batch_size" not in evaluation.provenance.command:
        own["batch_size"] = config.evaluation.batch_size
    if "evaluation." not in evaluation.provenance.command and "evaluation=" not in evaluation.provenance.command:
        average = "-average" if config.optimization.ema.decay else ""
        chosen = "" if config.evaluation.checkpoint == "last" else f"-{config.evaluation.checkpoint}"
        own["name"] = view_of(config) + average + chosen
    yield from _settings(here, {key: getattr(protocol, key) for key in own}, own)
    switches = {
        "deterministic_algorithms": config.trainer.deterministic,
        "cudnn_benchmark": not config.trainer.deterministic,
    }
    yield from _settings(f"{here}.arithmetic", protocol.arithmetic, switches)


def _evaluation_and_training(evaluation: EvaluationRecord, training: TrainingRecord) -> Iterator[Pair]:
    """The evaluation, and the validation of the same weights by the same protocol while they were trained.

    Equal where arithmetic and machine are. Otherwise the last digits of logits decide a few images.
    """
    here, protocol = "evaluation.json", evaluation.protocol
    epoch = validated_epoch(evaluation, training)
    if epoch is None:
        return
    within = 0.0 if _is_same_machine(evaluation, training) else 2 + evaluation.images / 1000
    for name, share in (("correct_top1", epoch.validation_top1), ("correct_top5", epoch.validation_top5)):
        counted, validated = getattr(evaluation, name), round(share * evaluation.images)
        other = f"{protocol.name} after epoch {epoch.epoch} in training.json"
        yield Pair(f"{here}, {name}", counted, other, validated, within)
    loss = epoch.validation_loss
    yield Pair(f"{here}, loss", evaluation.loss, "validation_loss", loss, (0.02 if within else 1e-6) * abs(loss))
    if epoch is training.epochs[-1]:
        weights = evaluation.inputs.get("weights")
        yield Pair(f"{here}, inputs.weights", weights, "training left", training.outputs.get("weights"))


def validated_epoch(evaluation: EvaluationRecord, training: TrainingRecord) -> Any:
    """The epoch whose validation measured the evaluated weights by the same protocol. None if there is none."""
    protocol, completed = evaluation.protocol, evaluation.protocol.epochs_completed
    if not 1 <= completed <= len(training.epochs):
        return None
    checkpoint = f"step-{completed * training.schedule.steps_per_epoch:08d}"
    names = {training.validation_protocol + ending for ending in ("", "-best", f"-{checkpoint}")}
    is_same_view = protocol.name in names and protocol.checkpoint == f"{checkpoint}.pt"
    return training.epochs[completed - 1] if is_same_view else None


def _is_same_machine(evaluation: EvaluationRecord, training: TrainingRecord) -> bool:
    one, other = evaluation.provenance, training.provenance
    switches = evaluation.protocol.arithmetic
    return (
        bool(training.precision.get("deterministic_algorithms"))
        and not training.precision.get("compiled")
        and all(training.precision.get(name) == value for name, value in switches.items())
        and "evaluation.batch_size" not in one.command
        and one.hardware.processor == other.hardware.processor
        and one.hardware.accelerator == other.hardware.accelerator
        and one.versions == other.versions
        and one.environment == other.environment
    )


# ---- exports, pictures and latencies ----------------------------------------------------------------


def _exports(serialization: SerializationRecord) -> Iterator[Pair]:
    here, record, settings = "serialization.json", serialization, serialization.settings
    variants = [entry.variant for entry in record.variants]
    yield Pair(f"{here}, variants", variants, "settings.variants", settings.get("variants"))
    for entry in record.variants:
        field = f"{here}, variants.{entry.variant}"
        yield Pair(f"{field}.correct_top1", entry.correct_top1, "correct_top5", entry.correct_top5, is_bound=True)
        yield Pair(f"{field}.correct_top5", entry.correct_top5, "images", record.images, is_bound=True)
        moved = abs(entry.correct_top1 - record.eager_correct_top1)
        changed = "images that change their class"
        yield Pair(f"{field}.correct_top1 less eager_correct_top1", moved, changed, entry.flips, is_bound=True)
        yield Pair(f"{field}.sha256", entry.sha256, "outputs", record.outputs.get(entry.file))
        yield Pair(f"{field}.flip_examples", len(entry.flip_examples), "flips", min(entry.flips, FLIPS_MAX))
        margins = [flip.eager_margin for flip in entry.flip_examples]
        yield Pair(f"{field}.flip_examples", margins, "the largest first", sorted(margins, reverse=True))
        same = [flip.key for flip in entry.flip_examples if flip.eager_class == flip.exported_class]
        yield Pair(f"{field}.flip_examples, not flipped", same, "none", [])
        if entry.variant == "fp32":
            limit = settings["fp32_tolerance"]
            yield Pair(f"{field}.relative_logit_error", entry.relative_logit_error, "settings", limit, is_bound=True)
            yield Pair(f"{field}.limit", entry.limit, "settings", f"logits within {limit:g} of the largest one")
        else:
            limit, drop = settings[f"{entry.variant}_accuracy_drop_max"], record.eager_correct_top1 - entry.correct_top1
            yield Pair(f"{field}.correct_top1", drop / record.images, "the drop of settings", limit, is_bound=True)
            yield Pair(f"{field}.limit", entry.limit, "settings", f"top-1 at most {limit:.2%} below the eager model's")
        if "calibration_training_images" in entry.conversion:
            images, asked = entry.conversion["calibration_training_images"], settings.get("int8_calibration_images")
            yield Pair(f"{field}.conversion", images, "settings", asked, is_bound=True)  # fewer where there are fewer


def _exports_and_configuration(serialization: SerializationRecord, config: Config) -> Iterator[Pair]:
    command = serialization.provenance.command
    if "serialization." not in command and "serialization=" not in command:
        yield from _settings("serialization.json, settings", serialization.settings, to_dict(config.serialization))


def _exports_and_evaluation(
    serialization: SerializationRecord, evaluation: EvaluationRecord, facts: RunData
) -> Iterator[Pair]:
    """The PyTorch model of the comparison is the evaluated one, in fp32 on the CPU: a few images may differ."""
    here, record, protocol = "serialization.json", serialization, evaluation.protocol
    if record.inputs.get("weights") != evaluation.inputs.get("weights") or record.protocol != protocol.name:
        return  # the section is stale
    yield Pair(f"{here}, images", record.images, "images of the evaluation", evaluation.images)
    yield Pair(f"{here}, checkpoint", record.checkpoint, "of the evaluation", protocol.checkpoint)
    counted = record.evaluated_correct_top1
    yield Pair(f"{here}, evaluated_correct_top1", counted, "of the evaluation", evaluation.correct_top1)
    within = 2 + evaluation.images / (1000 if protocol.precision == "fp32" else 200)
    for name in ("correct_top1", "correct_top5"):
        counted = getattr(record, f"eager_{name}")
        yield Pair(f"{here}, eager_{name}", counted, f"{name} of the evaluation", getattr(evaluation, name), within)
    for entry in record.variants:
        for other in facts.other_evaluations:
            if other.protocol.name == f"{record.protocol}-onnx-{entry.variant}":
                place, top1 = f"{here}, variants.{entry.variant}.correct_top1", entry.correct_top1
                yield Pair(place, top1, f"evaluations/{other.protocol.name}.json", other.correct_top1, within)
    pixels = str(protocol.transform.get("center_crop_pixels"))
    yield Pair(f"{here}, input_shape", record.input_shape[2:], "the crop of the evaluation", [pixels, pixels])
    classes = {row.index: row for row in evaluation.per_class}
    for entry in record.variants:
        for flip in entry.flip_examples:
            named = {flip.label, flip.eager_class, flip.exported_class}
            place = f"{here}, variants.{entry.variant}.flip_examples, {shorten(flip.key)}"
            yield Pair(place, sorted(named - set(classes)), "classes that are not", [])


def _pictures(inference: InferenceRecord, evaluation: EvaluationRecord) -> Iterator[Pair]:
    here = "inference.json"
    yield Pair(f"{here}, class_count", inference.class_count, "classes of the evaluation", len(evaluation.per_class))
    names = {row.name for row in evaluation.per_class}
    for found in inference.pictures:
        place = f"{here}, {shorten(found.picture)}"
        yield Pair(f"{place}, label", found.label is None or found.label in names, "a class of the evaluation", True)
        for file, guesses in found.guesses.items():
            yield from _named_classes(f"{place}, {shorten(file)}", guesses, evaluation)
            shares = [guess.probability for guess in guesses]
            yield Pair(f"{place}, {shorten(file)}", shares, "the best first", sorted(shares, reverse=True))
            yield Pair(f"{place}, {shorten(file)}", sum(shares), "probabilities up to", 1.0, 1e-5, is_bound=True)


def _pictures_and_data(inference: InferenceRecord, preprocessing: PreprocessingRecord) -> Iterator[Pair]:
    convention = preprocessing.label_convention
    yield Pair("inference.json, label_convention", inference.label_convention, "of the data", convention)


def _latencies(timing: Sequence[TimingRecord]) -> Iterator[Pair]:
    for record in timing:
        here = f"timing/{record.machine}.json"
        for cell in record.cells:
            field = f"{here}, {cell.backend}, {cell.precision}, {cell.what}, batch {cell.batch_size}"
            percentiles = [cell.p50_milliseconds, cell.p90_milliseconds, cell.p99_milliseconds]
            for low, high in pairwise([value for value in percentiles if value is not None]):
                yield Pair(field, low, "a higher percentile", high, is_bound=True)
            quantiles = cell.histogram_milliseconds
            yield Pair(f"{field}, histogram", quantiles, "in order", sorted(quantiles))
            if quantiles:
                median, middle = cell.p50_milliseconds, quantiles[len(quantiles) // 2]
                if median is not None:
                    yield Pair(f"{field}, p50", median, "the middle of its histogram", middle, 2e-4)
                rate = 1000 * cell.batch_size / middle if middle else 0.0
                yield Pair(
                    f"{field}, images_per_second", cell.images_per_second, "batch / median", rate, 0.02 + rate / 500
                )
        if record.cells:
            noise = statistics.median(cell.noise for cell in record.cells)
            yield Pair(f"{here}, noise_floor", record.noise_floor, "the median of the noise", noise, 1e-4)


def _latencies_and_evaluation(timing: Sequence[TimingRecord], evaluation: EvaluationRecord) -> Iterator[Pair]:
    pixels = evaluation.protocol.transform.get("center_crop_pixels")
    for record in timing:
        yield Pair(f"timing/{record.machine}.json, crop_pixels", record.crop_pixels, "of the evaluation", pixels)


# ---- where it ran, and other records ----------------------------------------------------------------


def _machines(facts: RunData) -> Iterator[Pair]:
    """Hardware and versions of each stage that cannot go together."""
    for name, record in facts.stages():
        yield from _machine(f"{name}.json, provenance", record.provenance)


def _machine(here: str, provenance: Provenance) -> Iterator[Pair]:
    hardware, versions = provenance.hardware, provenance.versions
    has_device = hardware.accelerator is not None
    yield Pair(f"{here}, hardware.accelerators", hardware.accelerators > 0, "accelerator", has_device)
    if not has_device:
        yield Pair(f"{here}, versions.cudnn", versions.get("cudnn"), "without an accelerator", None)
        yield Pair(f"{here}, hardware.compute_capability", hardware.compute_capability, "without one", None)
    build = re.search(r"\+cu(\d+)", versions.get("torch", ""))
    if build and "cuda" in versions:
        yield Pair(f"{here}, versions.cuda", versions["cuda"].replace(".", ""), "the build of torch", build[1])


def _energy(energy: EnergyRecord, training: TrainingRecord) -> Iterator[Pair]:
    used = training.provenance.hardware.accelerators
    yield Pair("energy.json, accelerators", energy.accelerators, "of the training", used)
    most = training.provenance.seconds
    yield Pair("energy.json, seconds", energy.seconds, "the seconds of the stage", most, MILLISECOND, is_bound=True)


def _journal(journal: JournalRecord, facts: RunData) -> Iterator[Pair]:
    """The entry of a stage of this run, by the second in which it began."""
    results: dict[tuple[str, str], tuple[str, float]] = {}
    if facts.training is not None and facts.training.epochs:
        began = facts.training.provenance.started
        results["train", began] = ("training.json", facts.training.epochs[-1].validation_top1)
    if facts.evaluation is not None:
        share = facts.evaluation.correct_top1 / facts.evaluation.images
        results["evaluate", facts.evaluation.provenance.started] = ("evaluation.json", share)
    for entry in journal.entries:
        known = results.get((entry.stage, entry.time))
        if known and entry.run == journal.run_dir and entry.top1_accuracy is not None:
            yield Pair(f"journal.json, {entry.time}, top1_accuracy", entry.top1_accuracy, *known, within=1e-9)


def _publication(publication: PublicationRecord, metrics: Sequence[MetricRow]) -> Iterator[Pair]:
    kept = publication.metric_rows_kept
    if metrics:
        yield Pair("publication.json, metric_rows_kept", kept, "rows of metrics.jsonl", len(metrics))
    yield Pair("publication.json, metric_rows_kept", kept, "metric_rows", publication.metric_rows, is_bound=True)


def _seeds(seeds: SeedsRecord, training: TrainingRecord, facts: RunData) -> Iterator[Pair]:
    here = "seeds.json"
    yield Pair(f"{here}, recipe_id", seeds.recipe_id, "of training.json", training.recipe_id)
    yield Pair(f"{here}, recipe_id", seeds.recipe_id, "of its own configuration", recipe_id(seeds.config))
    config = {key: value for key, value in (facts.config or {}).items() if key != "seed"}
    yield Pair(f"{here}, config", differences(config, seeds.config), "config.yaml", [])
    columns = {name: [getattr(epoch, name) for epoch in training.epochs] for name in ("validation_top1", "train_loss")}
    for number, run in enumerate(seeds.runs):
        share = (run.epochs.get("validation_top1") or [None])[-1]
        if share is not None and seeds.evaluation and seeds.evaluation.protocol == training.validation_protocol:
            counted, images = seeds.evaluation.correct_top1[number], seeds.evaluation.images
            place = f"{here}, seed {run.seed}, evaluation"
            yield Pair(place, counted, "its last validation", round(share * images), 2 + images / 1000)
        if run.seed != training.seed:
            continue
        yield Pair(f"{here}, seed {run.seed}", run.weights_sha256, "training left", training.outputs.get("weights"))
        for name, column in columns.items():
            yield Pair(f"{here}, seed {run.seed}, {name}", run.epochs.get(name, column), "training.json", column)
        if seeds.evaluation and facts.evaluation and seeds.evaluation.protocol == facts.evaluation.protocol.name:
            for name in ("correct_top1", "correct_top5"):
                counted = getattr(seeds.evaluation, name)[number]
                yield Pair(f"{here}, seed {run.seed}", counted, "evaluation.json", getattr(facts.evaluation, name))


def _reproduction(reproduction: ReproductionRecord, training: TrainingRecord) -> Iterator[Pair]:
    for name in ("recipe_id", "config_sha256"):
        yield Pair(f"reproduction.json, {name}", getattr(reproduction, name), "training", getattr(training, name))


TABLE: tuple[Callable[..., Iterator[Pair]], ...] = (
    _data,
    _data_and_configuration,
    _data_and_training,
    _training,
    _rows,
    _means,
    _identity,
    _live_settings,
    _command,
    _schedule,
    _evaluations,
    _evaluation_and_data,
    _evaluation_and_configuration,
    _evaluation_and_training,
    _exports,
    _exports_and_configuration,
    _exports_and_evaluation,
    _pictures,
    _pictures_and_data,
    _latencies,
    _latencies_and_evaluation,
    _machines,
    _energy,
    _journal,
    _publication,
    _seeds,
    _reproduction,
)
