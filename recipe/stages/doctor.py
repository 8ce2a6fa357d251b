"""The bottleneck of an experiment on this machine: python -m recipe doctor experiment=demo

Every stage of loading and training is measured alone: reading bytes, decoding, the augmentation, the copy to the
device, and a training step on data that is there already. The slowest of them, with the cores there are, is the
bottleneck. Nothing is written. On a machine that is busy with other work the numbers are lower.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recipe.config.compose import config_from_overrides
from recipe.config.schema import Config
from recipe.data.augment.crop import Augmentation, build_augmentation
from recipe.data.batches import Batch, derive_layout
from recipe.data.decoding import ImageDecoder, decoded, usable_decoder
from recipe.data.images import Rules, store
from recipe.data.loader import image_errors
from recipe.data.manifest import read_manifest
from recipe.data.shards import Split, open_split
from recipe.data.transforms import Normalisation, empty_image
from recipe.distributed import World, memory_format, processes_per_node, start_world
from recipe.document.formatting import duration
from recipe.models.build import build_model
from recipe.run.environment import usable_cores
from recipe.training.optim import build_loss, build_optimizer
from recipe.training.step import TrainStep, compiled

SAMPLE = 200  # images
SAMPLE_BYTES = 2**30  # of them, decoded
ROUNDS = 3
MEASURED_STEPS = 5
SMALL_SIDE = 256  # pixels of the short side after re-encoding
CPU_IMAGES = 16  # of a step on a CPU, where a full batch would take minutes
MARGIN = 1.1  # of loading over training, so that a device is not kept waiting


@dataclass(frozen=True)
class Findings:
    """Images per second of each stage alone: `decode` and `transform` on one core, `model` on all devices of a node."""

    read: float
    decode: float
    transform: float
    small: float | None  # decoding and transforming on one core after re-encoding, None if that was done
    copy: float | None  # None on a CPU
    model: float
    cores: int

    @property
    def load_on_a_core(self) -> float:
        """Decoding and transforming, one after the other."""
        return 1 / (1 / self.decode + 1 / self.transform)

    @property
    def cores_needed(self) -> int:
        """The number of cores that keep up with the model."""
        return math.ceil(MARGIN * self.model / self.load_on_a_core)

    def bounds(self) -> dict[str, float]:
        """The speed that each stage allows on this machine."""
        load = self.load_on_a_core * self.cores
        bounds = {"storage": self.read, "decoding and augmentation": load, "the training step": self.model}
        return bounds if self.copy is None else bounds | {"the copy to the device": self.copy}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measure the bottleneck of an experiment on this machine."
    parser.add_argument(
        "words", nargs="*", metavar="key=value", help="settings, as for train.py: experiment=demo trainer.gpus=8"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. The data set must have been prepared."""
    config = config_from_overrides(arguments.words)
    manifest = read_manifest(config.data.directory)
    with start_world(config.trainer) as world:
        findings = examined(config, len(manifest.classes), world)
    print(report(findings))
    print(training_time(findings, config.optimization.epochs, manifest.splits["train"].images))
    return 0


def examined(config: Config, classes: int, world: World) -> Findings:
    split, decoder = open_split(config.data.directory, "train"), usable_decoder(config.loader.decoder)
    chosen = sample(split, config.seed)
    augmentation = build_augmentation(config.augmentation, config.seed)
    contents = [split.read(index) for index in chosen]
    processes = processes_per_node(config.trainer)
    torch.set_num_threads(1)  # as in the threads that decode
    images = []
    for index, content in zip(chosen, contents, strict=True):
        with image_errors(split, index):
            images.append(decoded(content, decoder))
    rates = {
        "read": rate(len(chosen), lambda: [split.read(index) for index in chosen]),
        "decode": rate(
            len(chosen), lambda: [crop(decoder, content, augmentation, i) for i, content in enumerate(contents)]
        ),
        "transform": rate(len(chosen), lambda: [augmentation(image, 0, i) for i, image in enumerate(images)]),
        "small": small_rate(split, chosen, contents, decoder, augmentation),
        "copy": copy_rate(config, world),
    }
    torch.set_num_threads(usable_cores())
    model = processes * model_rate(config, classes, world, processes)
    copy = None if rates["copy"] is None else processes * rates["copy"]
    return Findings(**(rates | {"copy": copy}), model=model, cores=usable_cores())  # type: ignore[arg-type]


def sample(split: Split, seed: int) -> list[int]:
    """Some images, at least one, no more than fit into memory decoded."""
    chosen: list[int] = np.random.default_rng(seed).permutation(len(split))[:SAMPLE].tolist()
    sizes = [3 * int(split.index[i]["width"]) * int(split.index[i]["height"]) for i in chosen]
    return chosen[: max(1, int(np.searchsorted(np.cumsum(sizes), SAMPLE_BYTES, side="right")))]


