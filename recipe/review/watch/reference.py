"""Which runs a run may be compared with, and their epochs as columns: read from records, documents and strangers.

A reference is a finished run, a published recipe or a file of dynamics (several seeds of one recipe). Whatever differs
in what can change the dynamics makes two of them incomparable, and is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from recipe.config.identity import NOT_TRAINING, differences, flatten, recipe_id
from recipe.document.claims import columns, identity
from recipe.document.dynamics import MetricRow, joined_rows
from recipe.document.facts import gather
from recipe.document.formatting import on_one_line
from recipe.errors import UserError
from recipe.records import Dynamics, PreprocessingRecord, SeedDynamics, SeedsRecord, TrainingRecord, from_json
from recipe.review.opening import Subject, open_subject, read_text
from recipe.review.watch.statistics import METRICS, phases
from recipe.run import Run, shown_path

DYNAMICS_FILE = "dynamics.json"  # beside the document
MOST_EPOCHS = 100_000


class ScheduleSettings(msgspec.Struct, frozen=True):
    """The part of a configuration that says where the phases of training begin."""

    epochs: int
    schedule: str
    warmup_epochs: float
    step_epochs: list[int]


@dataclass(frozen=True)
class Watched:
    """The run that is judged, finished or not."""

    name: str
    config: Mapping[str, Any]
    steps_per_epoch: int | None  # unknown until its first epoch is over
    seed: SeedDynamics


def open_reference(paths: Sequence[str | Path]) -> Dynamics:
    """All seeds under the given paths, each once; raises `UserError` where they are not of one recipe."""
    first, *others = [_one_reference(path) for path in paths]
    seeds = list(first.seeds)
    for path, other in zip(paths[1:], others, strict=True):
        refuse_differences(first, other.config, other.steps_per_epoch, shown_path(path))
        seeds += other.seeds
    for seed in seeds[1:]:
        _refuse_other_data(seeds[0], seed, f"reference seed {seed.seed}")
    return msgspec.structs.replace(first, seeds=_without_repeats(seeds))


def _one_reference(path: str | Path) -> Dynamics:
    path = Path(path)
    if path.suffix == ".json" and path.is_file():
        return _checked(_read_dynamics(path), shown_path(path))
    subject = open_subject(path)
    own = _with_published_seeds(_from_claims(subject), subject)
    file = (path if path.is_dir() else path.parent) / DYNAMICS_FILE
    if not file.is_file():
        return _checked(own, subject.name)
    published = _read_dynamics(file)
    refuse_differences(own, published.config, published.steps_per_epoch, shown_path(file))
    seeds = _without_repeats([*own.seeds, *published.seeds])
    return _checked(msgspec.structs.replace(own, seeds=seeds), subject.name)


def _with_published_seeds(own: Dynamics, subject: Subject) -> Dynamics:
    """The other seeds that were published with a recipe: of the same recipe on the same data, as `publish` saw to."""
    published = subject.run.read(SeedsRecord) if subject.run is not None else None
    if published is None:
        return own
    if published.recipe_id != own.recipe_id:
        raise UserError(f"the seeds in the records of {subject.name} are of another recipe")
    others = [
        SeedDynamics(
            seed=run.seed,
            weights_sha256=run.weights_sha256,
            source_sha256=run.source_sha256,
            images_per_batch_norm=None,
            raw_sha256=own.seeds[0].raw_sha256,
            epochs={name: list(values) for name, values in run.epochs.items()},
        )
        for run in published.runs
    ]
    return msgspec.structs.replace(own, seeds=_without_repeats([*own.seeds, *others]))


def _read_dynamics(path: Path) -> Dynamics:
    found = from_json(read_text(path).encode(), Dynamics, shown_path(path))
    computed = recipe_id(found.config)
    if found.recipe_id != computed:
        raise UserError(
            f"{shown_path(path)} calls itself recipe {on_one_line(found.recipe_id)[:16]}, but its configuration is "
            f"that of {computed[:16]}: it was edited"
        )
    return found


def _from_claims(subject: Subject) -> Dynamics:
    """The one seed that a document tells of, or the records of a run where no document was written."""
    claims = _claims(subject)
    training, config = claims["claims"]["training"], claims["config"]
    seed = config.get("seed")
    return Dynamics(
        recipe_id=recipe_id(config),
        config={key: value for key, value in config.items() if key != "seed"},
        steps_per_epoch=training.get("steps_per_epoch"),
        seeds=[_seed_of(claims, seed if isinstance(seed, int) else 0)],
    )


def _claims(subject: Subject) -> dict[str, Any]:
    """The document's block, down to the claims of training; raises `UserError` where nothing was trained to its end."""
    claims = subject.identity
    if claims is None and subject.run is not None:
        claims = identity(gather(subject.run, subject.name))
    try:
        training = claims["claims"]["training"] if claims else None
        is_whole = isinstance(training, dict) and claims is not None and isinstance(claims["config"], dict)
    except (KeyError, TypeError):
        is_whole = False
    if not is_whole or claims is None:
        raise UserError(f"{subject.name} tells of no finished training: nothing can be compared with it")
    return claims


