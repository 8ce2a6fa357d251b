"""Batches from worker processes that decode into memory shared with this process.

Decoding threads compete with the main thread for the GIL. Worker processes need it only for one message per batch.
Each worker fills its share of each batch with the code of `recipe.data.loader`, so pixels, order and errors are equal.
The memory is anonymous: it is freed with the last process that maps it and not limited by a small /dev/shm. On a CPU a
batch is this memory, reused when the batch is freed. For a GPU it is copied to torch's pinned memory, which is reused
after the copy to the device.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import torch
from torch import Tensor

from recipe.config.schema import Decoder, LoaderConfig
from recipe.data.augment.mixup import MixParameters
from recipe.data.batches import Batch, BatchRequest, Loader
from recipe.data.decoding import usable_decoder
from recipe.data.loader import PendingBatch, ThreadedLoader, collate, empty_images, prefetch
from recipe.data.shards import Split
from recipe.data.worker import SIGNAL_BASE, FillTask, Reply, Setup, batch_at
from recipe.distributed import World, threads_per_process
from recipe.errors import UserError, WorkerError
from recipe.run.terminal import FROM_OUTSIDE, blocked

THREADS_PER_WORKER = 2  # by default: one waits for a disk while the other decodes
SECONDS_TO_END = 3.0  # for workers whose sockets are closed, before they are killed
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from recipe.data.worker import main; main(*map(int, sys.argv[2:]))"
)
WORKER_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@contextmanager
def open_loaders(splits: Sequence[Split], config: LoaderConfig, world: World) -> Iterator[list[Loader]]:
    """A loader for each split, with threads or workers by configuration and device. Closed at the end."""
    workers = worker_count(config, world)
    with ExitStack() as stack:
        library = usable_decoder(config.decoder)  # workers use the same one
        if workers == 0:
            yield [stack.enter_context(closing(ThreadedLoader(split, library, config, world))) for split in splits]
        else:
            threads = threads_per_process(config.threads, world)
            pool = stack.enter_context(closing(WorkerPool(splits, Decoder(library.name), workers, threads, world)))
            yield [WorkerLoader(pool, number, config.prefetch_batches) for number in range(len(splits))]


def worker_count(config: LoaderConfig, world: World) -> int:
    """The number of workers of this process. 0: it decodes in threads."""
    workers = config.workers
    if sys.platform != "linux":
        if workers:
            raise UserError(f"loader.workers={workers} needs Linux; use loader.workers=0")
        return 0
    if workers is not None:
        return workers
    if world.device.type != "cuda":
        return 0
    return math.ceil(threads_per_process(config.threads, world) / THREADS_PER_WORKER)


class Slot(NamedTuple):
    """A part of the shared memory, mapped in this process."""

    offset: int
    bytes: int
    memory: mmap.mmap


class SharedMemory:
    """Anonymous memory in slots of one batch each. It grows with the number of batches in use."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("recipe-batches", os.MFD_CLOEXEC)
        self.bytes = 0
        self.free: list[Slot] = []
        self.lock = threading.Lock()

    def take(self, size: int) -> Slot:
        """The smallest free slot of at least `size` bytes, else a new one."""
        with self.lock:
            large_enough = [slot for slot in self.free if slot.bytes >= size]
            if large_enough:
                slot = min(large_enough, key=lambda slot: slot.bytes)
                self.free.remove(slot)
                return slot
            offset, size = self.bytes, math.ceil(size / mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            self.bytes += size
            os.ftruncate(self.descriptor, self.bytes)
            return Slot(offset, size, mmap.mmap(self.descriptor, size, offset=offset))

    def images(self, slot: Slot, count: int, pixels: int) -> Tensor:
        """The batch in a slot, uint8 [count, 3, pixels, pixels]. The slot is freed with the last tensor on it."""
        array = batch_at(slot.memory, 0, count, pixels)
        weakref.finalize(array, self.free.append, slot).atexit = False
        return torch.from_numpy(array).permute(0, 3, 1, 2)

    def close(self) -> None:
        """Close the memory for new slots. Batches in use stay valid."""
        os.close(self.descriptor)


@dataclass
class RemoteBatch:
    """A batch that workers are filling."""

    split: Split
    request: BatchRequest
    images: Tensor | None
    missing_shares: int
    future: Future[Batch] = field(default_factory=Future)
    is_cancelled: bool = False
    failure: Exception | None = None
    mix_parameters: MixParameters | None = None


class WorkerPool:
    """The worker processes, and a thread that receives their replies."""

    def __init__(self, splits: Sequence[Split], decoder: Decoder, workers: int, threads: int, world: World) -> None:
        self.splits, self.decoder = splits, decoder
        self.pin = world.device.type == "cuda"
        self.memory = SharedMemory()
        self.pending: dict[int, RemoteBatch] = {}  # by number, until delivered, or cancelled and complete
        self.batches = 0  # submitted so far
        self.failure: Exception | None = None
        self.lock = threading.Lock()
        self.wake_reader, self.wake_writer = os.pipe()
        threads_each = math.ceil(threads / workers)
        self.threads = threads_each * workers
        setup = Setup(splits, decoder, threads_each, self.memory.descriptor)
        self.process, self.links = start_workers(setup, workers)
        self.receiver = threading.Thread(target=self._receive, name="loading", daemon=True)
        self.receiver.start()

    def submit(self, split: int, request: BatchRequest) -> int:
        """Send a batch to the workers and return its number."""
        count, pixels = len(request.indices), request.pixels
        slot = self.memory.take(count * pixels * pixels * 3)
        shares = even_shares(count, len(self.links))
        batch = RemoteBatch(self.splits[split], request, self.memory.images(slot, count, pixels), len(shares))
        with self.lock:
            if self.failure is not None:
                raise self.failure
            number, self.batches = self.batches, self.batches + 1
            self.pending[number] = batch
        pickled = pickle.dumps(request)
        for link, (first, last) in zip(self.links, shares, strict=False):
            send(link, FillTask(number, split, pickled, slot.offset, first, last))
        return number

    def result(self, number: int) -> Batch:
        """Wait for a batch. Raises the error of a worker that filled it."""
        with self.lock:
            batch = self.pending[number]
        try:
            return batch.future.result()
        finally:
            with self.lock:
                if batch.missing_shares == 0:
                    self.pending.pop(number, None)

    def cancel(self, number: int) -> None:
        """Skip images of a batch that are not started. Its memory is in use until all workers have replied."""
        with self.lock:
            batch = self.pending.get(number)
            if batch is None or batch.missing_shares == 0:
                self.pending.pop(number, None)
                return
            batch.is_cancelled = True
        for link in self.links:
            send(link, FillTask(number, 0, b"", 0, 0, 0))

    def close(self) -> None:
        """End the workers by closing their sockets."""
        os.write(self.wake_writer, b".")
        self.receiver.join()
        for link in self.links:
            link.close()
        try:
            self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.wake_reader)
        os.close(self.wake_writer)
        self.memory.close()

    def _receive(self) -> None:
        """Handle replies, until `close` or the death of a worker."""
        while True:
            for ready in wait([self.wake_reader, *self.links]):
                if not isinstance(ready, Connection):
                    return
                try:
                    reply: Reply = pickle.loads(ready.recv_bytes())
                except (EOFError, OSError):
                    self._fail(worker_death(self.process))
                    return
                self._handle(reply)

    def _handle(self, reply: Reply) -> None:
        """Count a finished share. The last one completes the batch."""
        with self.lock:
            batch = self.pending[reply.number]
            batch.missing_shares -= 1
            is_complete = batch.missing_shares == 0
            if is_complete and batch.is_cancelled:
                del self.pending[reply.number]
        if reply.message is not None:
            batch.failure = batch.failure or UserError(reply.message)
        if reply.traceback is not None:
            batch.failure = batch.failure or RuntimeError(f"a process that decodes images failed:\n{reply.traceback}")
        if reply.mix_parameters is not None:
            batch.mix_parameters = MixParameters(*map(torch.from_numpy, reply.mix_parameters))
        if is_complete and not batch.is_cancelled:
            self._complete(batch)

    def _complete(self, batch: RemoteBatch) -> None:
        """Deliver a batch, or the error that prevents it."""
        images, batch.images = batch.images, None
        assert images is not None
        try:
            if batch.failure is not None:
                raise batch.failure
            if self.pin:
                images = empty_images(len(images), images.shape[-1], pin=True).copy_(images)
            batch.future.set_result(collate(batch.split, batch.request.indices, images, batch.mix_parameters))
        except Exception as error:  # such as torch's if memory runs out: `result` raises it
            batch.future.set_exception(error)

    def _fail(self, failure: Exception) -> None:
        """Raise this error in all `result` and `submit` from now on."""
        with self.lock:
            self.failure = failure
            incomplete = [batch for batch in self.pending.values() if batch.missing_shares]
        for batch in incomplete:
            batch.future.set_exception(failure)


