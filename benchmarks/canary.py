"""How far may the canary's numbers move, and how far does a fault move them?

    python benchmarks/canary.py                                    # here: threads, processor instructions, faults
    python benchmarks/canary.py --python /other/venv/bin/python    # and another torch's numbers

The tolerance of `recipe.review.verify.trace` has to be between the two: above harmless differences, below faults.
Writes benchmarks/results/canary.md. The faults are a test too: tests/review/verify/test_trace.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from recipe.config.compose import config_from_overrides  # noqa: E402
from recipe.data.augment.crop import Augmentation  # noqa: E402
from recipe.data.batches import EvaluationBatches, TrainingBatches  # noqa: E402
from recipe.data.decoding import PartialImage  # noqa: E402
from recipe.data.transforms import EvaluationTransform, Normalisation  # noqa: E402
from recipe.evaluation import Predictions  # noqa: E402
from recipe.review.verify.trace import TOLERANCE, compare_traces  # noqa: E402
from recipe.run.records import Fingerprint, from_json, to_json  # noqa: E402
from recipe.training import build, fingerprint, metrics  # noqa: E402
from recipe.training.ema import ModelEma  # noqa: E402
from recipe.training.fingerprint import take_fingerprint  # noqa: E402
from recipe.training.optim import LearningRate  # noqa: E402

STEPS_PER_EPOCH, CLASSES = 15, 12
SMALL = ("experiment=smoke", "optimization.epochs=5", "optimization.ema.decay=0.9")
RESNET50 = (*SMALL, "model=resnet50", "model.zero_init_last_norm=true")
Patch = Callable[[ExitStack], None]


def taken(words: tuple[str, ...], threads: int = 1) -> Fingerprint:
    """The fingerprint of these settings, by the code as it is now."""
    return take_fingerprint(config_from_overrides(list(words)), STEPS_PER_EPOCH, CLASSES, threads)


# ---- faults: changes of the code, while every setting stays as it is --------------------------------


@dataclass(frozen=True)
class Fault:
    """A mistake that somebody makes one day."""

    name: str
    words: tuple[str, ...]
    patch: Patch


def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Patch:
    """Put `make(original)` in the place of an attribute."""

    def patch(held: ExitStack) -> None:
        held.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))

    return patch


def all_of(*patches: Patch) -> Patch:
    """Several at once."""

    def patch(held: ExitStack) -> None:
        for one in patches:
            one(held)

    return patch


def other_optimizer(**changes: float) -> Patch:
    """The optimizer built from settings that are multiplied or replaced behind the configuration's back."""

    def make(original: Any) -> Any:
        def built(config: Any, model: nn.Module, device: torch.device) -> Any:
            values = {key: value(getattr(config, key)) if callable(value) else value for key, value in changes.items()}
            return original(replace(config, **values), model, device)

        return built

    return replaced(build, "build_optimizer", make)


def other_model(change: Callable[[nn.Module], None]) -> Patch:
    """The network, changed after it was built."""

    def make(original: Any) -> Any:
        def built(*arguments: Any) -> nn.Module:
            model: nn.Module = original(*arguments)
            change(model)
            return model

        return built

    return all_of(replaced(build, "build_model", make), replaced(fingerprint, "build_model", make))


def larger_epsilon(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3


def no_zero_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)


def strides_of_version_1(model: nn.Module) -> None:
    """The first convolution of a bottleneck strides, as in the paper, instead of the second."""
    for module in model.modules():
        if type(module).__name__ == "Bottleneck" and module.stride != 1:  # type: ignore[comparison-overlap]
            module.conv1.stride, module.conv2.stride = (2, 2), (1, 1)  # type: ignore[union-attr]


def other_labels(original: Any) -> Any:
    def epoch(self: TrainingBatches, *arguments: Any) -> Iterator[Any]:
        for batches in original(self, *arguments):
            yield [batch._replace(labels=(batch.labels + 1) % CLASSES) for batch in batches]

    return epoch


def in_bgr(original: Any) -> Any:
    def part(self: PartialImage, *box: int) -> torch.Tensor:
        return original(self, *box).flip(0)

    return part


