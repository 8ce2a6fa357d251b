"""The differences of two recipes: settings, values that follow from them, live objects, circumstances.

A configuration does not show everything: batch norm sees other images on another number of GPUs, and a learning rate
has its meaning per image of the batch. Schedules of different length are compared at equal share of training. A
document may come from anybody: a value of another type than expected counts as absent.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec

from recipe.config.identity import flatten
from recipe.document.recipe_json import recipe_claims
from recipe.errors import UserError
from recipe.review.diff.impact import Group, group_of, is_inert
from recipe.review.findings import LINE_LENGTH_MAX, shorten
from recipe.review.opening import OpenedRecipe, RecordReader, dict_or_empty
from recipe.run.records import TrainingRecord

LARGEST_FLOAT = 1e300
Curve = list[tuple[float, float]]  # (share of training, learning rate), in order


@dataclass(frozen=True)
class Comparable:
    """A recipe's JSON block, and its training record if there are records."""

    name: str
    block: dict[str, Any]
    training: TrainingRecord | None

    @classmethod
    def from_recipe(cls, recipe: OpenedRecipe) -> Comparable:
        """From the records, or from the document's block. Raises `UserError` for a recipe with neither."""
        if recipe.run is None:
            return cls(recipe.name, recipe.required_block(), None)
        reader = RecordReader(recipe.run)
        facts = reader.facts()
        for finding in reader.findings:
            raise UserError(shorten(f"{recipe.name}, {finding.place}: {finding.what}", LINE_LENGTH_MAX))
        return cls(recipe.name, json.loads(json.dumps(recipe_claims(facts))), facts.training)

    def claims(self, chapter: str) -> dict[str, Any]:
        return dict_or_empty(dict_or_empty(self.block.get("claims")).get(chapter))

    @property
    def config(self) -> dict[str, Any]:
        return flatten(dict_or_empty(self.block.get("config")))

    @property
    def epochs(self) -> dict[str, list[Any]]:
        columns = dict_or_empty(self.claims("training").get("epochs"))
        return {name: values for name, values in columns.items() if isinstance(values, list)}

    def learning_rates(self) -> list[Curve]:
        """The learning rate over the share of training, the best source first. A missing source is empty.

        The sources: the schedule as the run evaluated it, the end of each epoch.
        """
        points, steps = [], 1
        if self.training is not None:
            points, steps = self.training.schedule.points, max(self.training.schedule.steps - 1, 1)
        evaluated = sorted((step / steps, rate) for step, rate in points)
        ends = numbers_or_empty(self.epochs.get("learning_rate"))
        return [
            evaluated if len(evaluated) > 1 else [],
            [((at + 1) / len(ends), rate) for at, rate in enumerate(ends)] if len(ends) > 1 else [],
        ]


def numbers_or_empty(values: object) -> list[float]:
    return values if isinstance(values, list) and all(is_finite_number(value) for value in values) else []


def is_finite_number(value: Any) -> bool:
    """Whether a value is a number that cannot overflow."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST_FLOAT < value < LARGEST_FLOAT


def value_at(curve: Curve, share: float) -> float:
    """The curve at a share of training, linear between its points."""
    for (left, low), (right, high) in pairwise(curve):
        if share <= right:
            within = (share - left) / (right - left) if right > left else 1.0
            return low + (high - low) * min(max(within, 0.0), 1.0)
    return curve[-1][1]


ABSENT = "(absent)"
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
CURVE_SHARES = [step / 100 for step in range(101)]
FEW_POINTS = 50
CURVE_TOLERANCE = 1e-3  # of the peak: points are recorded at a hundred steps, and read between them

SETTINGS_AGREE, AS_MEASURED = "though its settings agree", "as measured"
INITIAL_HASH = "model.initial weights, SHA-256"
MANIFEST_HASH = "data.manifest, SHA-256"
PIXELS_HASH = "augmentation.pixels, SHA-256"
HASHES = (  # chapter and key of the claims, name, note
    ("training", "augmentation_sha256", PIXELS_HASH, SETTINGS_AGREE),
    ("data", "class_list_sha256", "data.class list, SHA-256", SETTINGS_AGREE),
    ("data", "manifest_sha256", MANIFEST_HASH, SETTINGS_AGREE),
    ("training", "architecture_sha256", "model.architecture, SHA-256", SETTINGS_AGREE),
    ("training", "initial_weights_sha256", INITIAL_HASH, SETTINGS_AGREE),
    ("evaluation", "transform_sha256", "evaluation.pixels, SHA-256", AS_MEASURED),
    ("evaluation", "protocol", "evaluation.protocol", AS_MEASURED),
)


@dataclass(frozen=True)
class Difference:
    group: Group
    key: str
    before: Any
    after: Any
    note: str = ""

    def line(self) -> str:
        """The difference on one line. Hashes are cut to 12 digits."""
        note = f"  ({self.note})" if self.note else ""
        return f"{self.key}: {_short(self.before)} -> {_short(self.after)}{note}"


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) and HASH.fullmatch(value) else shorten(value)


def changed_values(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value before, value after) of every key that differs, in the order of both."""
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key, ABSENT), after.get(key, ABSENT)
        if old != new:
            yield key, old, new


# Settings


def config_differences(a: Comparable, b: Comparable) -> Iterator[Difference]:
    """Keys of the pinned configurations. Empty if one of them was not trained."""
    before, after = a.config, b.config
    for key, old, new in changed_values(before, after) if before and after else ():
        if is_inert(key, before) and is_inert(key, after):
            yield Difference(Group.cosmetic, key, old, new, "without effect beside the other settings")
        else:
            yield Difference(group_of(key), key, old, new, note_on(key, before, after))


