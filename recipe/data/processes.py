"""Batches from processes that decode straight into memory that they share with this one.

Threads that decode in the training process take Python's lock from the thread that launches kernels; here it is not
touched but for a message per batch and process. Every process fills its share of every batch; which and how is the
same code as in `recipe.data.loading`, so pixels, order and errors are too. The memory has no name and no file: it is
gone with the last process that maps it, and a small /dev/shm does not limit it. A batch on a CPU is this memory, taken
back when nobody holds it any more; for a GPU it is copied once more, to pinned memory of torch's own, which knows when
a copy to the device is over.
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
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import torch
from torch import Tensor

from recipe.config.schema import Decoder, TrainerConfig
from recipe.data.decoding import build_decoder
from recipe.data.loading import (
    Batch,
    Decoding,
    DecodingThreads,
    DeviceDraws,
    Order,
    Started,
    ahead,
    assembled,
    empty_images,
)
from recipe.data.shards import Split
from recipe.data.worker import SIGNAL_BASE, Done, Job, Start, batch_at
from recipe.distributed import World, threads_per_process
from recipe.errors import UserError, WorkerError
from recipe.run.signals import FROM_OUTSIDE, blocked

THREADS_PER_PROCESS = 2  # where nobody says: one waits for a disk while the other decodes
SECONDS_TO_END = 3.0  # of processes that were told to, before they are killed
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from recipe.data.worker import main; main(*map(int, sys.argv[2:]))"
)
SETTINGS = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@contextmanager
def open_decoding(
    splits: Sequence[Split], decoder: Decoder, trainer: TrainerConfig, world: World
) -> Iterator[list[Decoding]]:
    """Whatever makes the batches of these splits, as the configuration and the device want it; closed at the end."""
    processes = processes_for(trainer, world)
    with ExitStack() as held:
        if processes == 0:
            library = build_decoder(decoder)
            yield [held.enter_context(closing(DecodingThreads(split, library, trainer, world))) for split in splits]
        else:
            build_decoder(decoder)  # refuses here, in one sentence, what cannot be used
            threads = threads_per_process(trainer.data_threads, world)
            pool = held.enter_context(closing(Processes(splits, decoder, processes, threads, world)))
            yield [DecodingProcesses(pool, number, trainer.prefetch_batches) for number in range(len(splits))]


def processes_for(trainer: TrainerConfig, world: World) -> int:
    """How many processes decode for this one; 0: threads of its own."""
    asked = trainer.data_processes
    if sys.platform != "linux":
        if asked:
            raise UserError(f"trainer.data_processes={asked} needs Linux; use trainer.data_processes=0")
        return 0
    if asked is not None:
        return asked
    if world.device.type != "cuda":
        return 0
    return math.ceil(threads_per_process(trainer.data_threads, world) / THREADS_PER_PROCESS)


class Slot(NamedTuple):
    """A part of the shared memory, mapped here once and for all."""

    offset: int
    bytes: int
    memory: mmap.mmap


class SharedMemory:
    """Memory without a name, cut into slots that hold a batch each; it grows when more batches are held at once."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("recipe-batches", os.MFD_CLOEXEC)
        self.bytes = 0
        self.free: list[Slot] = []
        self.taking = threading.Lock()

    def take(self, size: int) -> Slot:
        """The smallest free slot of at least so many bytes, else a new one."""
        with self.taking:
            fitting = [slot for slot in self.free if slot.bytes >= size]
            if fitting:
                slot = min(fitting, key=lambda slot: slot.bytes)
                self.free.remove(slot)
                return slot
            offset, size = self.bytes, math.ceil(size / mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            self.bytes += size
            os.ftruncate(self.descriptor, self.bytes)
            return Slot(offset, size, mmap.mmap(self.descriptor, size, offset=offset))

    def images(self, slot: Slot, count: int, pixels: int) -> Tensor:
        """The batch in a slot, uint8 [count, 3, pixels, pixels]; the slot is free when all tensors on it are gone."""
        array = batch_at(slot.memory, 0, count, pixels)
        weakref.finalize(array, self.free.append, slot).atexit = False
        return torch.from_numpy(array).permute(0, 3, 1, 2)

    def close(self) -> None:
        """No more slots; batches that are held stay as they are."""
        os.close(self.descriptor)


@dataclass
class Pending:
    """A batch that is being made."""

    split: Split
    order: Order
    images: Tensor | None
    shares: int  # missing ones
    future: Future[Batch] = field(default_factory=Future)
    is_cancelled: bool = False
    failure: Exception | None = None
    draws: DeviceDraws | None = None


class Processes:
    """The processes that decode, and one thread here that hears from them."""

    def __init__(self, splits: Sequence[Split], decoder: Decoder, processes: int, threads: int, world: World) -> None:
        self.splits, self.decoder = splits, decoder
        self.pin = world.device.type == "cuda"
        self.memory = SharedMemory()
        self.pending: dict[int, Pending] = {}  # by number; until it is handed over, or cancelled and left by all
        self.batches = 0  # begun so far
        self.failure: Exception | None = None
        self.changing = threading.Lock()
        self.wake, self.woken = os.pipe()
        threads_each = math.ceil(threads / processes)
        self.threads = threads_each * processes
        start = Start(splits, decoder, threads_each, self.memory.descriptor)
        self.process, self.links = start_workers(start, processes)
        self.listening = threading.Thread(target=self._listen, name="loading", daemon=True)
        self.listening.start()

    def begin(self, split: int, order: Order) -> int:
        """Have the processes fill a batch; returns its number."""
        count, pixels = len(order.indices), order.pixels
        slot = self.memory.take(count * pixels * pixels * 3)
        shares = even_shares(count, len(self.links))
        pending = Pending(self.splits[split], order, self.memory.images(slot, count, pixels), len(shares))
        with self.changing:
            if self.failure is not None:
                raise self.failure
            number, self.batches = self.batches, self.batches + 1
            self.pending[number] = pending
        content = pickle.dumps(order)
        for link, (first, last) in zip(self.links, shares, strict=False):
            send(link, Job(number, split, content, slot.offset, first, last))
        return number

    def result(self, number: int) -> Batch:
        """Wait for a batch; raises what was raised while making it."""
        with self.changing:
            pending = self.pending[number]
        try:
            return pending.future.result()
        finally:
            with self.changing:
                if pending.shares == 0:
                    self.pending.pop(number, None)

    def cancel(self, number: int) -> None:
        """Leave out what has not begun of a batch that nobody will ask for; its memory stays until all have left it."""
        with self.changing:
            pending = self.pending.get(number)
            if pending is None or pending.shares == 0:
                self.pending.pop(number, None)
                return
            pending.is_cancelled = True
        for link in self.links:
            send(link, Job(number, 0, b"", 0, 0, 0))

    def close(self) -> None:
        """End the processes: closing their sockets is enough, since they have nothing to lose."""
        os.write(self.woken, b".")
        self.listening.join()
        for link in self.links:
            link.close()
        try:
            self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.wake)
        os.close(self.woken)
        self.memory.close()

    def _listen(self) -> None:
        """Note what is finished, until `close` or the death of a process."""
        while True:
            for ready in wait([self.wake, *self.links]):
                if not isinstance(ready, Connection):
                    return
                try:
                    done: Done = pickle.loads(ready.recv_bytes())
                except (EOFError, OSError):
                    self._fail(ended_unexpectedly(self.process))
                    return
                self._note(done)

    def _note(self, done: Done) -> None:
        """One share of a batch is finished; the last one finishes the batch."""
        with self.changing:
            pending = self.pending[done.number]
            pending.shares -= 1
            if pending.shares == 0 and pending.is_cancelled:
                del self.pending[done.number]
        if done.sentence is not None:
            pending.failure = pending.failure or UserError(done.sentence)
        if done.traceback is not None:
            pending.failure = pending.failure or RuntimeError(
                f"a process that decodes images failed:\n{done.traceback}"
            )
        if done.draws is not None:
            pending.draws = DeviceDraws(*map(torch.from_numpy, done.draws))
        if pending.shares == 0 and not pending.is_cancelled:
            self._finish(pending)

    def _finish(self, pending: Pending) -> None:
        """Hand a batch on, or why there is none."""
        images, pending.images = pending.images, None
        assert images is not None
        try:
            if pending.failure is not None:
                raise pending.failure
            if self.pin:
                images = empty_images(len(images), images.shape[-1], pin=True).copy_(images)
            pending.future.set_result(assembled(pending.split, pending.order.indices, images, pending.draws))
        except Exception as error:  # also of torch, for want of memory: it belongs to whoever waits
            pending.future.set_exception(error)

    def _fail(self, failure: Exception) -> None:
        """No batch will be finished any more: whoever waits or comes later hears why."""
        with self.changing:
            self.failure = failure
            unfinished = [pending for pending in self.pending.values() if pending.shares]
        for pending in unfinished:
            pending.future.set_exception(failure)