def swapped(original: Any) -> Any:
    def init(self: Normalisation, mean: Any, std: Any, device: Any) -> None:
        original(self, std, mean, device)

    return init


def without_flip(original: Any) -> Any:
    def random_crop(self: Augmentation, *arguments: Any, **named: Any) -> Any:
        return original(self, *arguments, **named)._replace(flip=False)

    return random_crop


def one_epoch_order(original: Any) -> Any:
    def order(seed: int, epoch: int, images: int) -> Any:
        return original(seed, 0, images)

    return order


def smaller_resize(original: Any) -> Any:
    def built(config: Any) -> Any:
        transform = original(config)
        return replace(transform, resize_pixels=round(transform.resize_pixels * 232 / 256))

    return built


def without_smoothing(original: Any) -> Any:
    def built(config: Any) -> Any:
        return original(replace(config, label_smoothing=0.0))

    return built


def unaveraged(original: Any) -> Any:
    def update(self: ModelEma, step: int) -> None:
        original(self, step)
        if self.is_on:
            self.model.load_state_dict(self.followed.state_dict())

    return update


def slower(original: Any) -> Any:
    def decay_now(self: ModelEma) -> float:
        return min(0.99, (1 + self.updates) / (10 + self.updates))

    return decay_now


def in_training_mode(original: Any) -> Any:
    def made(model: nn.Module, *arguments: Any, **named: Any) -> Any:
        predict = original(model, *arguments, **named)
        model.train()
        return predict

    return made


def one_image_late(original: Any) -> Any:
    def iterate(self: EvaluationBatches) -> Any:
        for batch in original(self):
            yield batch._replace(labels=batch.labels.roll(1))

    return iterate


def without_antialias(original: Any) -> Any:
    def built(*arguments: Any) -> Any:
        return replace(original(*arguments), antialias=False)

    return built


def smaller_crops(original: Any) -> Any:
    def built(*arguments: Any) -> Any:
        return replace(original(*arguments), scale=(0.08, 1.0))

    return built


def without_warmup(original: Any) -> Any:
    def built(*arguments: Any) -> Any:
        return replace(original(*arguments), warmup_steps=0)

    return built


def no_op(original: Any) -> Any:
    def nothing(self: Any, *arguments: Any, **named: Any) -> None:
        return None

    return nothing


def one_more(original: Any) -> Any:
    def correct(self: Predictions, within: int) -> Any:
        return original(self, within + 1)

    return correct


def corner(original: Any) -> Any:
    def crop(self: EvaluationTransform, image: torch.Tensor) -> torch.Tensor:
        wide = replace(self, crop_pixels=self.resize_pixels)
        return original(wide, image)[:, : self.crop_pixels, : self.crop_pixels]

    return crop


def twice(original: Any) -> Any:
    def normalised(self: Normalisation, images: torch.Tensor) -> torch.Tensor:
        return original(self, original(self, images))

    return normalised


def in_both(name: str, make: Callable[[Any], Any]) -> Patch:
    """A builder, for the training and for the fingerprint of the recipe's own size."""
    return all_of(replaced(build, name, make), replaced(fingerprint, name, make))


def at(step: Callable[[int], int], scale: float = 1.0) -> Callable[[Any], Any]:
    """The schedule at another step, or times a factor."""

    def make(original: Any) -> Any:
        def rate(self: LearningRate, number: int) -> float:
            return scale * original(self, step(number))

        return rate

    return make


