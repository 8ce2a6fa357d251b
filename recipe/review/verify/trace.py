"""The trace of a recipe beside that of this checkout: ten optimizer steps on a few drawn images.

Counts, draws and evaluations must be equal. Sums in floating point may differ in the last digits. The tolerance is six
times the largest harmless difference that was measured (1 to 4 threads, torch 2.11 and 2.15: benchmarks/canary.py).

A processor without AVX2 resizes by other arithmetic: a pixel in a few hundred is one level brighter or darker. Pixels
of such a machine cannot be compared, and the sums get a larger tolerance.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from recipe.config.identity import flatten
from recipe.errors import UserError
from recipe.review.findings import Kind
from recipe.review.opening import OpenedRecipe
from recipe.review.reproduce.parse import parse_config
from recipe.run.records import EvaluationProbe, Fingerprint, ProbeStep, record_sha256
from recipe.training.fingerprint import take_fingerprint

TOLERANCE = 1.25e-3  # relative
TOLERANCE_OF_OTHER_PIXELS = 0.2
TOLERATED_COUNT = 2  # of 160 images: two classes may be as likely as one another, and the last digits decide
SCHEDULE_TOLERANCE = 1e-12  # relative: a closed form
WITHOUT_AVX2 = ("DEFAULT", "NO AVX")
CHANGED, UNDECIDED = "changed", Kind.cannot_tell.value
LARGEST_COUNT = 10**8


class TraceDifference(msgspec.Struct, frozen=True):
    """One value that differs. `cannot tell`: this machine could not have made it equal."""

    what: str
    recipe: str
    here: str
    kind: str = CHANGED

    def line(self) -> str:
        return f"{self.what}: {self.recipe} in the recipe, {self.here} here"


def stored_trace(recipe: OpenedRecipe) -> Fingerprint:
    """The recipe's own trace, from its records. Raises `UserError` where it has none or another one than it claims."""
    claimed = recipe.required_block().get("fingerprint_sha256")
    if claimed is None:
        raise UserError(f"{recipe.name} has no fingerprint: the code was edited while it was training, or before it")
    trace = recipe.run.read(Fingerprint) if recipe.run is not None else None
    if trace is None:
        raise UserError(
            f"{recipe.name} names its fingerprint by its hash only, and records/fingerprint.json is not beside it: "
            "give the folder with the records"
        )
    if record_sha256(trace) != claimed:
        raise UserError(f"records/fingerprint.json of {recipe.name} is not the one that the document names by its hash")
    return trace


def trace_here(recipe: OpenedRecipe) -> Fingerprint:
    """The trace of the recipe's configuration by the code of this checkout. Raises `UserError`."""
    block, sizes = recipe.required_block(), []
    for chapter, name in (("training", "steps_per_epoch"), ("data", "classes")):
        size = recipe.claims(chapter).get(name)
        if type(size) is not int or not 1 <= size <= LARGEST_COUNT:
            raise UserError(
                f"{recipe.name} claims {name}={size!r:.100}, which must be a number from 1 to {LARGEST_COUNT}"
            )
        sizes.append(size)
    return take_fingerprint(parse_config(block), *sizes)


def compare_traces(recipe: Fingerprint, here: Fingerprint) -> list[TraceDifference]:
    """All differences, causes before their effects."""
    same_pixels = (recipe.instructions.upper() in WITHOUT_AVX2) == (here.instructions.upper() in WITHOUT_AVX2)
    tolerance = TOLERANCE if same_pixels else TOLERANCE_OF_OTHER_PIXELS
    kind = CHANGED if same_pixels else UNDECIDED  # of what follows from pixels
    differences = _Differences()
    differences.equal("architecture", recipe.architecture_sha256[:16], here.architecture_sha256[:16])
    differences.equal("parameters", recipe.parameters, here.parameters)
    differences.schedule(recipe.learning_rates, here.learning_rates)
    differences.settings("optimizer group", _optimizer_groups(recipe), _optimizer_groups(here))
    differences.settings("", recipe.facts, here.facts)
    differences.equal("order of the images", recipe.order_sha256[:16], here.order_sha256[:16])
    pixels = "pixels of the augmentation"
    differences.equal(pixels, recipe.augmentation_sha256[:16], here.augmentation_sha256[:16], kind)
    differences.equal("pixels of the evaluation", recipe.evaluation_sha256[:16], here.evaluation_sha256[:16], kind)
    differences.equal("probe steps", len(recipe.steps), len(here.steps))
    for number, (theirs, ours) in enumerate(zip(recipe.steps, here.steps, strict=False), start=1):
        step = _Differences()
        step.step(f"probe step {number}:", theirs, ours, tolerance)
        differences += step
        if step:
            break  # later steps differ because of this one
    theirs_counted, ours_counted = recipe.training_counts, here.training_counts  # images, top-1, top-5, skipped steps
    differences.equal("counts of the training", theirs_counted[::3], ours_counted[::3])
    pairs = zip(theirs_counted[1:3], ours_counted[1:3], strict=False)
    if any(abs(one - other) > TOLERATED_COUNT for one, other in pairs):
        differences.equal("counts of the training", theirs_counted, ours_counted, kind)
    differences.evaluation(recipe.evaluation, here.evaluation, tolerance, kind)
    return list(differences)