def start_workers(setup: Setup, count: int) -> tuple[subprocess.Popen[bytes], list[Connection]]:
    """Start the process that forks the workers. Returns it and a socket to each worker.

    The setup is passed in a memory file, since it can be longer than a socket's buffer.
    """
    pairs = [socket.socketpair() for _ in range(count)]
    worker_ends = [pair[1].fileno() for pair in pairs]
    descriptor = os.memfd_create("recipe-setup", os.MFD_CLOEXEC)
    with open(descriptor, "wb") as file:
        pickle.dump(setup, file)
        file.flush()
        command = [sys.executable, "-c", BOOT, json.dumps(sys.path), *map(str, (descriptor, *worker_ends))]
        environment = os.environ | WORKER_ENVIRONMENT
        inherited = (descriptor, setup.memory, *worker_ends)
        with blocked(FROM_OUTSIDE):
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, pass_fds=inherited)
    for _, end in pairs:
        end.close()
    return process, [Connection(end.detach()) for end, _ in pairs]


def send(link: Connection, task: FillTask) -> None:
    """Send a task. The receiving thread notices a dead worker."""
    try:
        link.send_bytes(pickle.dumps(task))
    except OSError:
        return


def even_shares(count: int, workers: int) -> list[tuple[int, int]]:
    """First and last image (exclusive) of each share: as even as possible, none empty, at least one."""
    edges = [count * part // workers for part in range(workers + 1)]
    return [(first, last) for first, last in itertools.pairwise(edges) if first < last]


def worker_death(process: subprocess.Popen[bytes]) -> WorkerError:
    """The error for a worker that ended, with the reason."""
    try:
        code = process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        code = 1
    number = -code if code < 0 else code - SIGNAL_BASE
    is_signal = 0 < number < signal.NSIG
    cause = f"was ended by {signal.Signals(number).name}" if is_signal else f"ended with exit code {code}"
    advice = "perhaps memory ran out: fewer loader.workers or loader.prefetch_batches need less"
    return WorkerError(f"a process that decodes images {cause}; {advice}", SIGNAL_BASE + number if is_signal else code)


class WorkerLoader:
    """Batches of one split from a pool that several splits share."""

    def __init__(self, pool: WorkerPool, number: int, prefetch_batches: int) -> None:
        self.pool, self.number, self.prefetch_batches = pool, number, prefetch_batches
        self.split, self.decoder_name = pool.splits[number], pool.decoder.value
        self.threads, self.workers = pool.threads, len(pool.links)

    def load(self, requests: Iterable[BatchRequest]) -> Iterator[Batch]:
        yield from prefetch(map(self._submit, requests), self.prefetch_batches)

    def _submit(self, request: BatchRequest) -> PendingBatch:
        number = self.pool.submit(self.number, request)
        return PendingBatch(partial(self.pool.result, number), partial(self.pool.cancel, number))
