"""Two fingerprints beside each other: does this checkout do what the recipe's code did?

What is counted, drawn or evaluated exactly must be equal. What is summed in floating point may differ in the last
digits; the tolerance is six times the largest harmless difference that was measured (1 to 4 threads, torch 2.11 and
2.15: benchmarks/canary.py).

A processor without AVX2 resizes by other arithmetic, and a pixel in a few hundred is one level brighter or darker: then
pixels cannot be compared exactly, which is said, and the sums get the tolerance of that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from recipe.config.identity import flatten
from recipe.errors import UserError
from recipe.records import Fingerprint, ProbeStep
from recipe.review.opening import Subject

TOLERANCE = 1.25e-3  # relative
TOLERANCE_OF_OTHER_PIXELS = 0.2
TOLERATED_COUNT = 2  # of 160 images: two classes may be as likely as one another, and the last digits decide
SCHEDULE_TOLERANCE = 1e-12  # relative: a closed form
WITHOUT_AVX2 = ("DEFAULT", "NO AVX")
CHANGED, CANNOT_TELL = "changed", "cannot tell"


@dataclass(frozen=True)
class Difference:
    """One thing that is not as the recipe has it; `cannot tell` where this machine could not have made it equal."""

    what: str
    recipe: str
    here: str
    kind: str = CHANGED

    def line(self) -> str:
        """For a person."""
        return f"{self.what}: {self.recipe} in the recipe, {self.here} here"


def stored_fingerprint(subject: Subject) -> Fingerprint:
    """The recipe's own, from the document's block; raises `UserError` where there is none."""
    value = subject.claims().get("fingerprint")
    if value is None:
        raise UserError(f"{subject.name} holds no fingerprint: the code was edited while it was training, or before it")
    try:
        return msgspec.convert(value, Fingerprint)
    except (msgspec.ValidationError, RecursionError) as error:
        raise UserError(f"the fingerprint of {subject.name} does not fit this version of the code: {error}") from error


def compared(recipe: Fingerprint, here: Fingerprint) -> list[Difference]:
    """Everything in which the two differ, what was decided before what follows from it."""
    same_pixels = _makes_pixels_alike(recipe) == _makes_pixels_alike(here)
    tolerance = TOLERANCE if same_pixels else TOLERANCE_OF_OTHER_PIXELS
    return [
        *_equal("architecture", recipe.architecture_sha256[:16], here.architecture_sha256[:16]),
        *_equal("parameters", recipe.parameters, here.parameters),
        *_schedule(recipe, here),
        *_groups(recipe, here),
        *_facts(recipe, here),
        *_equal("order of the images", recipe.order_sha256[:16], here.order_sha256[:16]),
        *_pixels(recipe, here, same_pixels),
        *_steps(recipe, here, tolerance),
        *_counts(recipe, here, same_pixels),
        *_evaluation(recipe, here, tolerance, same_pixels),
    ]


def _makes_pixels_alike(fingerprint: Fingerprint) -> bool:
    """Whether the processor resizes in AVX2's integers."""
    return fingerprint.instructions.upper() not in WITHOUT_AVX2


def _equal(what: str, recipe: Any, here: Any) -> Iterator[Difference]:
    if recipe != here:
        yield Difference(what, str(recipe), str(here))


def _close(what: str, recipe: float, here: float, tolerance: float, scale: float | None = None) -> Iterator[Difference]:
    """Relative to the recipe's value, or to `scale` where the value may be near zero; numbers that are none differ."""
    allowed = tolerance * max(abs(recipe) if scale is None else scale, 1e-30)
    if not (math.isfinite(recipe) and abs(recipe - here) <= allowed):
        yield Difference(what, f"{recipe:.9g}", f"{here:.9g}")


def _schedule(recipe: Fingerprint, here: Fingerprint) -> Iterator[Difference]:
    """The first point of the learning rate that differs, with how many do."""
    ours, theirs = here.learning_rates, recipe.learning_rates
    if len(ours) != len(theirs):
        yield Difference("points of the learning rate", str(len(theirs)), str(len(ours)))
        return
    peak = max(theirs, default=0.0)
    wrong = [k for k, rate in enumerate(theirs) if not abs(ours[k] - rate) <= SCHEDULE_TOLERANCE * peak]
    if wrong:
        share = 100 * wrong[0] // max(1, len(theirs) - 1)
        what = f"learning rate at {len(wrong)} of {len(theirs)} points, first after {share} % of training"
        yield Difference(what, f"{theirs[wrong[0]]:.9g}", f"{ours[wrong[0]]:.9g}")


def _groups(recipe: Fingerprint, here: Fingerprint) -> Iterator[Difference]:
    """Settings of the live optimizer; its learning rate is left to the schedule."""
    yield from _leaves("optimizer group", _by_name(recipe), _by_name(here))


def _by_name(fingerprint: Fingerprint) -> dict[str, Any]:
    return {
        group.name: {"tensors": group.tensors, "parameters": group.parameters, "settings": group.settings}
        for group in fingerprint.parameter_groups
    }


def _facts(recipe: Fingerprint, here: Fingerprint) -> Iterator[Difference]:
    yield from _leaves("", recipe.facts, here.facts)