def crop(decoder: ImageDecoder, content: bytes, augmentation: Augmentation, index: int) -> Tensor:
    """The part of an image that training decodes: a random crop, uint8 [3, H, W]."""
    picture = decoder.open(content)
    box = augmentation.random_crop(0, index, *picture.size)
    return picture.part(box.top, box.left, box.height, box.width)


def rate(count: int, work: Callable[[], object]) -> float:
    """Images per second, the median of a few rounds."""
    rates = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        rates.append(count / (time.perf_counter() - began))
    return statistics.median(rates)


def small_rate(
    split: Split, chosen: list[int], contents: list[bytes], decoder: ImageDecoder, augmentation: Augmentation
) -> float | None:
    """Decoding and transforming after re-encoding to a short side of 256. None if images are as small already."""
    sides = [min(int(split.index[i]["width"]), int(split.index[i]["height"])) for i in chosen]
    if statistics.median(sides) <= SMALL_SIDE:
        return None
    rules = Rules(keeps_png=True, resize_short_side=SMALL_SIDE, quality=90, max_pixels=sys.maxsize)
    small = []
    for index, content in zip(chosen, contents, strict=True):
        with image_errors(split, index):
            small.append(store(content, is_named_png=False, rules=rules).content)
    out = empty_image((augmentation.crop_pixels, augmentation.crop_pixels))

    def work() -> None:
        for number, content in enumerate(small):
            augmentation.write(decoder.open(content), 10**6, number, 0, out)

    return rate(len(small), work)


def copy_rate(config: Config, world: World) -> float | None:
    """Images per second from pinned memory to the device."""
    if world.device.type != "cuda":
        return None
    size = config.augmentation.crop_pixels
    images = torch.zeros((256, 3, size, size), dtype=torch.uint8, pin_memory=True)

    def work() -> None:
        images.to(world.device, non_blocking=True)
        torch.cuda.synchronize(world.device)

    work()
    return rate(len(images), work)


def model_rate(config: Config, classes: int, world: World, processes: int) -> float:
    """Images per second of one process's training steps on data that is on the device."""
    model = build_model(config.model, classes, config.seed, config.optimization.bce.init_head_bias)
    model = model.to(world.device).to(memory_format=memory_format(config.trainer))
    train_step = TrainStep(
        compiled(model, config.trainer),
        build_optimizer(config.optimization, model, world.device),
        build_loss(config.optimization),
        Normalisation(config.data.mean, config.data.std, world.device),
        config.trainer,
        world,
    )
    count = derive_layout(config.optimization, config.trainer, processes).images_per_forward
    count = min(count, CPU_IMAGES) if world.device.type == "cpu" else count
    size = config.augmentation.crop_pixels
    images = torch.zeros((count, 3, size, size), dtype=torch.uint8, device=world.device)
    labels = torch.zeros(count, dtype=torch.int64, device=world.device)

    def work() -> None:
        for _ in range(MEASURED_STEPS):
            train_step([Batch(images, labels, torch.arange(count))], learning_rate=0.0)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)

    work()
    return rate(MEASURED_STEPS * count, work)


def report(findings: Findings) -> str:
    lines = [
        f"reading                     {findings.read:10,.0f} images/s (this sample was read before: from the cache)",
        f"decoding crops, one core    {findings.decode:10,.0f} images/s",
        f"augmentation, one core      {findings.transform:10,.0f} images/s",
        *([f"copy to the device          {findings.copy:10,.0f} images/s"] if findings.copy is not None else []),
        f"training step               {findings.model:10,.0f} images/s, data on the device",
    ]
    return "\n".join([*lines, verdict(findings)])


def verdict(findings: Findings) -> str:
    """The bottleneck, the number of cores that keep up with the step, and possible improvements."""
    bounds = findings.bounds()
    bound = min(bounds, key=lambda name: bounds[name])
    needed, cores = findings.cores_needed, findings.cores
    sentence = f"{bound} bounds this experiment at {bounds[bound]:,.0f} images/s; "
    sentence += f"to keep up with the training step, loading needs {needed} of the {cores} cores (loader.threads)"
    if findings.small is not None:
        gain = findings.small / findings.load_on_a_core
        sentence += f"; re-encoding (data.resize_short_side={SMALL_SIDE}) would make loading {gain:.1f} times as fast"
    if needed > cores:
        sentence += f"; with {needed} cores instead of {cores} the device would not wait"
    return sentence


def training_time(findings: Findings, epochs: int, images: int) -> str:
    """The duration of training at the measured bound, with the arithmetic."""
    bound = min(findings.bounds().values())
    time_taken = duration(epochs * images / bound)
    return (
        f"{epochs} epochs would take about {time_taken} on this machine: {epochs} x {images:,} images / {bound:,.1f} "
        "images/s; an estimate of training alone, without start-up, validation and checkpoints"
    )
