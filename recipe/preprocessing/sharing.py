"""Preprocessing on several processes of one launch, on one node or many: torchrun ... preprocess.py

Rank r makes every R-th shard. Rank 0 checks the raw data before and merges the notes afterwards. Ranks share the data
directory, and messages through torch's store. A gloo operation between rank 0 and the others is pending during the
work: it waits for slow ranks without limit, and fails at once if a rank ends, since its connection closes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

from recipe.config.identity import differences
from recipe.errors import HangError, UserError, WorkerError, how_to_continue
from recipe.preprocessing.shard_writer import Task
from recipe.run.launcher import Launch
from recipe.run.records import PreprocessingRecord, Record, Setting, from_json, to_json

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store, Work  # type: ignore[attr-defined]

NO_LIMIT = timedelta(days=3650)  # of an operation of gloo
STORE_POLL_SECONDS = 0.2
PLAN, IMAGES, RECORD, FAILURE = "plan", "images", "record", "failure"  # keys of the store


class Plan(Record, frozen=True, kw_only=True):
    """The plan of a rank. All ranks must have the same."""

    settings: dict[str, Setting]
    archives: list[str]  # hashes
    shards_sha256: str  # over the plans of all shards


class Team:
    """The ranks of this launch. A single process does not wait and does not import torch."""

    def __init__(self, launch: Launch) -> None:
        self.rank, self.size, self.on_this_node = launch.rank, launch.size, launch.local_size
        self.images = 0  # of this process
        self.is_announced = False
        self.store: Store
        self.ends: ProcessGroup  # of the operation that completes when rank 0 ends
        self.link: Work  # on rank 0: the counts of all ranks. On others: the end of rank 0

    def __enter__(self) -> Team:
        if self.size > 1:
            import torch.distributed as dist

            from recipe.distributed import join

            self.store = join(NO_LIMIT)
            ends = dist.new_group(backend="gloo", timeout=NO_LIMIT)
            assert isinstance(ends, dist.ProcessGroup)
            self.ends = ends
            self.link = self._gather((0, 0, 0)) if self.rank == 0 else self._broadcast_end()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        import torch.distributed as dist

        from recipe.distributed import leave_reason

        if error is None:
            dist.destroy_process_group()
        elif isinstance(error, KeyboardInterrupt):
            if (failure := self._reported_failure()) is not None:  # for which torchrun stops all ranks
                raise failure from None
        elif not isinstance(error, HangError | WorkerError):
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            leave_reason(reason)
            with suppress(RuntimeError):
                exit_code = getattr(error, "exit_code", 1)
                self.store.set(FAILURE, json.dumps([f"rank {self.rank} stopped: {reason}", exit_code]))

    def share_of(self, tasks: list[Task]) -> list[Task]:
        """The shards that this process makes."""
        return tasks[self.rank :: self.size]

    def count_images(self, images: int) -> int:
        """Count finished images of this process, and return the count of all processes."""
        self.images += images
        if self.size == 1:
            return self.images
        with self._failure_of_others():
            return int(self.store.add(IMAGES, images))

    def check(self) -> None:
        """Raise `WorkerError` (message and exit code) if another rank failed, `HangError` if it ended."""
        if self.size > 1 and self.link.is_completed():
            with self._failure_of_others():
                self.link.wait()

    # ---- rank 0 ---------------------------------------------------------------------------------------

    def announce(self, plan: Plan | None) -> None:
        """Send the plan to the other ranks, which start. None: nothing to make."""
        self.is_announced = True
        if self.size > 1:
            with self._failure_of_others():
                self.store.set(PLAN, "" if plan is None else to_json(plan).decode())

    def sum_counts(self, counts: tuple[int, int, int], on_images: Callable[[int], None]) -> tuple[int, ...]:
        """Wait for the shards of all ranks. Returns the sum of counts. `on_images` receives the number of images."""
        if self.size == 1:
            return counts
        while not self.link.is_completed():
            on_images(self.count_images(0))
            time.sleep(STORE_POLL_SECONDS)
        self.check()
        return tuple(sum(column) for column in zip(counts, *(tensor.tolist() for tensor in self.counts), strict=True))

    def end(self, record: PreprocessingRecord) -> None:
        """Send the record to the other ranks, which end."""
        if self.size > 1:
            if not self.is_announced:
                self.announce(None)
                self._wait_until(self.link.is_completed)
            self.store.set(RECORD, to_json(record).decode())
            self.link = self._broadcast_end()
            self._wait_until(self.link.is_completed)

    # ---- the others -----------------------------------------------------------------------------------

    def await_plan(self) -> Plan | None:
        """Wait for the plan of rank 0. None: nothing to make."""
        self._wait_until(lambda: self.store.check([PLAN]))
        content = self.store.get(PLAN)
        return from_json(content, Plan, "the plan of rank 0") if content else None

    def await_end(self, counts: tuple[int, int, int]) -> PreprocessingRecord:
        """Send this rank's counts and wait for the record of rank 0."""
        gathered = self._gather(counts)
        self._wait_until(lambda: gathered.is_completed() and self.link.is_completed())
        self.check()
        return from_json(self.store.get(RECORD), PreprocessingRecord, "the record of rank 0")

    # ---- messages -------------------------------------------------------------------------------------

    def _gather(self, counts: tuple[int, int, int]) -> Work:
        import torch
        import torch.distributed as dist

        self.counts = [torch.zeros(len(counts), dtype=torch.int64) for _ in range(self.size)]
        receive = self.counts if self.rank == 0 else None  # filled when the operation completes
        work = dist.gather(torch.tensor(counts), receive, dst=0, async_op=True)
        assert work is not None
        return work

    def _broadcast_end(self) -> Work:
        import torch
        import torch.distributed as dist

        work = dist.broadcast(torch.zeros(1), 0, group=self.ends, async_op=True)
        assert work is not None
        return work

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        with self._failure_of_others():
            while not condition():
                self.check()
                time.sleep(STORE_POLL_SECONDS)

    @contextmanager
    def _failure_of_others(self) -> Iterator[None]:
        """Raise the failure that caused an error of torch."""
        try:
            yield
        except RuntimeError as error:
            raise self._reported_failure() or HangError(
                f"another process of this launch ended; {how_to_continue()} (finished shards are kept)"
            ) from error

    def _reported_failure(self) -> WorkerError | None:
        with suppress(RuntimeError):
            if self.store.check([FAILURE]):
                message, exit_code = json.loads(self.store.get(FAILURE))
                return WorkerError(message, exit_code)
        return None


def check_same_plan(rank: int, first: Plan, own: Plan) -> None:
    """Raise `UserError` with the difference if this rank has another plan than rank 0."""
    changed = differences(first.settings, own.settings)
    if changed:
        raise UserError(
            f"rank {rank} has other settings than rank 0 ({'; '.join(changed)}): start all processes with one command"
        )
    if first.shards_sha256 != own.shards_sha256:
        raise UserError(
            f"rank {rank} has other shards than rank 0: it sees other raw images (names, sizes, times of change), "
            "or has another Pillow; give all processes the same raw_dir and environment"
        )