def start_workers(start: Start, count: int) -> tuple[subprocess.Popen[bytes], list[Connection]]:
    """The process that divides into those that decode, and a socket to each of them.

    What they are to know comes in memory of its own: it can be longer than a socket holds.
    """
    pairs = [socket.socketpair() for _ in range(count)]
    theirs = [pair[1].fileno() for pair in pairs]
    told = os.memfd_create("recipe-start", os.MFD_CLOEXEC)
    with open(told, "wb") as file:
        pickle.dump(start, file)
        file.flush()
        words = [sys.executable, "-c", BOOT, json.dumps(sys.path), *map(str, (told, *theirs))]
        environment = os.environ | SETTINGS
        descriptors = (told, start.memory, *theirs)
        with blocked(FROM_OUTSIDE):
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, env=environment, pass_fds=descriptors)
    for _, end in pairs:
        end.close()
    return process, [Connection(end.detach()) for end, _ in pairs]


def send(link: Connection, job: Job) -> None:
    """Send a job; a process that is gone is noticed where it is listened to."""
    try:
        link.send_bytes(pickle.dumps(job))
    except OSError:
        return


def even_shares(count: int, processes: int) -> list[tuple[int, int]]:
    """First and last image (not included) of each share: as even as can be, none empty, at least one."""
    edges = [count * part // processes for part in range(processes + 1)]
    return [(first, last) for first, last in itertools.pairwise(edges) if first < last]


def ended_unexpectedly(process: subprocess.Popen[bytes]) -> WorkerError:
    """What is said when one of the processes died."""
    try:
        code = process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        code = 1
    number = -code if code < 0 else code - SIGNAL_BASE
    is_signal = 0 < number < signal.NSIG
    how = f"was ended by {signal.Signals(number).name}" if is_signal else f"ended with exit code {code}"
    advice = "perhaps memory ran out: fewer trainer.data_processes or trainer.prefetch_batches need less"
    return WorkerError(f"a process that decodes images {how}; {advice}", SIGNAL_BASE + number if is_signal else code)


class StartedThere(Started):
    """A batch that other processes are making."""

    def __init__(self, pool: Processes, number: int) -> None:
        self.pool, self.number = pool, number

    def result(self) -> Batch:
        """Wait for the last image; raises what was raised while making it."""
        return self.pool.result(self.number)

    def cancel(self) -> None:
        """Leave out what has not begun."""
        self.pool.cancel(self.number)


class DecodingProcesses:
    """Makes batches of one split in processes that several splits share."""

    def __init__(self, pool: Processes, number: int, prefetch_batches: int) -> None:
        self.pool, self.number, self.prefetch_batches = pool, number, prefetch_batches
        self.split = pool.splits[number]
        self.threads, self.processes = pool.threads, len(pool.links)

    @property
    def decoder_name(self) -> str:
        """The library that decodes: nvimgcodec or pillow."""
        return self.pool.decoder.value

    def batches(self, orders: Iterable[Order]) -> Iterator[Batch]:
        """A batch for each order, in order, decoded ahead."""
        started = (StartedThere(self.pool, self.pool.begin(self.number, order)) for order in orders)
        yield from ahead(started, self.prefetch_batches)