FAULTS = [
    Fault("learning rate x 10", SMALL, replaced(LearningRate, "__call__", at(lambda step: step, 10.0))),
    Fault("schedule one step late", SMALL, replaced(LearningRate, "__call__", at(lambda step: max(0, step - 1)))),
    Fault("weight decay x 100", SMALL, other_optimizer(weight_decay=lambda value: 100 * value)),
    Fault("weight decay on norms and biases", SMALL, other_optimizer(decay_norms_and_biases=True)),
    Fault("momentum 0.85 for 0.9", SMALL, other_optimizer(momentum=0.85)),
    Fault("Nesterov's momentum", SMALL, other_optimizer(nesterov=True)),
    Fault("mean and deviation swapped", SMALL, replaced(Normalisation, "__init__", swapped)),
    Fault("BGR for RGB", SMALL, replaced(PartialImage, "part", in_bgr)),
    Fault("labels + 1", SMALL, replaced(TrainingBatches, "epoch", other_labels)),
    Fault("batch-norm eps 1e-3 for 1e-5", SMALL, other_model(larger_epsilon)),
    Fault("last norms do not start at zero", SMALL, other_model(no_zero_norms)),
    Fault("strides of version 1", RESNET50, other_model(strides_of_version_1)),
    Fault("no flip", SMALL, replaced(Augmentation, "random_crop", without_flip)),
    Fault(
        "every epoch in the order of the first",
        SMALL,
        replaced(sys.modules["recipe.data.batches"], "epoch_order", one_epoch_order),
    ),
    Fault("resize 232 for 256", SMALL, in_both("build_evaluation_transform", smaller_resize)),
    Fault("crop from the corner", SMALL, replaced(EvaluationTransform, "__call__", corner)),
    Fault("no antialiasing", SMALL, in_both("build_augmentation", without_antialias)),
    Fault("crops from 8 % of the area for 35 %", SMALL, in_both("build_augmentation", smaller_crops)),
    Fault("no warm-up", SMALL, in_both("build_schedule", without_warmup)),
    Fault("normalised twice", SMALL, replaced(Normalisation, "__call__", twice)),
    Fault("gradients never cleared", SMALL, replaced(torch.optim.SGD, "zero_grad", no_op)),
    Fault("counted within 2 for 1", SMALL, replaced(Predictions, "correct", one_more)),
    Fault("no label smoothing", SMALL, replaced(build, "build_loss", without_smoothing)),
    Fault("average with decay 0.99 for 0.9", SMALL, replaced(ModelEma, "decay_now", slower)),
    Fault("average not applied", SMALL, replaced(ModelEma, "update", unaveraged)),
    Fault("evaluated in training mode", SMALL, replaced(metrics, "predictor", in_training_mode)),
    Fault("validation labels one image late", SMALL, replaced(EvaluationBatches, "__iter__", one_image_late)),
]


@contextmanager
def committed(fault: Fault) -> Iterator[None]:
    """The fault is in the code while this is open."""
    with ExitStack() as held:
        fault.patch(held)
        yield


@dataclass(frozen=True)
class Caught:
    """What the comparison said about a fault."""

    fault: str
    first: str  # finding of all
    behaviour: str  # first finding in what was computed, not read back
    findings: int


def caught(fault: Fault, clean: Fingerprint) -> Caught:
    """Commit it and look."""
    with committed(fault):
        found = compare_traces(clean, taken(fault.words))
    computed = [difference for difference in found if is_computed(difference.what)]
    first, behaviour = (entries[0].what if entries else "" for entries in (found, computed))
    return Caught(fault.name, first, behaviour, len(found))


def is_computed(what: str) -> bool:
    """Whether this is behaviour: the trace of the steps, the evaluation, pixels."""
    return what.startswith(("probe step", "pixels of", "logits", "labels", "correct"))


# ---- harmless differences ---------------------------------------------------------------------------