def _leaves(what: str, recipe: dict[str, Any], here: dict[str, Any]) -> Iterator[Difference]:
    theirs, ours = flatten(recipe), flatten(here)
    for key in sorted(theirs.keys() | ours.keys()):
        yield from _equal(f"{what} {key}".strip(), theirs.get(key, "(absent)"), ours.get(key, "(absent)"))


def _pixels(recipe: Fingerprint, here: Fingerprint, same_pixels: bool) -> Iterator[Difference]:
    """What augmentation and evaluation make of fixed pictures, to the last bit."""
    for what, theirs, ours in (
        ("pixels of the augmentation", recipe.augmentation_sha256, here.augmentation_sha256),
        ("pixels of the evaluation", recipe.evaluation_sha256, here.evaluation_sha256),
    ):
        if theirs != ours:
            yield Difference(what, theirs[:16], ours[:16], CHANGED if same_pixels else CANNOT_TELL)


def _steps(recipe: Fingerprint, here: Fingerprint, tolerance: float) -> Iterator[Difference]:
    """The first step at which the traces part; what comes after it follows from it."""
    yield from _equal("probe steps", len(recipe.steps), len(here.steps))
    for number, (theirs, ours) in enumerate(zip(recipe.steps, here.steps, strict=False), start=1):
        found = list(_step(f"probe step {number}:", theirs, ours, tolerance))
        if found:
            yield from found
            return


def _step(where: str, theirs: ProbeStep, ours: ProbeStep, tolerance: float) -> Iterator[Difference]:
    yield from _equal(f"{where} position", (theirs.step, theirs.epoch), (ours.step, ours.epoch))
    yield from _equal(f"{where} images", theirs.indices, ours.indices)
    yield from _close(f"{where} learning rate", theirs.learning_rate, ours.learning_rate, SCHEDULE_TOLERANCE)
    scale = abs(theirs.images_std)
    yield from _close(f"{where} mean of the input", theirs.images_mean, ours.images_mean, tolerance, scale)
    yield from _close(f"{where} deviation of the input", theirs.images_std, ours.images_std, tolerance)
    yield from _close(f"{where} loss", theirs.loss, ours.loss, tolerance)
    yield from _close(f"{where} norm of the gradient", theirs.gradient_norm, ours.gradient_norm, tolerance)
    yield from _equal(f"{where} what moves", sorted(theirs.distances), sorted(ours.distances))
    for name in sorted(theirs.distances.keys() & ours.distances.keys()):
        yield from _close(f"{where} way of {name}", theirs.distances[name], ours.distances[name], tolerance)


def _counts(recipe: Fingerprint, here: Fingerprint, same_pixels: bool) -> Iterator[Difference]:
    """What training counted over all steps: images, those that were right, steps that were skipped."""
    what, theirs, ours = "counts of the training", recipe.training_counts, here.training_counts
    yield from _equal(what, theirs[::3], ours[::3])
    if any(abs(one - other) > TOLERATED_COUNT for one, other in zip(theirs[1:3], ours[1:3], strict=False)):
        kind = CHANGED if same_pixels else CANNOT_TELL
        yield Difference(what, str(theirs), str(ours), kind)


def _evaluation(recipe: Fingerprint, here: Fingerprint, tolerance: float, same_pixels: bool) -> Iterator[Difference]:
    """What the evaluator says of the validation images; numbers are held to the size of the logits they come from."""
    theirs, ours = recipe.evaluation, here.evaluation
    scale = max((abs(logit) for logit in theirs.logits), default=0.0)
    yield from _equal("labels of the evaluation", theirs.labels, ours.labels)
    yield from _row("logits of the evaluation", theirs.logits, ours.logits, tolerance, scale)
    yield from _row("margins of the evaluation", theirs.margins, ours.margins, 2 * tolerance, scale)
    yield from _row("losses of the evaluation", theirs.losses, ours.losses, 2 * tolerance, scale)
    yield from _close("loss of the evaluation", theirs.loss, ours.loss, 2 * tolerance, scale)
    yield from _equal("classes kept for each image", theirs.best_classes, ours.best_classes)
    for what, counted, here_counted in (
        ("correct within 1 to 5", theirs.correct, ours.correct),
        ("accuracy within 1 and 5", theirs.accuracies, ours.accuracies),
        ("counts of each class", theirs.class_counts, ours.class_counts),
    ):
        if counted != here_counted:
            kind = CHANGED if same_pixels else CANNOT_TELL
            yield Difference(what, str(counted), str(here_counted), kind)


def _row(what: str, recipe: list[float], here: list[float], tolerance: float, scale: float) -> Iterator[Difference]:
    """Many numbers of one kind, by the two that lie farthest apart."""
    if len(recipe) != len(here):
        yield Difference(what, str(len(recipe)), str(len(here)))
        return
    apart = max((abs(one - other) for one, other in zip(recipe, here, strict=True)), default=0.0)
    if not apart <= tolerance * scale:
        yield Difference(what, f"within {tolerance:g} of the largest logit", f"{apart / max(scale, 1e-30):.2g}")
