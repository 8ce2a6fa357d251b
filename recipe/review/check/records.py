"""Level *resolvable*: the records beside each other. Integers add up exactly: each counts the same images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from recipe.config.identity import config_sha256, differences, flatten, recipe_id
from recipe.document.run_data import STALE, MetricRow, RunData, sections
from recipe.review.check.checklist import HEADINGS
from recipe.review.check.code import SHA256
from recipe.review.findings import Finding, Level, first_few
from recipe.run.metric_rows import EPOCH_FIELDS, Place, missing_rows, planned_places
from recipe.run.records import EvaluationRecord, PreprocessingRecord, SerializationRecord, TimingRecord, TrainingRecord

MOST_ROWS = 1_000_000  # expected of a record, which may claim any number of steps
SECTIONS = HEADINGS | {
    "inference_code": "Inference / Code",
    "timing_information": "Inference / Timing information",
    "serialization": "Inference / Serialization",
}


@dataclass(frozen=True)
class Sum:
    """Two numbers that have to be equal, or in order, each with its name."""

    record: str
    name: str
    value: float
    other: str
    expected: float
    is_bound: bool = False  # `value` may be at most `expected`

    @property
    def holds(self) -> bool:
        return self.value <= self.expected if self.is_bound else self.value == self.expected

    def finding(self) -> Finding:
        relation = "more than" if self.is_bound else "but"
        what = f"it is {self.value:,}, {relation} {self.other}: {self.expected:,}"
        mend = "take the record from version control, or run its stage again"
        return Finding(Level.resolvable, f"records/{self.record}.json, {self.name}", what, mend)


def record_findings(facts: RunData) -> list[Finding]:
    """Sums that do not add up, texts that are not hashes, stale sections, lost rows, other weights."""
    wrong = [check.finding() for check in sums(facts) if not check.holds]
    return wrong + hash_findings(facts) + stale_findings(facts) + log_findings(facts) + energy_findings(facts)


def sums(facts: RunData) -> Iterator[Sum]:
    if facts.preprocessing:
        yield from data_sums(facts.preprocessing)
    if facts.training:
        yield from training_sums(facts.training, facts.config)
    if facts.evaluation:
        yield from evaluation_sums("evaluation", facts.evaluation, facts.preprocessing)
    for evaluation in facts.other_evaluations:
        yield from evaluation_sums(f"evaluations/{evaluation.protocol.name}", evaluation, facts.preprocessing)
    if facts.serialization:
        yield from serialization_sums(facts.serialization, facts.evaluation)
    for timing in facts.timing:
        yield from timing_sums(timing)


def data_sums(record: PreprocessingRecord) -> Iterator[Sum]:
    for name, split in record.splits.items():
        field = f"splits.{name}.images"
        classes = f"{split.classes} classes of at most {split.images_per_class_max} images"
        yield Sum("preprocessing", field, split.images, classes, split.classes * split.images_per_class_max, True)
        least = split.classes * split.images_per_class_min
        yield Sum("preprocessing", f"splits.{name}.images_per_class_min", least, field, split.images, True)
        yield Sum("preprocessing", f"splits.{name}.classes", split.classes, "class_count", record.class_count, True)


def training_sums(record: TrainingRecord, config: dict[str, Any] | None) -> Iterator[Sum]:
    schedule, loader, here = record.schedule, record.loader, "training"
    groups = sum(group.parameters for group in record.parameter_groups)
    yield Sum(here, "parameter_groups", groups, "model.parameters", record.model.parameters)
    epochs = len(record.epochs)
    steps = epochs * schedule.steps_per_epoch
    yield Sum(here, "schedule.steps", schedule.steps, f"{epochs} epochs of {schedule.steps_per_epoch} steps", steps)
    images = schedule.steps * loader.global_batch_size
    batches = f"{schedule.steps:,} steps of {loader.global_batch_size:,} images"
    yield Sum(here, "images_seen", record.images_seen, batches, images)
    values = flatten(config or {})
    for key, field, recorded in (
        ("optimization.epochs", "epochs", epochs),
        ("optimization.batch_size", "loader.global_batch_size", loader.global_batch_size),
        ("seed", "seed", record.seed),
    ):
        if isinstance(values.get(key), int):
            yield Sum(here, field, recorded, f"{key} of config.yaml", values[key])


def evaluation_sums(here: str, record: EvaluationRecord, data: PreprocessingRecord | None) -> Iterator[Sum]:
    for name in ("images", "correct_top1", "correct_top5"):
        total = sum(getattr(row, name) for row in record.per_class)
        yield Sum(here, name, getattr(record, name), f"the sum of {name} over per_class", total)
    yield Sum(here, "correct_top1", record.correct_top1, "correct_top5", record.correct_top5, is_bound=True)
    yield Sum(here, "correct_top5", record.correct_top5, "images", record.images, is_bound=True)
    for row in record.per_class:
        yield Sum(here, f"per_class.{row.index}.correct_top1", row.correct_top1, "correct_top5", row.correct_top5, True)
        yield Sum(here, f"per_class.{row.index}.correct_top5", row.correct_top5, "images", row.images, True)
    if data is not None:
        yield Sum(here, "per_class", len(record.per_class), "class_count of the data", data.class_count)
        split = data.splits.get("val") or data.splits.get("validation")
        if split:
            yield Sum(here, "images", record.images, "the validation images of the data", split.images)


def serialization_sums(record: SerializationRecord, evaluation: EvaluationRecord | None) -> Iterator[Sum]:
    here = "serialization"
    if evaluation is not None:
        yield Sum(here, "images", record.images, "images of the evaluation", evaluation.images)
        counted = record.evaluated_correct_top1
        yield Sum(here, "evaluated_correct_top1", counted, "correct_top1 of the evaluation", evaluation.correct_top1)
    for entry in record.variants:
        field = f"variants.{entry.variant}"
        yield Sum(here, f"{field}.correct_top1", entry.correct_top1, "correct_top5", entry.correct_top5, True)
        yield Sum(here, f"{field}.correct_top5", entry.correct_top5, "images", record.images, True)
        moved = abs(entry.correct_top1 - record.eager_correct_top1)
        difference = f"{field}.correct_top1 less eager_correct_top1"
        yield Sum(here, difference, moved, "images that change their class", entry.flips, True)


def timing_sums(record: TimingRecord) -> Iterator[Sum]:
    for cell in record.cells:
        field = f"{cell.backend}, {cell.precision}, {cell.what}, batch {cell.batch_size}"
        values = [cell.p50_milliseconds, cell.p90_milliseconds, cell.p99_milliseconds]
        present = [value for value in values if value is not None]
        for low, high in pairwise(present):
            yield Sum(f"timing/{record.machine}", field, low, "a higher percentile", high, is_bound=True)


def hash_findings(facts: RunData) -> list[Finding]:
    """Hashes of inputs and outputs that are not SHA-256, and a recipe_id of another configuration."""
    findings = []
    for name, record in facts.stages():
        hashes = {**record.inputs, **getattr(record, "outputs", {})}
        wrong = [key for key, value in hashes.items() if not SHA256.fullmatch(value)]
        if wrong:
            place = f"records/{name}.json, inputs and outputs"
            what = f"no SHA-256 in {first_few(wrong)}"
            findings.append(Finding(Level.well_formed, place, what, "run the stage again"))
    if facts.training and facts.config and facts.training.recipe_id != recipe_id(facts.config):
        what = f"it is {facts.training.recipe_id[:16]}, that of config.yaml is {recipe_id(facts.config)[:16]}"
        findings.append(Finding(Level.resolvable, "records/training.json, recipe_id", what, MEND_CONFIG))
    return findings


MEND_CONFIG = "put config.yaml back as training pinned it: change nothing in it, train another run instead"


def stale_findings(facts: RunData) -> list[Finding]:
    """Stale sections: one finding for each reason, with all of its sections."""
    reasons: dict[str, list[str]] = {}
    for name, section in sections(facts).items():
        if section.state == STALE:
            for reason in section.reasons:
                reasons.setdefault(reason, []).append(SECTIONS.get(name, name))
    findings = []
    for reason, names in reasons.items():
        mend = MEND_CONFIG if "config.yaml" in reason else "run the stages of these sections again"
        findings.append(Finding(Level.resolvable, "section " + "; ".join(names), f"stale: {reason}", mend))
    return findings


def log_findings(facts: RunData) -> list[Finding]:
    """Rows that are missing from metrics.jsonl, and epochs of the training record that are not those of their rows."""
    if facts.training is None:
        return []
    findings = []
    missing = missing_rows({Place(row["split"], row["epoch"], row["step"]) for row in facts.metrics}, promised(facts))
    if missing:
        findings.append(
            Finding(Level.resolvable, "metrics.jsonl", missing, "take the file from version control or a copy")
        )
    findings += epoch_findings(facts.training, facts.metrics)
    steps = max(
        (row["step"] for row in facts.metrics if row["split"] == "train"), default=facts.training.schedule.steps
    )
    if steps != facts.training.schedule.steps:
        what = f"its last train row is of step {steps:,}, training ended with step {facts.training.schedule.steps:,}"
        findings.append(Finding(Level.resolvable, "metrics.jsonl", what, "take the file from version control"))
    return findings


def epoch_findings(training: TrainingRecord, metrics: Sequence[MetricRow]) -> Iterator[Finding]:
    """The recorded epochs have the same numbers as the validation rows that ended them."""
    ends = {row["epoch"]: row for row in metrics if row["split"] == "validation"}
    for epoch in training.epochs:
        row = ends.get(epoch.epoch, {})
        changed = [name for name, field in EPOCH_FIELDS.items() if row and row.get(field) != getattr(epoch, name)]
        if changed:
            what = f"{first_few(changed)} are not those of its validation row in metrics.jsonl"
            place = f"records/training.json, epochs, {epoch.epoch}"
            yield Finding(Level.resolvable, place, what, "take both files from version control")


def promised(facts: RunData) -> Iterator[Place]:
    """The expected rows. A published recipe may keep one train row an epoch."""
    assert facts.training is not None, "the caller looked"
    schedule, publication = facts.training.schedule, facts.publication
    every = flatten(facts.config or {}).get("trainer.log_every_steps")
    is_thinned = publication is not None and publication.metric_rows_kept < publication.metric_rows
    if is_thinned or not (isinstance(every, int) and every >= 1):
        every = schedule.steps_per_epoch
    planned = planned_places(schedule.steps, schedule.steps_per_epoch, every, len(facts.training.epochs))
    return islice(planned, MOST_ROWS)


def energy_findings(facts: RunData) -> list[Finding]:
    """The recorded energy belongs to the weights that training left."""
    if facts.energy is None or facts.training is None:
        return []
    if facts.energy.inputs.get("weights") == facts.training.outputs.get("weights"):
        return []
    what = "it was spent on other weights than training left"
    return [Finding(Level.resolvable, "records/energy.json, inputs", what, "remove it, or train again")]


def config_findings(name: str, config: dict[str, Any], facts: RunData) -> list[Finding]:
    """The document's configuration is that of config.yaml."""
    if facts.config is None or config_sha256(facts.config) == config_sha256(config):
        return []
    changed = first_few(differences(config, facts.config))
    return [Finding(Level.resolvable, "config.yaml", f"it is not the configuration of {name}: {changed}", MEND_CONFIG)]