def note_on(key: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """The learning rate per image of the batch, or the meaning of a change of seed."""
    if key == "seed":
        return "another seed alone moves the result by run-to-run noise"
    if key not in ("optimization.learning_rate", "optimization.batch_size"):
        return ""
    rates = []
    for values in (before, after):
        rate, images = values.get("optimization.learning_rate"), values.get("optimization.batch_size")
        if not (is_finite_number(rate) and is_finite_number(images) and rate > 0 and images > 0):  # type: ignore[operator]
            return ""
        rates.append(float(rate) / float(images))  # type: ignore[arg-type]
    factor = rates[1] / rates[0]
    change = "the same" if math.isclose(factor, 1) else f"x {factor:.3g}"
    return f"learning rate per image of the batch: {rates[0]:.3g} -> {rates[1]:.3g}, {change}"


# Values that no configuration shows


def derived_differences(a: Comparable, b: Comparable) -> Iterator[Difference]:
    """The images of a batch norm, the images seen, and the learning rate over the share of training."""
    before, after = a.claims("training"), b.claims("training")
    if not (before and after):
        return
    for key, name, note in (
        ("batch_norm_batch_size", "images per batch norm", "each process normalises by its own images only"),
        ("images_seen", "images seen", ""),
    ):
        if before.get(key) != after.get(key):
            yield Difference(Group.accuracy, name, before.get(key), after.get(key), note)
    for curves in zip(a.learning_rates(), b.learning_rates(), strict=True):  # of one source, else points would differ
        if all(curves):
            yield from curve_difference(*curves)
            return


def curve_difference(before: Curve, after: Curve) -> Iterator[Difference]:
    """The share of training with the largest difference. Curves of few points only if they are equally long."""
    if len(before) != len(after) and min(len(before), len(after)) < FEW_POINTS:
        return
    pairs = [(share, value_at(before, share), value_at(after, share)) for share in CURVE_SHARES]
    share, old, new = max(pairs, key=lambda pair: abs(pair[1] - pair[2]))
    peak = max(rate for _, rate in before + after)
    if abs(old - new) > CURVE_TOLERANCE * peak:
        note = f"where they are farthest apart, at {share:.0%} of training"
        yield Difference(Group.accuracy, "learning-rate curve", f"{old:.4g}", f"{new:.4g}", note)


def hidden_differences(a: Comparable, b: Comparable) -> Iterator[Difference]:
    """Hashes and live objects that differ although the settings of their chapter agree."""
    changed = {key for key, _, _ in changed_values(a.config, b.config)}
    implied = {INITIAL_HASH, PIXELS_HASH} if "seed" in changed else set()
    for group, name in (("model", INITIAL_HASH), ("data", MANIFEST_HASH)):
        if any(key.startswith(f"{group}.") and not key.startswith(f"{group}.description") for key in changed):
            implied.add(name)
    for chapter, key, name, note in HASHES:
        before, after = a.claims(chapter), b.claims(chapter)
        if before and after and before.get(key) != after.get(key) and name not in implied:
            yield Difference(Group.accuracy, name, before.get(key), after.get(key), note)
    raw = [
        {name: dict_or_empty(split).get("raw_sha256") for name, split in sorted(splits.items())}
        for splits in (dict_or_empty(one.claims("data").get("splits")) for one in (a, b))
    ]
    for split, old, new in changed_values(*raw) if all(raw) else ():
        yield Difference(Group.accuracy, f"data.raw images of {split}, SHA-256", old, new, SETTINGS_AGREE)
    codes = [dict_or_empty(one.block.get("code")) for one in (a, b)]
    old, new = (code.get("source_sha256") for code in codes)
    if old and new and old != new:
        commits = f"commits {_short(codes[0].get('commit'))} and {_short(codes[1].get('commit'))}"
        yield Difference(Group.accuracy, "code.source_sha256", old, new, commits)
    if a.training is not None and b.training is not None:
        for key, old, new in changed_values(live_settings(a.training), live_settings(b.training)):
            is_exact = key.startswith("trainer.")
            yield Difference(Group.last_digits if is_exact else Group.accuracy, key, old, new, "as run")


def live_settings(record: TrainingRecord) -> dict[str, Any]:
    """The settings read back from optimizer, loss, network and loader, by their chapter."""
    groups = {group.name: msgspec.to_builtins(group.settings) for group in record.parameter_groups}
    chapters = {
        "optimization": {"optimizer": record.optimizer, "groups": groups, "loss": record.loss},
        "optimization.ema": record.averaging,
        "augmentation": record.augmentation,
        "model.batch_norm": record.model.batch_norm,
        "model.alterations": record.model.alterations,
        "trainer.precision": {"forward_and_backward": record.precision.get("forward_and_backward")},
        "trainer.arithmetic": {key: value for key, value in record.precision.items() if key != "forward_and_backward"},
    }
    return flatten(chapters)


def circumstance_differences(a: Comparable, b: Comparable) -> Iterator[Difference]:
    """Hardware, versions, processes and threads. The code has its own line."""
    before, after = (dict_or_empty(one.block.get("determinism_context")) for one in (a, b))
    if not (before and after):
        before, after = (
            {key: one.claims("training").get(key) for key in ("processes", "accelerator")} for one in (a, b)
        )
    for key, old, new in changed_values(before, after):
        if key != "the source":
            yield Difference(Group.last_digits, key, old, new)
