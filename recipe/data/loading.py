"""Batches, from threads that decode straight into them.

Decoding and resizing release Python's lock, so threads that write into one preallocated batch beat the processes of a
DataLoader: no copies, no pickling, no signals to forward. Where another thread of the process is in a hurry, as beside
a GPU, `recipe.data.processes` decodes elsewhere. A batch is a pure function of (seed, epoch, number):
global batch b holds the same images, with the same pixels, on any number of processes and threads. Resuming is
asking for `epoch(epoch, first_batch)`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipe.config.schema import ImageOrder, OptimizationConfig, TrainerConfig
from recipe.data.decoding import ImageDecoder, Picture, UndecodableError
from recipe.data.images import RejectedImageError
from recipe.data.shards import Split
from recipe.data.transforms import EvaluationTransform
from recipe.distributed import World, threads_per_process
from recipe.errors import UserError
from recipe.run.records import LoaderFacts

IMAGES_PER_TASK = 4  # handed to a thread at once: fewer Python calls, still even work
WINDOW_SHARDS = 8  # whose images `data.order=blocks` mixes
ORDER_STREAM = 1  # keeps the generator of the order apart from that of the augmentation
Item = TypeVar("Item")


class DeviceDraws(NamedTuple):
    """What the device does to the images of a batch; tensors of length 0 where it does nothing of the kind."""

    erased: Tensor  # int64 [N, 4]: top, left, bottom, right
    share: Tensor  # float32 [N], of an image's own pixels outside its rectangle
    rectangle: Tensor  # int64 [N, 4], taken from the partner
    weight: Tensor  # float32 [N], of an image's own label
    partner: Tensor  # int64 [N], position in the batch

    def to(self, device: torch.device) -> DeviceDraws:
        """The same on a device."""
        return DeviceDraws(*(tensor.to(device, non_blocking=True) for tensor in self))

    def pinned(self) -> DeviceDraws:
        """The same in memory from which copies to a GPU need not be waited for."""
        return DeviceDraws(*(tensor.pin_memory() for tensor in self))


class Batch(NamedTuple):
    """Images of one forward pass."""

    images: Tensor  # uint8 [N, 3, H, W], channels last in memory
    labels: Tensor  # int64 [N]
    indices: Tensor  # int64 [N], positions in the split
    draws: DeviceDraws | None = None


class View(Protocol):
    """How the images of one batch are seen; a plain object that other processes can be sent."""

    def write(self, picture: Picture, place: int, out: Tensor) -> None:
        """Image number `place` of the batch into `out`, uint8 [3, pixels, pixels]."""

    def draws(self) -> DeviceDraws | None:
        """What the device does to the batch."""


class Order(NamedTuple):
    """A batch to be made: which images, in which view of them, of which size."""

    indices: NDArray[np.int64]
    view: View
    pixels: int


class Decoding(Protocol):
    """Makes batches of the images of a split: threads of this process, or processes of their own."""

    split: Split
    threads: int  # in all, for each process that trains
    processes: int  # 0: the threads are this process's own

    @property
    def decoder_name(self) -> str:
        """The library that decodes."""

    def batches(self, orders: Iterable[Order]) -> Iterator[Batch]:
        """A batch for each order, in order, decoded ahead."""


class Views(Protocol):
    """What the loader asks of an augmentation."""

    @property
    def repeats(self) -> int:
        """Copies of an image in a global batch."""

    def write(self, picture: Picture, epoch: int, index: int, copy: int, out: Tensor) -> None:
        """The view of a picture, uint8 [3, pixels, pixels], into `out`."""

    def pixels(self, epoch: int) -> int:
        """The size of the views of an epoch."""

    def draws(
        self, epoch: int, batch: int, first: int, indices: NDArray[np.int64], copies: NDArray[np.int64]
    ) -> DeviceDraws | None:
        """What the device does to these images, of which the first has position `first` in global batch `batch`."""


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is divided; forward pass k of rank r holds part k * processes + r of it.

    Part for part these are the same images on 8 processes as on 1 process that accumulates 8 times.
    """

    global_batch_size: int
    processes: int
    accumulation_steps: int

    @property
    def images_per_forward(self) -> int:
        """Also what one batch norm sees."""
        return self.global_batch_size // (self.processes * self.accumulation_steps)