def _seed_of(claims: dict[str, Any], seed: int) -> SeedDynamics:
    training = claims["claims"]["training"]
    values = {
        "seed": seed,
        "weights_sha256": training.get("weights_sha256"),
        "source_sha256": (claims.get("code") or {}).get("source_sha256"),
        "images_per_batch_norm": training.get("images_per_batch_norm"),
        "raw_sha256": _raw_sha256(claims["claims"].get("data")),
        "epochs": training.get("epochs"),
    }
    try:
        return msgspec.convert(values, SeedDynamics)
    except (msgspec.ValidationError, AttributeError) as error:
        raise UserError(f"the document's claims about training cannot be read: {error}") from error


def _raw_sha256(data: Any) -> dict[str, Any]:
    splits = data.get("splits") if isinstance(data, dict) else None
    if not isinstance(splits, dict):
        return {}
    return {name: split.get("raw_sha256") for name, split in splits.items() if isinstance(split, dict)}


def _checked(found: Dynamics, where: str) -> Dynamics:
    """The dynamics if every seed has every epoch with plain numbers; raises `UserError` otherwise."""
    epochs = schedule_of(found.config, where).epochs
    if not isinstance(found.steps_per_epoch, int) or found.steps_per_epoch < 1:
        raise UserError(f"{where} has no steps_per_epoch: {on_one_line(str(found.steps_per_epoch))}")
    if not found.seeds:
        raise UserError(f"{where} holds no seed")
    for seed in found.seeds:
        if seed.epochs.get("epoch") != list(range(1, epochs + 1)):
            raise UserError(f"seed {seed.seed} of {where} does not hold each of its {epochs} epochs once, in order")
        for name in METRICS:
            values = seed.epochs.get(name, [])
            if len(values) != epochs or not all(is_number(value) for value in values):
                raise UserError(f"seed {seed.seed} of {where} has no number for {name} in one of its {epochs} epochs")
    return found


