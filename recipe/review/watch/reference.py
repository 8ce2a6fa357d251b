"""The reference of `watch` and the run that is judged by it, read from records, documents and seeds.json files.

A reference is a finished run, a published recipe or a `seeds.json` (several seeds of one recipe). Runs that differ in a
setting that can change the training are refused, with the setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from recipe.config.identity import NOT_TRAINING, differences, flatten, recipe_id
from recipe.document.formatting import on_one_line
from recipe.document.recipe_json import DYNAMICS, recipe_claims
from recipe.document.run_data import MetricRow, load
from recipe.errors import UserError
from recipe.review.opening import OpenedRecipe, dict_or_empty, open_recipe, read_text
from recipe.review.watch.statistics import WATCHED_METRICS, phases
from recipe.run.directory import Run
from recipe.run.files import display_path
from recipe.run.metric_rows import EPOCH_FIELDS
from recipe.run.records import PreprocessingRecord, SeedRun, SeedsRecord, TrainingRecord, from_json

MOST_EPOCHS = 100_000


class ScheduleSettings(msgspec.Struct, frozen=True):
    """The settings that place the phases of a training."""

    epochs: int
    schedule: str
    warmup_epochs: float
    step_epochs: list[int]


@dataclass(frozen=True)
class Watched:
    """A run to judge, finished or not."""

    name: str
    config: Mapping[str, Any]
    steps_per_epoch: int | None  # unknown until its first epoch is over
    seed: SeedRun


def open_reference(paths: Sequence[str | Path]) -> SeedsRecord:
    """All seeds under the paths, each once. Raises `UserError` unless they share one recipe and one data set."""
    first, *others = [_open_seeds(Path(path)) for path in paths]
    runs = list(first.runs)
    for path, other in zip(paths[1:], others, strict=True):
        check_same_settings(first, other.config, other.steps_per_epoch, display_path(path))
        runs += other.runs
    for run in runs[1:]:
        _check_seed_data(runs[0], run, f"reference seed {run.seed}")
    return msgspec.structs.replace(first, runs=_without_repeats(runs), evaluation=None)


def _open_seeds(path: Path) -> SeedsRecord:
    """A seeds.json, or the seed of a recipe with those that were published with it."""
    if path.suffix == ".json" and path.is_file():
        return _checked(from_json(read_text(path).encode(), SeedsRecord, display_path(path)), display_path(path))
    recipe = open_recipe(path)
    own = _seed_of(recipe)
    published = recipe.run.read(SeedsRecord) if recipe.run is not None else None
    if published is None:
        return _checked(own, recipe.name)
    where = f"records/seeds.json of {recipe.name}"
    check_same_settings(own, _checked(published, where).config, published.steps_per_epoch, where)
    runs = _without_repeats([*own.runs, *published.runs])
    return _checked(msgspec.structs.replace(own, runs=runs), recipe.name)


def _seed_of(recipe: OpenedRecipe) -> SeedsRecord:
    """The one seed of a document, or of a run without one. Raises `UserError` if no training was finished."""
    block = recipe.block
    if block is None:
        assert recipe.run is not None, "a recipe has a document or records"
        block = recipe_claims(load(recipe.run, recipe.name))
    claims, config = dict_or_empty(block.get("claims")), block.get("config")
    training, seed = claims.get("training"), dict_or_empty(config).get("seed")
    if not isinstance(training, dict) or not isinstance(config, dict):
        raise UserError(f"{recipe.name} has no finished training: nothing can be compared with it")
    splits = dict_or_empty(dict_or_empty(claims.get("data")).get("splits"))
    values = {
        "seed": seed if isinstance(seed, int) else 0,
        "weights_sha256": training.get("weights_sha256"),
        "source_sha256": dict_or_empty(block.get("code")).get("source_sha256"),
        "batch_norm_batch_size": training.get("batch_norm_batch_size"),
        "raw_sha256": {name: split.get("raw_sha256") for name, split in splits.items() if isinstance(split, dict)},
        "epochs": training.get("epochs"),
    }
    try:
        run = msgspec.convert(values, SeedRun)
    except msgspec.ValidationError as error:
        raise UserError(f"the document's claims about training cannot be read: {error}") from error
    return SeedsRecord(
        recipe_id=recipe_id(config),
        config={key: value for key, value in config.items() if key != "seed"},
        steps_per_epoch=training.get("steps_per_epoch"),  # type: ignore[arg-type]  # checked by the caller
        runs=[run],
    )


def _checked(record: SeedsRecord, where: str) -> SeedsRecord:
    """The record. Raises `UserError` unless it fits its configuration and every seed has every epoch, in numbers."""
    computed = recipe_id(record.config)
    if record.recipe_id != computed:
        raise UserError(
            f"{where} calls itself recipe {on_one_line(record.recipe_id)[:16]}, but its configuration is that of "
            f"{computed[:16]}: it was edited"
        )
    epochs, steps = schedule_of(record.config, where).epochs, record.steps_per_epoch
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"{where} has no steps_per_epoch: {on_one_line(str(steps))}")
    if not record.runs:
        raise UserError(f"{where} has no seed")
    for run in record.runs:
        if run.epochs.get("epoch") != list(range(1, epochs + 1)):
            raise UserError(f"seed {run.seed} of {where} does not have each of its {epochs} epochs once, in order")
        for name in WATCHED_METRICS:
            values = run.epochs.get(name, [])
            if len(values) != epochs or not all(is_exact_number(value) for value in values):
                raise UserError(f"seed {run.seed} of {where} has no number for {name} in one of its {epochs} epochs")
    return record


def is_exact_number(value: Any) -> bool:
    """Whether a value is exact as a float: not a bool, NaN or a huge integer."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**53