def derive_layout(optimization: OptimizationConfig, trainer: TrainerConfig, processes: int) -> BatchLayout:
    """The fewest accumulation steps that respect `trainer.max_images_per_process`; raises where nothing divides."""
    size, cap = optimization.batch_size, trainer.max_images_per_process
    accumulation = max(1, math.ceil(size / (processes * cap)))
    parts = processes * accumulation
    if size % parts:
        nearest = " or ".join(str(value) for value in _nearest_that_divide(size, processes, cap))
        raise UserError(
            f"optimization.batch_size={size} does not divide into {processes} processes x {accumulation} "
            f"accumulation steps (trainer.max_images_per_process={cap}); nearest that does: {nearest}"
        )
    return BatchLayout(size, processes, accumulation)


def _nearest_that_divide(size: int, processes: int, cap: int) -> list[int]:
    """The nearest smaller and larger batch sizes that have a layout; the next full round of parts always has one."""

    def has_layout(value: int) -> bool:
        return value % (processes * math.ceil(value / (processes * cap))) == 0

    below = next(filter(has_layout, range(size - 1, 0, -1)), None)
    above = next(filter(has_layout, itertools.count(size + 1)))
    return [above] if below is None else [below, above]


def epoch_order(seed: int, epoch: int, images: int) -> NDArray[np.uint32]:
    """The order of an epoch, a function of (seed, epoch) and the number of images; 4 bytes an image."""
    order = np.arange(images, dtype=np.uint32)
    np.random.default_rng((ORDER_STREAM, seed, epoch)).shuffle(order)
    return order


def block_order(seed: int, epoch: int, shard_images: Sequence[int]) -> NDArray[np.uint32]:
    """The same for storage that hates random reads: shards in a random order, images mixed in a few shards at a time.

    `shard_images` are the images of each shard. Reads of a window stay within `WINDOW_SHARDS` files.
    """
    generator = np.random.default_rng((ORDER_STREAM, seed, epoch))
    sizes = np.asarray(shard_images)
    shards = generator.permutation(len(sizes))
    first = np.cumsum(sizes) - sizes
    before = np.cumsum(sizes[shards]) - sizes[shards]  # where each shard's images begin in the order
    order: NDArray[np.uint32] = (np.arange(sizes.sum()) + np.repeat(first[shards] - before, sizes[shards])).astype(
        np.uint32
    )
    for start in range(0, len(shards), WINDOW_SHARDS):
        generator.shuffle(order[before[start] : before[start] + sizes[shards[start : start + WINDOW_SHARDS]].sum()])
    return order


class Filling:
    """Reads and decodes images of a split and writes what is seen of them into a batch; threads may share one."""

    def __init__(self, split: Split, decoder: ImageDecoder) -> None:
        self.split = split
        self.decoder = decoder

    def fill(self, images: Tensor, order: Order, first: int, last: int) -> None:
        """Write images `first` to `last` (not included) of an order.

        A failure names the image and its shard, since it was readable when it was stored.
        """
        for place in range(first, last):
            index = int(order.indices[place])
            with naming(self.split, index):
                order.view.write(self.decoder.open(self.split.read(index)), place, images[place])


@contextmanager
def naming(split: Split, index: int) -> Iterator[None]:
    """Say of which image decoding or transforming fails; an error of the code keeps its traceback."""
    try:
        yield
    except UserError:
        raise
    except (UndecodableError, RejectedImageError) as error:
        raise refusal(split, index, str(error)) from error
    except (MemoryError, RuntimeError) as error:  # of torch: RuntimeError, also where memory cannot be had
        width, height = (int(split.index[index][name]) for name in ("width", "height"))
        reason = " ".join(str(error).split())[:200] or "not enough memory"
        raise UserError(
            f"{split.where(index)}, {width} x {height} pixels, cannot be decoded or transformed: {reason}"
        ) from error
    except Exception as error:
        error.add_note(f"while decoding or transforming {split.where(index)}")
        raise


def refusal(split: Split, index: int, reason: str) -> UserError:
    """Why an image cannot be decoded: making a sound shard again would only lead back to this sentence."""
    what = f"{split.where(index)} cannot be decoded ({reason[:120]})"
    if not split.is_intact(index):
        return UserError(f"{what}: the shard is damaged; delete that file and run `python preprocess.py` again")
    return UserError(
        f"{what}, but the shard is as preprocessing wrote it: another Pillow read this image then; install the version "
        "that the Data chapter names"
    )


