"""`diff`: what differs between two recipes, with what can explain a difference in accuracy first.

Two lists of settings are not enough: batch norm sees other images on another number of GPUs under an equal
configuration, a learning rate means something per image of its batch, and schedules of different length are compared
at equal share of training. Exit code as of `diff`: 0 where nothing differs, 1 where something does.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from recipe.config.identity import flatten
from recipe.errors import UserError
from recipe.records import TrainingRecord
from recipe.review.diff.impact import TITLES, Group, group_of, is_inert, rank_of, theme_of
from recipe.review.diff.inputs import Curve, Side, curves_of, is_number, objects, side_of, value_at
from recipe.review.findings import printable, shortened
from recipe.review.opening import open_subject
from recipe.review.results import dynamics_lines, result_lines

FORMAT = "diff/1"
ABSENT = "(absent)"
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
CURVE_SHARES = [step / 100 for step in range(101)]
FEW_POINTS = 50
CURVE_TOLERANCE = 1e-3  # of the peak: points are recorded at a hundred steps, and read between them


def describe(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    for name in ("A", "B"):
        parser.add_argument(name.lower(), metavar=name, help="a run, a published recipe, or a document")
    parser.add_argument("--json", action="store_true", help="print the differences for programs")


def answer(arguments: argparse.Namespace) -> int:
    """0: the recipes and their results are the same; 1: they differ. Raises `UserError` for what is no recipe."""
    try:
        report = compare(side_of(open_subject(arguments.a)), side_of(open_subject(arguments.b)))
    except RecursionError:
        raise UserError("one of the recipes is nested too deeply to be one") from None
    print(json.dumps(report.as_json(), indent=2) if arguments.json else "\n".join(report.lines()))
    return int(report.differs)


@dataclass(frozen=True)
class Difference:
    """One thing that differs, as a sentence needs it."""

    group: Group
    key: str
    before: Any
    after: Any
    note: str = ""

    def line(self) -> str:
        note = f"  ({self.note})" if self.note else ""
        return f"  {self.key}: {spelled(self.before)} -> {spelled(self.after)}{note}"


def spelled(value: object) -> str:
    """A value for a line; of a hash as many digits as tell two apart."""
    return value[:12] if isinstance(value, str) and HASH.fullmatch(value) else shortened(value)


@dataclass
class Report:
    """Both recipes side by side."""

    names: tuple[str, str]
    differences: list[Difference]
    dynamics: list[str]
    results: list[str]
    results_differ: bool
    not_compared: list[str] = field(default_factory=list)
    same_recipe: str = ""

    @property
    def differs(self) -> bool:
        return bool(self.differences) or self.results_differ

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "format": FORMAT,
            "a": self.names[0],
            "b": self.names[1],
            "differs": self.differs,
            "same_recipe": self.same_recipe,
            "differences": [{**asdict(found), "group": found.group.name} for found in self.differences],
            "dynamics": self.dynamics,
            "results": self.results,
            "not_compared": self.not_compared,
        }

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"A: {self.names[0]}", f"B: {self.names[1]}"]
        if self.same_recipe:
            lines.append(self.same_recipe)
        for group, title in TITLES.items():
            found = [one.line() for one in self.differences if one.group is group]
            lines += ["", f"{title}:", *found] if found else []
        for title, said in (
            ("Dynamics", self.dynamics),
            ("Results", self.results),
            ("Not compared", self.not_compared),
        ):
            lines += ["", f"{title}:", *(f"  {line}" for line in said)] if said else []
        return [printable(line) if not line.startswith("  ") else "  " + printable(line) for line in lines]


def compare(a: Side, b: Side) -> Report:
    """Everything that differs, in the order of what it can explain."""
    found = [*config_differences(a, b)]
    themes = {theme_of(one.key) for one in found if one.group is Group.accuracy}
    found += derived_differences(a, b)
    found += [one for one in hidden_differences(a, b) if theme_of(one.key) not in themes]
    found += circumstance_differences(a, b)
    found.sort(key=lambda one: (one.group, rank_of(one.key)))  # stable: equals stay in the order of the schema
    results, differ = result_lines(a, b)
    return Report(
        (a.name, b.name),
        found,
        dynamics_lines(a, b),
        results,
        differ,
        not_compared(a, b),
        sameness(a, b, found),
    )


def sameness(a: Side, b: Side, found: Sequence[Difference]) -> str:
    """A word on the identity of both, where there is one."""
    if not found:
        return "the same recipe: nothing differs that was recorded"
    ids = {str(side.block.get("recipe_id")) for side in (a, b)}
    if len(ids) == 1 and "None" not in ids:
        return f"the same configuration but for the seed at most: recipe_id {shortened(ids.pop(), 16)}"
    return ""


# Settings


def config_differences(a: Side, b: Side) -> Iterator[Difference]:
    """Keys of the pinned configurations."""
    before, after = a.config, b.config
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key, ABSENT), after.get(key, ABSENT)
        if old != new and not (before and after):
            continue  # one of them was not trained: said elsewhere
        if old != new:
            inert = is_inert(key, before) and is_inert(key, after)
            group = Group.cosmetic if inert else group_of(key)
            note = "without effect beside the other settings" if inert else note_on(key, before, after)
            yield Difference(group, key, old, new, note)


def note_on(key: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """What a learning rate means for one image of its batch; what a change of seed means."""
    if key == "seed":
        return "another seed alone moves the result by run-to-run noise"
    if key not in ("optimization.learning_rate", "optimization.batch_size"):
        return ""
    rates = [per_image(values) for values in (before, after)]
    if rates[0] is None or rates[1] is None:
        return ""
    factor = rates[1] / rates[0]
    per = f"learning rate per image of the batch: {rates[0]:.3g} -> {rates[1]:.3g}"
    return f"{per}, the same" if math.isclose(factor, 1) else f"{per}, x {factor:.3g}"


def per_image(values: dict[str, Any]) -> float | None:
    rate, images = values.get("optimization.learning_rate"), values.get("optimization.batch_size")
    if rate is None or images is None or not (is_number(rate) and is_number(images) and rate > 0 and images > 0):
        return None
    return float(rate) / float(images)


# What no configuration shows


def derived_differences(a: Side, b: Side) -> Iterator[Difference]:
    """What batch norm saw, how many images were seen, and the learning rate over the share of training."""
    before, after = a.claims("training"), b.claims("training")
    if not (before and after):
        return
    for key, name, note in (
        ("images_per_batch_norm", "images per batch norm", "each process normalises by its own images only"),
        ("images_seen", "images seen", ""),
    ):
        if before.get(key) != after.get(key):
            yield Difference(Group.accuracy, name, before.get(key), after.get(key), note)
    for curves in zip(curves_of(a), curves_of(b), strict=True):  # both from the same source, else points would differ
        if all(curves):
            yield from curve_difference(*curves)
            return


def curve_difference(before: Curve, after: Curve) -> Iterator[Difference]:
    """The share of training at which the rates lie farthest apart; curves of few points only if they are as many."""
    if len(before) != len(after) and min(len(before), len(after)) < FEW_POINTS:
        return
    pairs = [(share, value_at(before, share), value_at(after, share)) for share in CURVE_SHARES]
    share, old, new = max(pairs, key=lambda pair: abs(pair[1] - pair[2]))
    peak = max(rate for _, rate in before + after)
    if abs(old - new) > CURVE_TOLERANCE * peak:
        note = f"where they lie farthest apart, at {share:.0%} of training"
        yield Difference(Group.accuracy, "learning-rate curve", f"{old:.4g}", f"{new:.4g}", note)


def hidden_differences(a: Side, b: Side) -> Iterator[Difference]:
    """Hashes and live objects that differ although the settings of their chapter agree."""
    implied = implied_hashes(a, b)
    for chapter, key, name, note in HASHES:
        before, after = a.claims(chapter), b.claims(chapter)
        if before and after and before.get(key) != after.get(key) and name not in implied:
            yield Difference(Group.accuracy, name, before.get(key), after.get(key), note)
    if raw_hashes(a) and raw_hashes(b):
        for split in sorted({*raw_hashes(a), *raw_hashes(b)}):
            old, new = raw_hashes(a).get(split, ABSENT), raw_hashes(b).get(split, ABSENT)
            if old != new:
                yield Difference(Group.accuracy, f"data.raw images of {split}, SHA-256", old, new, AGREE)
    yield from code_difference(objects(a.block.get("code")), objects(b.block.get("code")))
    if a.training is not None and b.training is not None:
        yield from live_differences(a.training, b.training)


AGREE, AS_MEASURED = "though its settings agree", "as measured"
INITIAL, MANIFEST, PIXELS = "model.initial weights, SHA-256", "data.manifest, SHA-256", "augmentation.pixels, SHA-256"
HASHES = (
    ("training", "augmentation_sha256", PIXELS, AGREE),
    ("data", "class_list_sha256", "data.class list, SHA-256", AGREE),
    ("data", "manifest_sha256", MANIFEST, AGREE),
    ("training", "architecture_sha256", "model.architecture, SHA-256", AGREE),
    ("training", "initial_weights_sha256", INITIAL, AGREE),
    ("evaluation", "transform_sha256", "evaluation.pixels, SHA-256", AS_MEASURED),
    ("evaluation", "protocol", "evaluation.protocol", AS_MEASURED),
)


def implied_hashes(a: Side, b: Side) -> set[str]:
    """Hashes that have to differ, since something does that goes into them."""
    changed = {key for key in {*a.config, *b.config} if a.config.get(key) != b.config.get(key)}
    implied = {INITIAL, PIXELS} if "seed" in changed else set()
    if any(key.startswith("model.") and not key.startswith("model.description") for key in changed):
        implied.add(INITIAL)
    if any(key.startswith("data.") and not key.startswith("data.description") for key in changed):
        implied.add(MANIFEST)
    return implied


def code_difference(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Difference]:
    """The source of the training."""
    old, new = before.get("source_sha256"), after.get("source_sha256")
    if old and new and old != new:
        commits = f"commits {spelled(before.get('commit'))} and {spelled(after.get('commit'))}"
        yield Difference(Group.accuracy, "code.source_sha256", old, new, commits)


def raw_hashes(side: Side) -> dict[str, Any]:
    return {
        name: objects(split).get("raw_sha256") for name, split in objects(side.claims("data").get("splits")).items()
    }


def live_differences(before: TrainingRecord, after: TrainingRecord) -> Iterator[Difference]:
    """What was read back from optimizer, loss, network and loader."""
    old, new = live(before), live(after)
    for key in dict.fromkeys([*old, *new]):
        if old.get(key, ABSENT) != new.get(key, ABSENT):
            group = Group.last_digits if key.startswith("trainer.") else Group.accuracy
            yield Difference(group, key, old.get(key, ABSENT), new.get(key, ABSENT), "as run")


def live(record: TrainingRecord) -> dict[str, Any]:
    """Live settings by the chapter that they belong to."""
    groups = {group.name: msgspec.to_builtins(group.settings) for group in record.parameter_groups}
    chapters = {
        "optimization": {"optimizer": record.optimizer, "groups": groups, "loss": record.loss},
        "optimization.averaging": record.averaging,
        "augmentation": record.augmentation,
        "model.batch_norm": record.model.batch_norm,
        "model.alterations": record.model.alterations,
        "trainer.precision": {"forward_and_backward": record.precision.get("forward_and_backward")},
        "trainer.arithmetic": {key: value for key, value in record.precision.items() if key != "forward_and_backward"},
    }
    return flatten(chapters)


MACHINE = ("processes", "accelerator")


def circumstance_differences(a: Side, b: Side) -> Iterator[Difference]:
    """Hardware, versions, processes and threads; the code has a line of its own."""
    before, after = (objects(side.block.get("circumstances")) for side in (a, b))
    if not (before and after):
        before, after = ({key: side.claims("training").get(key) for key in MACHINE} for side in (a, b))
    for key in dict.fromkeys([*before, *after]):
        old, new = before.get(key, ABSENT), after.get(key, ABSENT)
        if old != new and key != "the source":
            yield Difference(Group.last_digits, key, old, new)


def not_compared(a: Side, b: Side) -> list[str]:
    """Chapters that only one of them, or neither, has."""
    lines = []
    for chapter in ("data", "training", "evaluation", "serialization"):
        has = [bool(side.claims(chapter)) for side in (a, b)]
        if not all(has) and (any(has) or chapter != "serialization"):
            who = "neither has" if not any(has) else f"{'B' if has[0] else 'A'} does not have"
            lines.append(f"{chapter}: {who} a record of it")
    return lines
