"""A worker process: receives tasks, fills shares of batches, replies.

One process imports everything and then forks, so that workers start fast and share memory. `recipe.data.worker_pool`
starts and stops it. Signals are blocked here, since the training process decides when to save and to end. Tasks come
through a socket. A worker ends with its socket, so a killed training process leaves no workers. Pixels are written to
shared memory. GPUs are hidden from workers.
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
from recipe.data.batches import BatchRequest
from recipe.data.decoding import build_decoder
from recipe.data.images import silence_decoders
from recipe.data.loader import IMAGES_PER_TASK, fill_images
from recipe.data.shards import Split
from recipe.distributed import PARENT_DEATH_SIGNAL
from recipe.errors import UserError

SIGNAL_BASE = 128  # plus the signal: exit code of a process that a signal ended, as in shells


class Setup(NamedTuple):
    """The first message to a worker."""

    splits: Sequence[Split]
    decoder: Decoder
    threads: int
    memory: int  # descriptor of the memory of the batches


class FillTask(NamedTuple):
    """A share of a batch to fill. A share without images cancels the batch."""

    number: int  # of the batch
    split: int
    request: bytes  # a pickled `BatchRequest`
    offset: int  # of the batch in the shared memory, bytes
    first: int  # image of the batch. The share with image 0 also draws the mix parameters
    last: int  # exclusive


class Reply(NamedTuple):
    """A finished or failed share, with a message for the user or the traceback of an unexpected error."""

    number: int
    message: str | None = None
    traceback: str | None = None
    mix_parameters: list[NDArray[Any]] | None = None


def batch_at(memory: mmap.mmap, offset: int, count: int, pixels: int) -> NDArray[np.uint8]:
    """u1[count, pixels, pixels, 3] in the shared memory."""
    return np.ndarray((count, pixels, pixels, 3), np.uint8, memory, offset)


class Worker:
    """Fills shares of batches with a few threads."""

    def __init__(self, link: Connection, setup: Setup) -> None:
        self.link, self.memory_descriptor, self.splits = link, setup.memory, setup.splits
        self.send_lock = threading.Lock()
        self.memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.decoder = build_decoder(setup.decoder)
        self.cancelled: set[int] = set()
        self.pool = ThreadPoolExecutor(setup.threads, "decode", initializer=torch.set_num_threads, initargs=(1,))

    def serve(self) -> None:
        """Take tasks until the socket ends."""
        while True:
            task: FillTask = pickle.loads(self.link.recv_bytes())
            if task.first == task.last:
                self.cancelled.add(task.number)
            else:
                self.begin(task)

    def begin(self, task: FillTask) -> None:
        """Pass a share to the threads. The last to finish replies."""
        request: BatchRequest = pickle.loads(task.request)
        starts = range(task.first, task.last, IMAGES_PER_TASK)
        share = WorkerShare(self, task, request, self.images(task, request), len(starts))
        for first in starts:
            self.pool.submit(share.fill, first, min(first + IMAGES_PER_TASK, task.last))

    def images(self, task: FillTask, request: BatchRequest) -> Tensor:
        """The task's batch in shared memory, uint8 [N, 3, pixels, pixels]. Maps added memory first."""
        count, pixels = len(request.indices), request.pixels
        if task.offset + count * pixels * pixels * 3 > len(self.memory):
            self.memory = mmap.mmap(self.memory_descriptor, os.fstat(self.memory_descriptor).st_size)
        return torch.from_numpy(batch_at(self.memory, task.offset, count, pixels)).permute(0, 3, 1, 2)

    def reply(self, reply: Reply) -> None:
        """Send a reply. Thread-safe."""
        with self.send_lock:
            self.link.send_bytes(pickle.dumps(reply))


class WorkerShare:
    """The part of one batch that one worker fills."""

    def __init__(self, worker: Worker, task: FillTask, request: BatchRequest, images: Tensor, parts: int) -> None:
        self.worker, self.task, self.request, self.images = worker, task, request, images
        self.missing_parts = parts
        self.lock = threading.Lock()
        self.failure: Reply | None = None

    def fill(self, first: int, last: int) -> None:
        """Fill images `first` to `last` (exclusive), unless the batch was cancelled or has failed."""
        number, worker, failure = self.task.number, self.worker, None
        try:
            if self.failure is None and number not in worker.cancelled:
                fill_images(self.images, self.request, worker.splits[self.task.split], worker.decoder, first, last)
        except UserError as error:
            failure = Reply(number, message=str(error))
        except BaseException:
            failure = Reply(number, traceback=traceback.format_exc())
        with self.lock:
            self.failure = self.failure or failure
            self.missing_parts -= 1
            is_last = self.missing_parts == 0
        if is_last:
            worker.reply(self.failure or self.success())
            worker.cancelled.discard(number)

    def success(self) -> Reply:
        """The reply to a filled share, with the batch's mix parameters if it has image 0."""
        number = self.task.number
        if self.task.first > 0 or number in self.worker.cancelled:
            return Reply(number)
        try:
            parameters = self.request.mix_parameters()
        except BaseException:
            return Reply(number, traceback=traceback.format_exc())
        return Reply(number, mix_parameters=parameters and [tensor.numpy() for tensor in parameters])


def main(setup_descriptor: int, *links: int) -> None:
    """Fork a worker for each socket, and wait for them. All imports are done once, here.

    If a worker fails, this process ends with its exit code. If this process ends, the kernel kills the workers.
    """
    with open(setup_descriptor, "rb") as file:
        file.seek(0)
        setup = pickle.load(file)
    assert threading.active_count() == 1, "only a process without threads may fork"
    silence_decoders()
    gc.freeze()
    children = {fork_worker(setup, links, link) for link in links}
    for link in links:
        os.close(link)
    while children:
        child, status = os.wait()
        children.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code != 0:
            os._exit(code if code > 0 else SIGNAL_BASE - code)
    os._exit(0)


def fork_worker(setup: Setup, links: Sequence[int], own: int) -> int:
    """Fork a worker for one socket. It closes the others: an open copy would hide their end."""
    parent = os.getpid()
    if child := os.fork():
        return child
    end_with(parent)
    for link in links:
        if link != own:
            os.close(link)
    try:
        Worker(Connection(own), setup).serve()
    except (EOFError, ConnectionError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def end_with(parent: int) -> None:
    """Have the kernel end this process with its parent."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)