class DecodingThreads:
    """A pool of threads that fill batches; used as a context, so that none outlives it."""

    processes = 0

    def __init__(self, split: Split, decoder: ImageDecoder, trainer: TrainerConfig, world: World) -> None:
        self.split = split
        self.filling = Filling(split, decoder)
        self.threads = threads_per_process(trainer.data_threads, world)
        self.prefetch_batches = trainer.prefetch_batches
        self.pin = world.device.type == "cuda"
        self.pool = ThreadPoolExecutor(self.threads, "decode", initializer=torch.set_num_threads, initargs=(1,))

    @property
    def decoder_name(self) -> str:
        """The library that decodes: nvimgcodec or pillow."""
        return self.filling.decoder.name

    def close(self) -> None:
        """Drop what is queued and wait for what is being decoded."""
        self.pool.shutdown(wait=True, cancel_futures=True)

    def batches(self, orders: Iterable[Order]) -> Iterator[Batch]:
        """A batch for each order, in order, decoded ahead."""
        yield from ahead((self._start(order) for order in orders), self.prefetch_batches)

    def _start(self, order: Order) -> StartedHere:
        count = len(order.indices)
        images = empty_images(count, order.pixels, self.pin)
        tasks = [
            self.pool.submit(self.filling.fill, images, order, first, min(first + IMAGES_PER_TASK, count))
            for first in range(0, count, IMAGES_PER_TASK)
        ]
        return StartedHere(self.split, order.indices, images, tasks, self.pool.submit(order.view.draws))


def empty_images(count: int, pixels: int, pin: bool) -> Tensor:
    """uint8 [count, 3, pixels, pixels], channels last in memory, from which a GPU can copy if it is pinned."""
    return torch.empty((count, 3, pixels, pixels), dtype=torch.uint8, pin_memory=pin, memory_format=torch.channels_last)


def assembled(split: Split, indices: NDArray[np.int64], images: Tensor, draws: DeviceDraws | None) -> Batch:
    """A batch with the labels of its images, all of it pinned if the images are."""
    labels = torch.from_numpy(np.asarray(split.labels[indices], dtype=np.int64))
    if images.is_pinned():
        labels, draws = labels.pin_memory(), None if draws is None else draws.pinned()
    return Batch(images, labels, torch.from_numpy(indices), draws)


class Started(Protocol):
    """A batch that is being made."""

    def result(self) -> Batch:
        """Wait for the last image; raises what was raised while making it."""

    def cancel(self) -> None:
        """Leave out what has not begun."""


class StartedHere(NamedTuple):
    """A batch that threads of this process are making."""

    split: Split
    indices: NDArray[np.int64]
    images: Tensor
    tasks: list[Future[None]]
    draws: Future[DeviceDraws | None]

    def result(self) -> Batch:
        """Wait for the last image; raises what a thread raised."""
        for task in self.tasks:
            task.result()
        return assembled(self.split, self.indices, self.images, self.draws.result())

    def cancel(self) -> None:
        """Leave out what no thread has begun."""
        self.draws.cancel()
        for task in self.tasks:
            task.cancel()


def ahead(started: Iterator[Started], depth: int) -> Iterator[Batch]:
    """Results in order, with up to `depth` more being made meanwhile."""
    waiting: deque[Started] = deque()
    try:
        for batch in started:
            waiting.append(batch)
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for batch in waiting:
            batch.cancel()


class Part(NamedTuple):
    """The images of one forward pass of one process."""

    batch: int  # of the epoch
    first: int  # position of the first image in the global batch
    indices: NDArray[np.int64]
    copies: NDArray[np.int64]  # which copy of its image each one is


class TrainingView(NamedTuple):
    """Images of a batch as the augmentation shows them in an epoch."""

    augmentation: Views
    epoch: int
    part: Part

    def write(self, picture: Picture, place: int, out: Tensor) -> None:
        """Image number `place` of the batch into `out`."""
        part = self.part
        self.augmentation.write(picture, self.epoch, int(part.indices[place]), int(part.copies[place]), out)

    def draws(self) -> DeviceDraws | None:
        """What the device does to the batch."""
        part = self.part
        return self.augmentation.draws(self.epoch, part.batch, part.first, part.indices, part.copies)