def schedule_of(config: Mapping[str, Any], where: str) -> ScheduleSettings:
    """The schedule of a pinned configuration. Raises `UserError`."""
    try:
        settings = msgspec.convert(config.get("optimization"), ScheduleSettings)
    except msgspec.ValidationError as error:
        raise UserError(f"the configuration of {where} has no schedule that could be read: {error}") from error
    if not 1 <= settings.epochs <= MOST_EPOCHS:
        raise UserError(
            f"optimization.epochs={settings.epochs} of {where} is invalid: must be between 1 and {MOST_EPOCHS}"
        )
    return settings


def phases_of(reference: SeedsRecord) -> list[int]:
    settings = schedule_of(reference.config, "the reference")
    falls = settings.step_epochs if settings.schedule == "step" else []
    return phases(settings.epochs, [settings.warmup_epochs, *falls])


def check_same_settings(
    reference: SeedsRecord, config: Mapping[str, Any], steps_per_epoch: int | None, where: str
) -> None:
    """Raise `UserError` with every difference that can change the training."""
    changed = differences(what_matters(reference.config), what_matters(config))
    if changed:
        shown = "; ".join(on_one_line(line) for line in changed)
        raise UserError(f"{where} cannot be judged by this reference, whose recipe is another one: {shown}")
    if steps_per_epoch is not None and steps_per_epoch != reference.steps_per_epoch:
        raise UserError(
            f"{where} makes {steps_per_epoch} steps an epoch, the reference {reference.steps_per_epoch}: their data "
            "sets have other sizes, and no epoch of one is at the place in the schedule of an epoch of the other"
        )


def what_matters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that can change training, flat: without the seed, names, descriptions and later stages."""
    return {key: value for key, value in flatten(config).items() if key != "seed" and not NOT_TRAINING.fullmatch(key)}


def check_same_data(reference: SeedsRecord, watched: Watched) -> None:
    """Raise `UserError` if the raw images have other hashes."""
    for seed in reference.runs:
        _check_seed_data(seed, watched.seed, watched.name)


def _check_seed_data(first: SeedRun, second: SeedRun, where: str) -> None:
    for split in first.raw_sha256.keys() & second.raw_sha256.keys():
        ours, theirs = first.raw_sha256[split], second.raw_sha256[split]
        if ours != theirs:
            raise UserError(
                f"{where} saw other images: raw_sha256 of {on_one_line(split)} is {on_one_line(theirs)[:16]}, that of "
                f"the reference {on_one_line(ours)[:16]}"
            )


def _without_repeats(seeds: Sequence[SeedRun]) -> list[SeedRun]:
    """Each run once: a copy would make the spread look smaller than it is."""
    kept: list[SeedRun] = []
    for seed in seeds:
        if not any(same_run(seed, other) for other in kept):
            kept.append(seed)
    return kept


def same_run(first: SeedRun, second: SeedRun) -> bool:
    """Whether all shared values are equal, as those of two seeds never are. Hashes can be edited."""
    shared = range(min(len(first.epochs.get("epoch", [])), len(second.epochs.get("epoch", []))))
    pairs = [(first.epochs[name][at], second.epochs[name][at]) for name in WATCHED_METRICS for at in shared]
    return bool(pairs) and all(a == b for a, b in pairs)


def open_watched(path: str | Path) -> Watched:
    """The run under a path: a run directory in any state, a published recipe or a document."""
    path = Path(path)
    run = Run(path)
    if path.is_dir() and run.metrics.exists():
        return watched_run(run)
    recipe = open_recipe(path)
    own = _checked(_seed_of(recipe), recipe.name)
    return Watched(recipe.name, own.config, own.steps_per_epoch, own.runs[0])


def watched_run(run: Run) -> Watched:
    """A run from its own files, also while it trains. An epoch counts after its validation."""
    name, config = display_path(run.directory), run.read_config()
    if config is None:
        raise UserError(f"{name} has no config.yaml: nothing was trained there")
    rows, steps_per_epoch = _completed(run.metric_rows(), schedule_of(config, name).epochs, name)
    training, data = run.read(TrainingRecord), run.read(PreprocessingRecord)
    seed = SeedRun(
        seed=int(config["seed"]),
        weights_sha256=training.outputs.get("weights") if training else None,
        source_sha256=training.provenance.source_sha256 if training else None,
        batch_norm_batch_size=training.loader.batch_norm_batch_size if training else None,
        raw_sha256={split: facts.raw_sha256 for split, facts in data.splits.items()} if data else {},
        epochs={name: [row[EPOCH_FIELDS[name]] for row in rows] for name in DYNAMICS},
    )
    return Watched(name, config, steps_per_epoch, seed)


def _completed(rows: Sequence[MetricRow], epochs: int, where: str) -> tuple[list[MetricRow], int | None]:
    """The validation rows, each the end of an epoch, and the number of steps of an epoch."""
    beyond = max((row["epoch"] for row in rows), default=0)
    if beyond > epochs:
        raise UserError(f"{where} has a row of metrics of epoch {beyond}; its training has {epochs}")
    validated = [row for row in rows if row["split"] == "validation"]
    lengths = {row["step"] / row["epoch"] for row in validated}
    if len(lengths) > 1:
        raise UserError(f"the epochs of {where} have different numbers of steps: {sorted(lengths)}")
    return validated, round(lengths.pop()) if lengths else None