def _optimizer_groups(trace: Fingerprint) -> dict[str, Any]:
    """Settings of the live optimizer. Its learning rate is compared as the schedule."""
    return {
        group.name: {"tensors": group.tensors, "parameters": group.parameters, "settings": group.settings}
        for group in trace.parameter_groups
    }


class _Differences(list[TraceDifference]):
    """Differences so far. Each comparison takes the recipe's value and the one of this checkout."""

    def equal(self, what: str, recipe: Any, here: Any, kind: str = CHANGED) -> None:
        if recipe != here:
            self.append(TraceDifference(what, str(recipe), str(here), kind))

    def close(self, what: str, recipe: float, here: float, tolerance: float, scale: float | None = None) -> None:
        """Relative to the recipe's value, or to `scale` for values near zero. NaN differs from everything."""
        allowed = tolerance * max(abs(recipe) if scale is None else scale, 1e-30)
        if not (math.isfinite(recipe) and abs(recipe - here) <= allowed):
            self.append(TraceDifference(what, f"{recipe:.9g}", f"{here:.9g}"))

    def all_close(self, what: str, recipe: list[float], here: list[float], tolerance: float, scale: float) -> None:
        if len(recipe) != len(here):
            self.equal(what, len(recipe), len(here))
            return
        apart = max((abs(one - other) for one, other in zip(recipe, here, strict=True)), default=0.0)
        if not apart <= tolerance * scale:
            allowed = f"within {tolerance:g} of the largest logit"
            self.append(TraceDifference(what, allowed, f"{apart / max(scale, 1e-30):.2g}"))

    def settings(self, what: str, recipe: dict[str, Any], here: dict[str, Any]) -> None:
        theirs, ours = flatten(recipe), flatten(here)
        for key in sorted(theirs.keys() | ours.keys()):
            self.equal(f"{what} {key}".strip(), theirs.get(key, "(absent)"), ours.get(key, "(absent)"))

    def schedule(self, recipe: list[float], here: list[float]) -> None:
        """The first point of the learning rate that differs, and their number."""
        if len(recipe) != len(here):
            self.equal("points of the learning rate", len(recipe), len(here))
            return
        allowed = SCHEDULE_TOLERANCE * max(recipe, default=0.0)
        wrong = [at for at, rate in enumerate(recipe) if not abs(here[at] - rate) <= allowed]
        if wrong:
            share = 100 * wrong[0] // max(1, len(recipe) - 1)
            what = f"learning rate at {len(wrong)} of {len(recipe)} points, first after {share} % of training"
            self.append(TraceDifference(what, f"{recipe[wrong[0]]:.9g}", f"{here[wrong[0]]:.9g}"))

    def step(self, where: str, recipe: ProbeStep, here: ProbeStep, tolerance: float) -> None:
        self.equal(f"{where} position", (recipe.step, recipe.epoch), (here.step, here.epoch))
        self.equal(f"{where} images", recipe.indices, here.indices)
        self.close(f"{where} learning rate", recipe.learning_rate, here.learning_rate, SCHEDULE_TOLERANCE)
        scale = abs(recipe.images_std)
        self.close(f"{where} mean of the input", recipe.images_mean, here.images_mean, tolerance, scale)
        self.close(f"{where} deviation of the input", recipe.images_std, here.images_std, tolerance)
        self.close(f"{where} loss", recipe.loss, here.loss, tolerance)
        self.close(f"{where} norm of the gradient", recipe.gradient_norm, here.gradient_norm, tolerance)
        self.equal(f"{where} what moves", sorted(recipe.distances), sorted(here.distances))
        for name in sorted(recipe.distances.keys() & here.distances.keys()):
            self.close(f"{where} way of {name}", recipe.distances[name], here.distances[name], tolerance)

    def evaluation(self, recipe: EvaluationProbe, here: EvaluationProbe, tolerance: float, kind: str) -> None:
        """The evaluator on the validation images. The scale of its numbers is the largest logit."""
        scale = max((abs(logit) for logit in recipe.logits), default=0.0)
        self.equal("labels of the evaluation", recipe.labels, here.labels)
        self.all_close("logits of the evaluation", recipe.logits, here.logits, tolerance, scale)
        self.all_close("margins of the evaluation", recipe.margins, here.margins, 2 * tolerance, scale)
        self.all_close("losses of the evaluation", recipe.losses, here.losses, 2 * tolerance, scale)
        self.close("loss of the evaluation", recipe.loss, here.loss, 2 * tolerance, scale)
        self.equal("classes kept for each image", recipe.best_classes, here.best_classes)
        self.equal("correct within 1 to 5", recipe.correct, here.correct, kind)
        self.equal("accuracy within 1 and 5", recipe.accuracies, here.accuracies, kind)
        self.equal("counts of each class", recipe.class_counts, here.class_counts, kind)
