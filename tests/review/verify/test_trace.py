"""The fingerprint of a recipe's code: equal without a change, and moved by each fault of the catalogue."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from benchmarks.canary import FAULTS, SMALL, Fault, caught, taken
from recipe.config.compose import config_from_overrides
from recipe.config.identity import flatten
from recipe.review.verify.trace import CHANGED, TOLERANCE, UNDECIDED, compare_traces
from recipe.run.files import CHECKOUT
from recipe.run.records import Fingerprint, from_json
from recipe.training.fingerprint import LARGEST_PIXELS, canary_config

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def clean() -> Fingerprint:
    return taken(SMALL)


def test_the_same_code_gives_the_same_bits_and_no_finding(clean: Fingerprint) -> None:
    again = taken(SMALL)
    assert again == clean
    assert compare_traces(clean, again) == []
    assert len(clean.steps) == 10
    assert {step.epoch for step in clean.steps} == set(range(5)), "the steps are spread over the whole schedule"


@pytest.mark.process
def test_state_left_by_another_recipe_changes_nothing() -> None:
    """torch wraps an optimizer class at its first use, and ours is a subclass of one of its own."""
    decoupled = ("experiment=smoke", "optimization.epochs=1", "optimization.optimizer=sgdw")
    script = "from benchmarks.canary import taken; from recipe.run.records import to_json; import sys;"
    script += f"sys.stdout.buffer.write(to_json(taken({decoupled!r})))"
    alone = subprocess.run([sys.executable, "-c", script], cwd=CHECKOUT, capture_output=True, check=True).stdout
    taken(SMALL)
    assert from_json(alone, Fingerprint, "alone").steps == taken(decoupled).steps


def test_torch_is_left_as_it_was(clean: Fingerprint) -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    taken(("experiment=smoke", "optimization.epochs=1"))
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def evaluated(clean: Fingerprint, **values: Any) -> dict[str, Any]:
    """Another evaluation."""
    return {"evaluation": msgspec.structs.replace(clean.evaluation, **values)}


CHANGES: list[tuple[Callable[[Any], dict[str, Any]], str]] = [
    (lambda f: {"architecture_sha256": "0" * 64}, "architecture"),
    (lambda f: {"parameters": f.parameters + 1}, "parameters"),
    (lambda f: {"learning_rates": [*f.learning_rates[:-1], 1.0]}, "learning rate at 1 of"),
    (lambda f: {"order_sha256": "0" * 64}, "order of the images"),
    (lambda f: {"augmentation_sha256": "0" * 64}, "pixels of the augmentation"),
    (lambda f: evaluated(f, labels=f.evaluation.labels[::-1]), "labels of the evaluation"),
    (lambda f: evaluated(f, logits=[2 * logit for logit in f.evaluation.logits]), "logits of the evaluation"),
    (lambda f: evaluated(f, logits=f.evaluation.logits[1:]), "logits of the evaluation"),
    (lambda f: evaluated(f, margins=[margin + 1.0 for margin in f.evaluation.margins]), "margins of the evaluation"),
    (lambda f: evaluated(f, losses=[float("nan")] * len(f.evaluation.losses)), "losses of the evaluation"),
    (lambda f: evaluated(f, loss=2 * f.evaluation.loss), "loss of the evaluation"),
    (lambda f: evaluated(f, best_classes=6), "classes kept for each image"),
    (lambda f: evaluated(f, correct=[0, 0]), "correct within 1 to 5"),
    (lambda f: evaluated(f, accuracies=[1.0, 0.0]), "accuracy within 1 and 5"),
    (lambda f: evaluated(f, class_counts=f.evaluation.class_counts[1:]), "counts of each class"),
    (lambda f: {"facts": {**f.facts, "loss": {}}}, "loss"),
    (lambda f: {"steps": f.steps[:-1]}, "probe steps"),
    (lambda f: {"training_counts": [159, *f.training_counts[1:]]}, "counts of the training"),
    (lambda f: {"training_counts": [160, *(count + 3 for count in f.training_counts[1:3]), 0]}, "counts of the"),
]


@pytest.mark.parametrize(("change", "what"), CHANGES)
def test_every_part_is_compared(clean: Fingerprint, change: Callable[[Any], dict[str, Any]], what: str) -> None:
    found = compare_traces(clean, msgspec.structs.replace(clean, **change(clean)))
    assert found
    assert found[0].what.startswith(what)
    assert {difference.kind for difference in found} == {CHANGED}


def stepped(clean: Fingerprint, **values: Any) -> Fingerprint:
    """With another third step."""
    steps = list(clean.steps)
    steps[2] = msgspec.structs.replace(steps[2], **values)
    return msgspec.structs.replace(clean, steps=steps)


@pytest.mark.parametrize("name", ["loss", "gradient_norm", "images_std"])
def test_sums_may_differ_within_the_tolerance_and_no_further(clean: Fingerprint, name: str) -> None:
    value = getattr(clean.steps[2], name)
    assert compare_traces(clean, stepped(clean, **{name: value * (1 + 0.5 * TOLERANCE)})) == []
    found = compare_traces(clean, stepped(clean, **{name: value * (1 + 2 * TOLERANCE)}))
    assert [difference.what.startswith("probe step 3:") for difference in found] == [True]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_differ(clean: Fingerprint, value: float) -> None:
    assert compare_traces(clean, stepped(clean, loss=value))
    assert compare_traces(stepped(clean, loss=value), clean)


def test_a_processor_that_rounds_pixels_otherwise_cannot_tell(clean: Fingerprint) -> None:
    other = msgspec.structs.replace(clean, instructions="DEFAULT", augmentation_sha256="0" * 64)
    assert [difference.kind for difference in compare_traces(clean, other)] == [UNDECIDED]
    assert [difference.kind for difference in compare_traces(other, clean)] == [UNDECIDED]


def every_experiment() -> list[str]:
    from recipe.review.verify.code import EXPERIMENTS

    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


@pytest.mark.parametrize("name", every_experiment())
def test_the_canary_is_the_recipe_but_for_what_a_laptop_cannot_do(name: str, tmp_path: Any) -> None:
    config = config_from_overrides([f"experiment={name}"])
    small = canary_config(config, tmp_path)
    assert max(small.augmentation.crop_pixels, small.evaluation.crop_pixels) <= LARGEST_PIXELS
    assert small.optimization.batch_size % (small.augmentation.repeated_augmentation) == 0
    assert small.optimization.batch_size % small.augmentation.mixup.group_size == 0
    before, after = flatten(config.pinned.values), flatten(small.pinned.values)
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= MADE_SMALLER, changed - MADE_SMALLER


MADE_SMALLER = {
    *(f"data.{name}" for name in ("name", "source", "expect", "train_images_per_class", "validation_images_per_class")),
    *(f"optimization.{name}" for name in ("batch_size", "learning_rate")),
    *(f"optimization.ema.{name}" for name in ("every_steps", "precise_bn_images")),
    *(
        f"augmentation.{name}"
        for name in ("crop_pixels", "progressive_resizing.first_pixels", "progressive_resizing.multiple")
    ),
    "augmentation.mixup.group_size",
    *(f"trainer.{name}" for name in ("precision", "compile", "deterministic", "log_every_steps")),
    *(f"evaluation.{name}" for name in ("resize_pixels", "crop_pixels", "batch_size")),
}


@pytest.mark.slow
def test_every_fault_of_the_catalogue_is_caught(capsys: pytest.CaptureFixture[str]) -> None:
    fingerprints = {words: taken(words) for words in dict.fromkeys(fault.words for fault in FAULTS)}
    rows = [caught(fault, fingerprints[fault.words]) for fault in FAULTS]
    with capsys.disabled():
        for row in rows:
            print(f"\n{'caught' if row.first else 'MISSED'} {row.fault}: {row.first} | {row.behaviour}", end="")
        print(f"\n{sum(bool(row.first) for row in rows)} of {len(rows)} faults caught")
    assert len(rows) >= 25
    assert all(row.first for row in rows)


FEW = ("labels + 1", "evaluated in training mode", "no flip")


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.name in FEW], ids=lambda fault: fault.name)
def test_faults_that_no_setting_shows_are_caught_by_behaviour(fault: Fault, clean: Fingerprint) -> None:
    assert caught(fault, clean).behaviour