class TrainingBatches:
    """The training set, cut into global batches in an order of its own for every epoch.

    The last, incomplete batch of an epoch is left out: other images in every epoch.
    """

    def __init__(
        self,
        threads: Decoding,
        augmentation: Views,
        layout: BatchLayout,
        rank: int,
        seed: int,
        order: ImageOrder = ImageOrder.random,
    ) -> None:
        self.threads = threads
        self.order = order
        self.augmentation = augmentation
        self.layout = layout
        self.rank = rank
        self.seed = seed
        self.images = len(threads.split)
        self.batches_per_epoch = self.images // layout.global_batch_size
        if self.batches_per_epoch == 0:
            raise UserError(
                f"optimization.batch_size={layout.global_batch_size} is more than the {self.images} "
                "training images; make it smaller"
            )
        if layout.global_batch_size % augmentation.repeats:
            raise UserError(
                f"augmentation.repeats={augmentation.repeats} does not divide "
                f"optimization.batch_size={layout.global_batch_size}; give a divisor of it"
            )

    @property
    def images_per_epoch(self) -> int:
        """Images that an epoch trains on, over all processes, each copy counted."""
        return self.batches_per_epoch * self.layout.global_batch_size

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[list[Batch]]:
        """For each optimizer step of `epoch` (from 0), the batches of this process's forward passes."""
        orders = (self._order_of(epoch, part) for part in self._parts(epoch, first_batch, self.rank))
        yield from in_groups(self.threads.batches(orders), self.layout.accumulation_steps)

    def _order_of(self, epoch: int, part: Part) -> Order:
        return Order(part.indices, TrainingView(self.augmentation, epoch, part), self.augmentation.pixels(epoch))

    def _parts(self, epoch: int, first_batch: int, rank: int) -> Iterator[Part]:
        """This process's forward passes, in order.

        A global batch holds its images once after the other and then all of them again for every further copy, so that
        neighbours, which are mixed with one another, are different images.
        """
        order = self._order_of_images(epoch)
        layout, repeats = self.layout, self.augmentation.repeats
        images, per_forward = layout.global_batch_size // repeats, layout.images_per_forward
        copies = np.repeat(np.arange(repeats), images)
        for batch in range(first_batch, self.batches_per_epoch):
            whole = np.tile(order[batch * images : (batch + 1) * images].astype(np.int64), repeats)
            for step in range(layout.accumulation_steps):
                first = (step * layout.processes + rank) * per_forward
                yield Part(batch, first, whole[first : first + per_forward], copies[first : first + per_forward])

    def _order_of_images(self, epoch: int) -> NDArray[np.uint32]:
        if self.order is ImageOrder.blocks:
            return block_order(self.seed, epoch, [shard.images for shard in self.threads.split.shards])
        return epoch_order(self.seed, epoch, self.images)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """All images of an epoch as they are handed out, put together from the parts of all processes."""
        ranks = (self._parts(epoch, 0, rank) for rank in range(self.layout.processes))
        return np.concatenate([part.indices for parts in zip(*ranks, strict=True) for part in parts])

    def facts(self) -> LoaderFacts:
        """How batches are made, for the record."""
        orders = [self._order(epoch).astype("<i8", copy=False) for epoch in range(2)]
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
            decoder=self.threads.decoder_name,
            threads_per_process=self.threads.threads,
            loading_processes=self.threads.processes,
            order=self.order.value,
            first_indices=orders[0][:8].tolist(),
            order_sha256=sha256_of_arrays(orders),
        )


def sha256_of_arrays(arrays: Iterable[NDArray[np.int64]]) -> str:
    """Of their bytes, one after the other, without copies."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class EvaluationBatches:
    """A split in its own order, each image exactly once: whole batches are dealt out to the processes.

    Batch k holds the same images on any number of processes, so the logits, not only the counts, can be equal.
    """

    def __init__(self, threads: Decoding, transform: EvaluationTransform, batch_size: int, world: World) -> None:
        self.threads = threads
        self.transform = transform
        self.batch_size = batch_size
        self.rank = world.rank
        self.processes = world.size

    def __len__(self) -> int:
        """Batches of this process."""
        return len(range(self.rank, math.ceil(len(self.threads.split) / self.batch_size), self.processes))

    @property
    def common_batches(self) -> int:
        """Batches that every process has at least: some have one more."""
        return math.ceil(len(self.threads.split) / self.batch_size) // self.processes

    def __iter__(self) -> Iterator[Batch]:
        images = len(self.threads.split)
        starts = range(self.rank * self.batch_size, images, self.processes * self.batch_size)
        parts = (np.arange(start, min(start + self.batch_size, images), dtype=np.int64) for start in starts)
        yield from self.threads.batches(evaluation_orders(parts, self.transform))


class EvaluationView(NamedTuple):
    """Images of a batch as an evaluation sees them."""

    transform: EvaluationTransform

    def write(self, picture: Picture, place: int, out: Tensor) -> None:
        """Image number `place` of the batch into `out`."""
        out.copy_(self.transform(picture.part(0, 0, *picture.size)))

    def draws(self) -> None:
        """Nothing is done on the device."""


def evaluation_orders(parts: Iterable[NDArray[np.int64]], transform: EvaluationTransform) -> Iterator[Order]:
    """Batches in the view of an evaluation."""
    for part in parts:
        yield Order(part, EvaluationView(transform), transform.crop_pixels)


def in_groups(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive items, `size` at a time."""
    group: list[Item] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
