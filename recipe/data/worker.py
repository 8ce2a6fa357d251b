"""The life of the processes that decode: told what to fill, they fill it, and say so.

One process imports everything and then divides, so that many start as fast as one and share what they do not write to.
It is started by `recipe.data.processes`, which alone may stop it: signals are blocked here, since the training process
decides when to save and to end. What each is sent comes through its socket, and the end of that socket is its own end:
a training process that is killed leaves none of these behind. Pixels go into memory that all map, never through a
socket. None of them sees a GPU.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipe.config.schema import Decoder
from recipe.data.decoding import build_decoder
from recipe.data.images import silence_decoders
from recipe.data.loading import IMAGES_PER_TASK, Filling, Order
from recipe.data.shards import Split
from recipe.distributed import PARENT_DEATH_SIGNAL
from recipe.errors import UserError

SIGNAL_BASE = 128  # exit codes of processes that a signal ended, as shells count


class Start(NamedTuple):
    """What a process is told at first."""

    splits: Sequence[Split]
    decoder: Decoder
    threads: int
    memory: int  # the descriptor of the memory that holds the batches


class Job(NamedTuple):
    """A share of a batch; `number` counts batches, and a share without images cancels the batch."""

    number: int
    split: int
    order: bytes  # a pickled `Order`
    offset: int  # of the batch in the shared memory, bytes
    first: int  # image of the batch
    last: int  # not included; whoever has the first image also draws what the device does


class Done(NamedTuple):
    """A share is finished; what went wrong is said in a sentence, or with a traceback where nobody expected it."""

    number: int
    sentence: str | None = None
    traceback: str | None = None
    draws: list[NDArray[Any]] | None = None


def batch_at(memory: mmap.mmap, offset: int, count: int, pixels: int) -> NDArray[np.uint8]:
    """u1[count, pixels, pixels, 3] in the shared memory."""
    return np.ndarray((count, pixels, pixels, 3), np.uint8, memory, offset)


class Worker:
    """Fills shares of batches with a few threads."""

    def __init__(self, link: Connection, start: Start) -> None:
        self.link, self.memory_descriptor = link, start.memory
        self.sending = threading.Lock()
        self.map = mmap.mmap(-1, mmap.PAGESIZE)
        decoder = build_decoder(start.decoder)
        self.fillings = [Filling(split, decoder) for split in start.splits]
        self.cancelled: set[int] = set()
        self.pool = ThreadPoolExecutor(start.threads, "decode", initializer=torch.set_num_threads, initargs=(1,))

    def serve(self) -> None:
        """Take jobs until the socket ends."""
        while True:
            job: Job = pickle.loads(self.link.recv_bytes())
            if job.first == job.last:
                self.cancelled.add(job.number)
            else:
                self.begin(job)

    def begin(self, job: Job) -> None:
        """Hand a share to the threads; the last to finish tells."""
        order: Order = pickle.loads(job.order)
        images = self.images(job, order)
        tasks = range(job.first, job.last, IMAGES_PER_TASK)
        share = Share(self, job, order, images, len(tasks))
        for first in tasks:
            self.pool.submit(share.fill, first, min(first + IMAGES_PER_TASK, job.last))

    def images(self, job: Job, order: Order) -> Tensor:
        """The batch of a job, uint8 [N, 3, pixels, pixels], in the memory of both; maps what was added to it."""
        count, pixels = len(order.indices), order.pixels
        if job.offset + count * pixels * pixels * 3 > len(self.map):
            self.map = mmap.mmap(self.memory_descriptor, os.fstat(self.memory_descriptor).st_size)
        return torch.from_numpy(batch_at(self.map, job.offset, count, pixels)).permute(0, 3, 1, 2)

    def tell(self, done: Done) -> None:
        """Say that a share is finished."""
        with self.sending:
            self.link.send_bytes(pickle.dumps(done))


class Share:
    """What one process fills of one batch."""

    def __init__(self, worker: Worker, job: Job, order: Order, images: Tensor, tasks: int) -> None:
        self.worker, self.job, self.order, self.images, self.tasks = worker, job, order, images, tasks
        self.finishing = threading.Lock()
        self.failure: Done | None = None

    def fill(self, first: int, last: int) -> None:
        """Some images, unless the batch was cancelled or failed meanwhile."""
        failure = None
        try:
            if self.failure is None and self.job.number not in self.worker.cancelled:
                self.worker.fillings[self.job.split].fill(self.images, self.order, first, last)
        except UserError as error:
            failure = Done(self.job.number, sentence=str(error))
        except BaseException:
            failure = Done(self.job.number, traceback=traceback.format_exc())
        with self.finishing:
            self.failure = self.failure or failure
            self.tasks -= 1
            is_last = self.tasks == 0
        if is_last:
            self.worker.tell(self.failure or self.drawn())
            self.worker.cancelled.discard(self.job.number)

    def drawn(self) -> Done:
        """The share is finished; with what the device does to the batch, if that was asked for."""
        number = self.job.number
        if self.job.first > 0 or number in self.worker.cancelled:
            return Done(number)
        try:
            draws = self.order.view.draws()
        except BaseException:
            return Done(number, traceback=traceback.format_exc())
        return Done(number, draws=None if draws is None else [tensor.numpy() for tensor in draws])


def main(told: int, *links: int) -> None:
    """Become one process for each socket, and wait for them; all imports are done once, here.

    A process that ends in another way than by the end of its socket takes the others with it, and its exit code is
    the one that the training process sees; when this process is killed, the kernel kills the others.
    """
    with open(told, "rb") as file:
        file.seek(0)
        start = pickle.load(file)
    assert threading.active_count() == 1, "only a process without threads may divide"
    silence_decoders()
    gc.freeze()
    children = {fork_worker(start, links, link) for link in links}
    for link in links:
        os.close(link)
    while children:
        child, status = os.wait()
        children.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            os._exit(code if code > 0 else SIGNAL_BASE - code)
    os._exit(0)


def fork_worker(start: Start, links: Sequence[int], own: int) -> int:
    """A process that serves one of the sockets and has closed the others, whose ends it must not hide."""
    parent = os.getpid()
    if child := os.fork():
        return child
    end_with(parent)
    for link in links:
        if link != own:
            os.close(link)
    try:
        Worker(Connection(own), start).serve()
    except (EOFError, ConnectionError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def end_with(parent: int) -> None:
    """Have the kernel end this process when its parent is gone."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it went in between
        os._exit(1)
