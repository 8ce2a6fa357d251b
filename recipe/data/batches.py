"""Batches of a split: their images, the order, and the share of each process.

A batch is a pure function of (seed, epoch, number): global batch b has the same images and pixels on any number of
processes and threads. `epoch(epoch, first_batch)` resumes.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from recipe.config.schema import ImageOrder, OptimizationConfig, TrainerConfig
from recipe.data.augment.crop import Augmentation
from recipe.data.augment.mixup import BatchPlace, MixParameters
from recipe.data.decoding import EncodedImage
from recipe.data.shards import Split
from recipe.data.transforms import EvaluationTransform
from recipe.distributed import World
from recipe.errors import UserError
from recipe.run.records import LoaderFacts

WINDOW_SHARDS = 8  # mixed at a time by `loader.order=quasi_random`
ORDER_STREAM = 1  # separates random numbers of the order from those of the augmentation


class Batch(NamedTuple):
    """Images of one forward pass."""

    images: Tensor  # uint8 [N, 3, H, W], channels last in memory
    labels: Tensor  # int64 [N]
    indices: Tensor  # int64 [N], positions in the split
    mix_parameters: MixParameters | None = None


class TrainingRequest(NamedTuple):
    """The augmented images of one forward pass. Workers receive it pickled."""

    indices: NDArray[np.int64]
    copies: NDArray[np.int64]  # number of the copy, for repeated augmentation
    augmentation: Augmentation
    place: BatchPlace

    @property
    def pixels(self) -> int:
        return self.place.pixels

    def write(self, picture: EncodedImage, i: int, out: Tensor) -> None:
        """Augment image `i` of the batch into `out`, uint8 [3, pixels, pixels]."""
        self.augmentation.write(picture, self.place.epoch, int(self.indices[i]), int(self.copies[i]), out)

    def mix_parameters(self) -> MixParameters | None:
        """The parameters of mixup, cutmix and erasing. None if all are off."""
        return self.augmentation.mix_parameters(self.place, self.indices, self.copies)


class EvaluationRequest(NamedTuple):
    """The images of one batch, resized and cropped for evaluation."""

    indices: NDArray[np.int64]
    transform: EvaluationTransform

    @property
    def pixels(self) -> int:
        return self.transform.crop_pixels

    def write(self, picture: EncodedImage, i: int, out: Tensor) -> None:
        """Transform image `i` of the batch into `out`, uint8 [3, pixels, pixels]."""
        out.copy_(self.transform(picture.part(0, 0, *picture.size)))

    def mix_parameters(self) -> None:
        """None: evaluation does not mix."""


BatchRequest = TrainingRequest | EvaluationRequest


class Loader(Protocol):
    """Decodes batches of one split, in threads of this process or in worker processes."""

    split: Split
    decoder_name: str  # nvimgcodec or pillow
    threads: int  # decoding threads of this training process, over all its workers
    workers: int  # 0: threads of this process

    def load(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        """Batches in the order of the requests, decoded ahead."""


# ---- the layout of a global batch ---------------------------------------------------------------------


@dataclass(frozen=True)
class BatchLayout:
    """Division of a global batch. Forward pass k of rank r has part k * processes + r.

    The parts have the same images on 8 processes as on 1 process that accumulates 8 times.
    """

    global_batch_size: int
    processes: int
    accumulation_steps: int

    @property
    def images_per_forward(self) -> int:
        """Also the batch size of batch norms."""
        return self.global_batch_size // (self.processes * self.accumulation_steps)


def derive_layout(optimization: OptimizationConfig, trainer: TrainerConfig, processes: int) -> BatchLayout:
    """The layout with the fewest steps for `trainer.max_micro_batch_size`. Raises `UserError` if indivisible."""
    size, cap = optimization.batch_size, trainer.max_micro_batch_size
    accumulation = max(1, math.ceil(size / (processes * cap)))
    parts = processes * accumulation
    if size % parts:
        nearest = " or ".join(str(value) for value in _nearest_that_divide(size, processes, cap))
        raise UserError(
            f"optimization.batch_size={size} is not divisible into {processes} processes x {accumulation} "
            f"accumulation steps (trainer.max_micro_batch_size={cap}); nearest valid: {nearest}"
        )
    return BatchLayout(size, processes, accumulation)


def _nearest_that_divide(size: int, processes: int, cap: int) -> list[int]:
    """The nearest smaller and larger batch sizes with a layout."""

    def has_layout(value: int) -> bool:
        return value % (processes * math.ceil(value / (processes * cap))) == 0

    below = next(filter(has_layout, range(size - 1, 0, -1)), None)
    above = next(filter(has_layout, itertools.count(size + 1)))
    return [above] if below is None else [below, above]


# ---- the order of an epoch ----------------------------------------------------------------------------


def epoch_order(seed: int, epoch: int, images: int) -> NDArray[np.uint32]:
    """The random order of an epoch, a function of (seed, epoch) and the number of images."""
    order = np.arange(images, dtype=np.uint32)
    np.random.default_rng((ORDER_STREAM, seed, epoch)).shuffle(order)
    return order


def block_order(seed: int, epoch: int, shard_images: Sequence[int]) -> NDArray[np.uint32]:
    """An order for storage with slow random reads: random shards, with images mixed within a few shards at a time.

    `shard_images` has the number of images of each shard. Reads stay within `WINDOW_SHARDS` files at a time.
    """
    generator = np.random.default_rng((ORDER_STREAM, seed, epoch))
    sizes = np.asarray(shard_images)
    shards = generator.permutation(len(sizes))
    first = np.cumsum(sizes) - sizes
    before = np.cumsum(sizes[shards]) - sizes[shards]  # first position of each shard in the order
    order: NDArray[np.uint32] = (np.arange(sizes.sum()) + np.repeat(first[shards] - before, sizes[shards])).astype(
        np.uint32
    )
    for start in range(0, len(shards), WINDOW_SHARDS):
        generator.shuffle(order[before[start] : before[start] + sizes[shards[start : start + WINDOW_SHARDS]].sum()])
    return order


# ---- training and evaluation --------------------------------------------------------------------------


class TrainingBatches:
    """The training set in global batches, shuffled for each epoch.

    The incomplete last batch is dropped, with different images in every epoch.
    """

    def __init__(
        self,
        loader: Loader,
        augmentation: Augmentation,
        layout: BatchLayout,
        rank: int,
        seed: int,
        order: ImageOrder = ImageOrder.random,
    ) -> None:
        self.loader = loader
        self.order = order
        self.augmentation = augmentation
        self.layout = layout
        self.rank = rank
        self.seed = seed
        self.images = len(loader.split)
        self.batches_per_epoch = self.images // layout.global_batch_size
        if self.batches_per_epoch == 0:
            raise UserError(
                f"optimization.batch_size={layout.global_batch_size} is more than the {self.images} "
                "training images; make it smaller"
            )
        if layout.global_batch_size % augmentation.repeats:
            raise UserError(
                f"augmentation.repeated_augmentation={augmentation.repeats} does not divide "
                f"optimization.batch_size={layout.global_batch_size}; give a divisor of it"
            )

    @property
    def images_per_epoch(self) -> int:
        """Training images of an epoch, over all processes, with each copy counted."""
        return self.batches_per_epoch * self.layout.global_batch_size

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[list[Batch]]:
        """For each optimizer step of `epoch` (from 0), the batches of this process's forward passes."""
        batches = self.loader.load(self._requests(epoch, first_batch, self.rank))
        while step := list(itertools.islice(batches, self.layout.accumulation_steps)):
            yield step

    def _requests(self, epoch: int, first_batch: int, rank: int) -> Iterator[TrainingRequest]:
        """The forward passes of a rank, in order.

        A global batch has each of its images once before their second copies. So neighbours, paired by mixup, are
        different images.
        """
        if self.order is ImageOrder.quasi_random:
            order = block_order(self.seed, epoch, [shard.images for shard in self.loader.split.shards])
        else:
            order = epoch_order(self.seed, epoch, self.images)
        layout, repeats = self.layout, self.augmentation.repeats
        pixels, per_forward = self.augmentation.pixels(epoch), layout.images_per_forward
        images = layout.global_batch_size // repeats
        copies = np.repeat(np.arange(repeats), images)
        for batch in range(first_batch, self.batches_per_epoch):
            indices = np.tile(order[batch * images : (batch + 1) * images].astype(np.int64), repeats)
            for step in range(layout.accumulation_steps):
                first = (step * layout.processes + rank) * per_forward
                part = slice(first, first + per_forward)
                place = BatchPlace(epoch, batch, first, pixels)
                yield TrainingRequest(indices[part], copies[part], self.augmentation, place)

    def _delivered_order(self, epoch: int) -> NDArray[np.int64]:
        """Indices of all images of an epoch in order of delivery, from the requests of all ranks."""
        ranks = (self._requests(epoch, 0, rank) for rank in range(self.layout.processes))
        return np.concatenate([request.indices for requests in zip(*ranks, strict=True) for request in requests])

    def facts(self) -> LoaderFacts:
        orders = [self._delivered_order(epoch).astype("<i8", copy=False) for epoch in range(2)]
        digest = hashlib.sha256()
        for order in orders:
            digest.update(order.data)
        is_seen = np.zeros(self.images, dtype=np.bool_)
        is_seen[orders[0]] = True
        unique = int(is_seen.sum())
        return LoaderFacts(
            images_per_epoch=self.images_per_epoch,
            unique_images_per_epoch=unique,
            images_left_out_per_epoch=self.images - unique,
            global_batch_size=self.layout.global_batch_size,
            images_per_forward=self.layout.images_per_forward,
            batch_norm_batch_size=self.layout.images_per_forward,
            accumulation_steps=self.layout.accumulation_steps,
            decoder=self.loader.decoder_name,
            threads_per_process=self.loader.threads,
            loading_processes=self.loader.workers,
            order=self.order.value,
            first_indices=orders[0][:8].tolist(),
            order_sha256=digest.hexdigest(),
        )


class EvaluationBatches:
    """A split in its own order, each image exactly once, with batches distributed over the processes.

    Batch k has the same images on any number of processes, so that logits, not only counts, can be equal.
    """

    def __init__(self, loader: Loader, transform: EvaluationTransform, batch_size: int, world: World) -> None:
        self.loader = loader
        self.transform = transform
        self.batch_size = batch_size
        self.rank = world.rank
        self.processes = world.size

    def __len__(self) -> int:
        """Batches of this process."""
        return len(range(self.rank, math.ceil(len(self.loader.split) / self.batch_size), self.processes))

    @property
    def common_batches(self) -> int:
        """Batches that every process has. Some have one more."""
        return math.ceil(len(self.loader.split) / self.batch_size) // self.processes

    def __iter__(self) -> Iterator[Batch]:
        images = len(self.loader.split)
        starts = range(self.rank * self.batch_size, images, self.processes * self.batch_size)
        parts = (np.arange(start, min(start + self.batch_size, images), dtype=np.int64) for start in starts)
        yield from self.loader.load(EvaluationRequest(indices, self.transform) for indices in parts)