def is_number(value: Any) -> bool:
    """Whether a value can be computed with: text, truth values, NaN and what no float can hold cannot."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**53


def schedule_of(config: Mapping[str, Any], where: str) -> ScheduleSettings:
    """The schedule of a pinned configuration, checked."""
    try:
        settings = msgspec.convert(config.get("optimization"), ScheduleSettings)
    except msgspec.ValidationError as error:
        raise UserError(f"the configuration of {where} has no schedule that could be read: {error}") from error
    if not 1 <= settings.epochs <= MOST_EPOCHS:
        raise UserError(
            f"optimization.epochs={settings.epochs} of {where} is invalid: must be between 1 and {MOST_EPOCHS}"
        )
    return settings


def phases_of(reference: Dynamics) -> list[int]:
    """The phase of the schedule of every epoch."""
    settings = schedule_of(reference.config, "the reference")
    falls = settings.step_epochs if settings.schedule == "step" else []
    return phases(settings.epochs, [settings.warmup_epochs, *falls])


def refuse_differences(reference: Dynamics, config: Mapping[str, Any], steps_per_epoch: int | None, where: str) -> None:
    """Raise `UserError` with every difference that can change the dynamics."""
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
    """The settings that can change how training goes, flat, without the seed."""
    return {key: value for key, value in flatten(config).items() if key != "seed" and not NOT_TRAINING.fullmatch(key)}


def refuse_other_data(reference: Dynamics, watched: Watched) -> None:
    """Raise `UserError` where the original images are known to be others."""
    for seed in reference.seeds:
        _refuse_other_data(seed, watched.seed, watched.name)


def _refuse_other_data(first: SeedDynamics, second: SeedDynamics, where: str) -> None:
    for split in first.raw_sha256.keys() & second.raw_sha256.keys():
        ours, theirs = first.raw_sha256[split], second.raw_sha256[split]
        if ours != theirs:
            raise UserError(
                f"{where} saw other images: raw_sha256 of {on_one_line(split)} is {on_one_line(theirs)[:16]}, that of "
                f"the reference {on_one_line(ours)[:16]}"
            )


def _without_repeats(seeds: Sequence[SeedDynamics]) -> list[SeedDynamics]:
    """Each run once, however often it was named: a copy would make the spread look smaller than it is."""
    kept: list[SeedDynamics] = []
    for seed in seeds:
        if not any(same_run(seed, other) for other in kept):
            kept.append(seed)
    return kept


def same_run(first: SeedDynamics, second: SeedDynamics) -> bool:
    """Whether every value that both have is the same: two seeds never agree so, whatever their hashes say."""
    shared = range(min(len(first.epochs.get("epoch", [])), len(second.epochs.get("epoch", []))))
    pairs = [(first.epochs[name][at], second.epochs[name][at]) for name in METRICS for at in shared]
    return bool(pairs) and all(a == b for a, b in pairs)


def open_watched(path: str | Path) -> Watched:
    """The run under a path: a run directory in whatever state, a published recipe or a document."""
    path = Path(path)
    run = Run(path)
    if path.is_dir() and run.metrics.exists():
        return watched_run(run)
    subject = open_subject(path)
    claims = _claims(subject)
    found = _from_claims(subject)
    _checked(found, subject.name)
    return Watched(subject.name, claims["config"], found.steps_per_epoch, found.seeds[0])


def watched_run(run: Run) -> Watched:
    """A run from its own files, while it trains too; an epoch counts when it was validated."""
    name, config = shown_path(run.directory), run.read_config()
    if config is None:
        raise UserError(f"{name} has no config.yaml: nothing was trained there")
    rows, steps_per_epoch = _completed(run.metric_rows(), schedule_of(config, name).epochs, name)
    training, data = run.read(TrainingRecord), run.read(PreprocessingRecord)
    seed = SeedDynamics(
        seed=int(config["seed"]),
        weights_sha256=training.outputs.get("weights") if training else None,
        source_sha256=training.provenance.source_sha256 if training else None,
        images_per_batch_norm=training.loader.images_per_batch_norm if training else None,
        raw_sha256={split: facts.raw_sha256 for split, facts in data.splits.items()} if data else {},
        epochs=columns(joined_rows(rows)),
    )
    return Watched(name, config, steps_per_epoch, seed)


def _completed(rows: Sequence[MetricRow], epochs: int, where: str) -> tuple[list[MetricRow], int | None]:
    """The rows of the epochs that are over, and how many steps one has."""
    beyond = max((row["epoch"] for row in rows), default=0)
    if beyond > epochs:
        raise UserError(f"{where} has a row of metrics of epoch {beyond}; its training has {epochs}")
    validated = {row["epoch"]: row["step"] for row in rows if row["split"] == "validation"}
    lengths = {step / epoch for epoch, step in validated.items()}
    if len(lengths) > 1:
        raise UserError(f"the epochs of {where} have different numbers of steps: {sorted(lengths)}")
    length = round(lengths.pop()) if lengths else None
    return [row for row in rows if row["epoch"] in validated], length