def variant(words: tuple[str, ...], threads: int, python: str = sys.executable, **variables: str) -> Fingerprint:
    """The fingerprint as another process computes it."""
    done = subprocess.run(
        [python, __file__, "--print", str(threads), *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        check=True,
    )
    return from_json(done.stdout, Fingerprint, "the variant")


def spread(clean: Fingerprint, other: Fingerprint) -> dict[str, float]:
    """The largest relative difference of each quantity, over all steps."""
    found: dict[str, float] = {}

    def note(name: str, one: float, two: float, scale: float) -> None:
        found[name] = max(found.get(name, 0.0), abs(one - two) / max(scale, 1e-30))

    for ours, theirs in zip(clean.steps, other.steps, strict=True):
        note("mean of the input", ours.images_mean, theirs.images_mean, ours.images_std)
        note("deviation of the input", ours.images_std, theirs.images_std, ours.images_std)
        note("loss", ours.loss, theirs.loss, ours.loss)
        note("norm of the gradient", ours.gradient_norm, theirs.gradient_norm, ours.gradient_norm)
        for name, way in ours.distances.items():
            note("way of the weights", way, theirs.distances[name], way)
    ours_seen, theirs_seen = clean.evaluation, other.evaluation
    largest = max(abs(logit) for logit in ours_seen.logits)
    for ours_logit, theirs_logit in zip(ours_seen.logits, theirs_seen.logits, strict=True):
        note("logits", ours_logit, theirs_logit, largest)
    return found


def spreads(pythons: list[str]) -> Iterator[tuple[str, dict[str, float], bool]]:
    """(what is different, how far it moves the numbers, whether pixels stayed the same)."""
    variants: dict[str, Callable[[tuple[str, ...]], Fingerprint]] = {
        f"{threads} threads": lambda words, threads=threads: variant(words, threads) for threads in (2, 3, 4)
    }
    for capability, dnn in (("avx2", "AVX2"), ("default", "SSE41")):
        variants[f"instructions {capability}"] = lambda words, capability=capability, dnn=dnn: variant(
            words, 1, ATEN_CPU_CAPABILITY=capability, ONEDNN_MAX_CPU_ISA=dnn
        )
    for python in pythons:
        variants[f"another torch: {python}"] = lambda words, python=python: variant(words, 1, python)
    for label, words in (("small", SMALL), ("resnet50", RESNET50)):
        clean = variant(words, 1)
        for name, make in variants.items():
            other = make(words)
            title = name
            if "another torch" in name:
                title = f"torch {other.versions['torch']}, torchvision {other.versions['torchvision']}"
            yield f"{label}, {title}", spread(clean, other), clean.augmentation_sha256 == other.augmentation_sha256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], help="an interpreter with another torch")
    parser.add_argument("--faults-only", action="store_true", help="print the faults and write nothing")
    parser.add_argument("--print", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.print:
        threads, *words = arguments.print
        sys.stdout.buffer.write(to_json(taken(tuple(words), int(threads))))
        return
    rows = []
    for name, found, same_pixels in [] if arguments.faults_only else spreads(arguments.python):
        rows.append((name, found, same_pixels))
        print(name, {key: f"{value:.1e}" for key, value in found.items()}, same_pixels, flush=True)
    clean = {words: taken(words) for words in (SMALL, RESNET50)}
    table = []
    for fault in FAULTS:
        table.append(caught(fault, clean[fault.words]))
        print(table[-1], flush=True)
    if arguments.faults_only:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "canary.md").write_text(page(rows, table, clean[SMALL]))
    (RESULTS / "canary.json").write_text(
        json.dumps({"spread": [row[:2] for row in rows], "faults": [vars(row) for row in table]}, indent=1) + "\n"
    )


def page(rows: list[Any], table: list[Caught], clean: Fingerprint) -> str:
    """The results as markdown."""
    names = list(rows[0][1])
    lines = [
        "# The canary: harmless differences and faults",
        "",
        f"Made by `python benchmarks/canary.py`, torch {clean.versions['torch']}, instructions {clean.instructions}.",
        f"The tolerance is {TOLERANCE:g}, relative. Largest relative difference to one thread of this machine:",
        "",
        f"| What is different | {' | '.join(names)} | Pixels |",
        f"|:--|{'--:|' * len(names)}:--|",
    ]
    for name, found, same_pixels in rows:
        cells = " | ".join(f"{found[key]:.1e}" for key in names)
        lines.append(f"| {name} | {cells} | {'equal' if same_pixels else 'some differ by a level'} |")
    lines += [
        "",
        "Faults, each a change of the code alone, with every setting as it is. *Behaviour* is the first finding in",
        "what was computed, not read back from an object.",
        "",
        "| Fault | Caught | First finding | Behaviour |",
        "|:--|:--|:--|:--|",
    ]
    for row in table:
        lines.append(
            f"| {row.fault} | {'yes' if row.first else '**no**'} | {row.first} | {row.behaviour or 'unmoved'} |"
        )
    count = sum(bool(row.first) for row in table)
    return "\n".join([*lines, "", f"{count} of {len(table)} caught.", ""])


if __name__ == "__main__":
    main()
