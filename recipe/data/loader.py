"""A loader with threads that decode into the batch, and its functions that worker processes use too.

Decoding and resizing release the GIL, so threads that write into a preallocated batch are faster than the processes of
a DataLoader: no copies, pickling or forwarded signals. With a GPU they would compete with the thread that launches
kernels for the GIL, so `recipe.data.worker_pool` decodes in other processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipe.config.schema import LoaderConfig
from recipe.data.augment.mixup import MixParameters
from recipe.data.batches import Batch, BatchRequest
from recipe.data.decoding import ImageDecoder, UndecodableError
from recipe.data.images import RejectedImageError
from recipe.data.shards import Split
from recipe.distributed import World, threads_per_process
from recipe.errors import UserError

IMAGES_PER_TASK = 4  # of one thread: few Python calls and still even work


class PendingBatch(NamedTuple):
    """A batch that threads or worker processes are filling."""

    result: Callable[[], Batch]  # waits for the last image. Raises the error of a failed one
    cancel: Callable[[], None]  # skips images that are not started


class ThreadedLoader:
    """Batches of one split from a pool of threads. Call `close` to end the threads."""

    workers = 0

    def __init__(self, split: Split, decoder: ImageDecoder, config: LoaderConfig, world: World) -> None:
        self.split, self.decoder, self.decoder_name = split, decoder, decoder.name
        self.threads = threads_per_process(config.threads, world)
        self.prefetch_batches = config.prefetch_batches
        self.pin = world.device.type == "cuda"
        self.pool = ThreadPoolExecutor(self.threads, "decode", initializer=torch.set_num_threads, initargs=(1,))

    def close(self) -> None:
        """Drop the queue and wait for the images in progress."""
        self.pool.shutdown(wait=True, cancel_futures=True)

    def load(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        yield from prefetch(map(self._submit, requests), self.prefetch_batches)

    def _submit(self, request: BatchRequest) -> PendingBatch:
        count = len(request.indices)
        images = empty_images(count, request.pixels, self.pin)
        tasks = [
            self.pool.submit(
                fill_images, images, request, self.split, self.decoder, first, min(first + IMAGES_PER_TASK, count)
            )
            for first in range(0, count, IMAGES_PER_TASK)
        ]
        parameters = self.pool.submit(request.mix_parameters)

        def result() -> Batch:
            for task in tasks:
                task.result()
            return collate(self.split, request.indices, images, parameters.result())

        def cancel() -> None:
            parameters.cancel()
            for task in tasks:
                task.cancel()

        return PendingBatch(result, cancel)


def prefetch(batches: Iterator[PendingBatch], depth: int) -> Iterator[Batch]:
    """Results in order, while up to `depth` further batches are being filled."""
    pending: deque[PendingBatch] = deque()
    try:
        for batch in batches:
            pending.append(batch)
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for batch in pending:
            batch.cancel()


def fill_images(
    images: Tensor, request: BatchRequest, split: Split, decoder: ImageDecoder, first: int, last: int
) -> None:
    """Decode and transform images `first` to `last` (exclusive) of a request into the same rows of `images`."""
    for i in range(first, last):
        index = int(request.indices[i])
        with image_errors(split, index):
            request.write(decoder.open(split.read(index)), i, images[i])


@contextmanager
def image_errors(split: Split, index: int) -> Iterator[None]:
    """Add image and shard to errors of decoding and transforming. Programming errors keep their traceback.

    The image was readable when stored, so making an intact shard again would not help.
    """
    try:
        yield
    except UserError:
        raise
    except (UndecodableError, RejectedImageError) as error:
        if split.is_intact(index):
            advice = (
                ", but the shard is unchanged: another Pillow read this image in preprocessing; install the "
                "version in the Data chapter"
            )
        else:
            advice = ": the shard is damaged; delete that file and run `python preprocess.py` again"
        raise UserError(f"{split.where(index)} cannot be decoded ({str(error)[:120]}){advice}") from error
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError, also if memory runs out
        width, height = (int(split.index[index][name]) for name in ("width", "height"))
        reason = " ".join(str(error).split())[:200] or "not enough memory"
        raise UserError(
            f"{split.where(index)}, {width} x {height} pixels, cannot be decoded or transformed: {reason}"
        ) from error
    except Exception as error:
        error.add_note(f"while decoding or transforming {split.where(index)}")
        raise


def empty_images(count: int, pixels: int, pin: bool) -> Tensor:
    """uint8 [count, 3, pixels, pixels], channels last in memory. Pinned for copies to a GPU."""
    return torch.empty((count, 3, pixels, pixels), dtype=torch.uint8, pin_memory=pin, memory_format=torch.channels_last)


def collate(split: Split, indices: NDArray[np.int64], images: Tensor, mix_parameters: MixParameters | None) -> Batch:
    """A batch of images with their labels, pinned if the images are."""
    labels = torch.from_numpy(np.asarray(split.labels[indices], dtype=np.int64))
    if images.is_pinned():
        labels, mix_parameters = labels.pin_memory(), mix_parameters and mix_parameters.pin_memory()
    return Batch(images, labels, torch.from_numpy(indices), mix_parameters)
