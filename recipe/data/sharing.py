"""Several processes, of one node or of many, share the shards of a data set: torchrun ... preprocess.py

Each makes the shards whose number, modulo the number of processes, is its rank; rank 0 lists and checks the raw data
before, and merges the notes afterwards. They meet in the data directory and nowhere else, on any file system that all
of them see: each writes a small file of its own there every few seconds and reads that of rank 0 (which reads all). A
process that fails says why in its file; one whose file stands still is lost. Files that an earlier launch left say
nothing: every process draws a token, and counts on rank 0 only once rank 0 has read it and repeats it.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from recipe.config.identity import differences
from recipe.data.packing import WORK, Task
from recipe.errors import HangError, UserError, how_to_continue
from recipe.launcher import Launch
from recipe.records import Record, Setting, from_json, to_json
from recipe.run import shown_path, write_atomically

SIGNS = "ranks"  # the folder of the processes' files, inside the work folder
BEAT_SECONDS = 2.0
LOST_SECONDS = 180.0  # without a new sign; network file systems show a new file up to a minute late
PREPARING, MAKING, MADE, FAILED = "preparing", "making", "made", "failed"


class Plan(Record, frozen=True, kw_only=True):
    """What rank 0 found and wants: the others must come to the same shards."""

    settings: dict[str, Setting]
    archives: list[str]  # hashes
    shards_sha256: str  # over the plans of all shards


class Sign(Record, frozen=True, kw_only=True):
    """The file of one process."""

    token: str
    beat: int
    state: str
    why: str = ""  # it failed
    images: int = 0  # in shards that are finished, those of an earlier launch included
    fresh_images: int = 0
    processes: int = 0
    continued_shards: int = 0
    seen: dict[str, str]  # by rank 0: rank -> token
    plan: Plan | None = None  # by rank 0


class Team:
    """This process among its peers; alone, it waits for nobody and writes nothing."""

    def __init__(self, directory: Path, launch: Launch) -> None:
        self.folder = directory / WORK / SIGNS
        self.rank, self.size, self.on_this_node = launch.rank, launch.size, launch.local_size
        self.where = shown_path(directory)
        self.token, self.beat, self.state, self.why = secrets.token_hex(8), 0, PREPARING, ""
        self.images = self.fresh_images = self.processes = self.continued_shards = 0
        self.plan: Plan | None = None
        self.is_silent = False  # writes no more, since rank 0 is about to remove the folder
        self.is_over = False  # rank 0 has removed it
        self.signs: dict[int, Sign] = {}
        self.heard = dict.fromkeys(range(1, self.size) if self.rank == 0 else (0,), time.monotonic())
        self.leaving = threading.Event()
        self.beating = threading.Lock()
        self.thread = threading.Thread(target=self._keep_beating, daemon=True)

    def __enter__(self) -> Team:
        if self.size > 1:
            if self.rank == 0:
                for left in self.folder.glob("*.json"):  # by an earlier launch; who is there writes again
                    left.unlink(missing_ok=True)
            self._beat()
            self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_beating()
        if error is not None and self.size > 1:
            self.state, self.why, self.is_silent = FAILED, reason_of(error), False
            with suppress(UserError):
                self._beat()

    def share_of(self, tasks: list[Task]) -> list[Task]:
        """The shards that this process makes."""
        return tasks[self.rank :: self.size]

    def has_made(self, images: int) -> None:
        """So many images more; raises where another process failed meanwhile."""
        self.images += images
        self.fresh_images += images
        self.check()

    def total(self, count: str) -> int:
        """A count of all processes, as far as rank 0 has heard."""
        return int(getattr(self, count)) + sum(int(getattr(sign, count)) for sign in list(self.signs.values()))

    def check(self) -> None:
        """Raise where another process failed or no longer answers."""
        for rank, heard in list(self.heard.items()):
            sign = self.signs.get(rank)
            if sign is not None and sign.state == FAILED:
                raise UserError(sign.why if sign.why.startswith("rank ") else f"rank {rank} stopped: {sign.why}")
            if time.monotonic() - heard > LOST_SECONDS and (sign is None or sign.state != MADE):
                raise HangError(
                    f"rank {rank} has given no sign in {self.where} for {LOST_SECONDS:.0f} seconds: it ended, or that "
                    f"is not the same folder for all processes; {how_to_continue()} (finished shards are kept)"
                )

    # ---- rank 0 ---------------------------------------------------------------------------------------

    def announce(self, plan: Plan) -> None:
        """The raw data are in order, the others may begin."""
        self.plan, self.state = plan, MAKING

    def await_others(self, on_images: Callable[[int], None]) -> None:
        """Until all shards are made; `on_images` is told how many images are."""
        while not all(rank in self.signs and self.signs[rank].state == MADE for rank in self.heard):
            on_images(self.total("images"))
            self._rest()

    def stop_beating(self) -> None:
        """Before the folder is removed."""
        self.leaving.set()
        if self.thread.is_alive():
            self.thread.join()

    # ---- the others -----------------------------------------------------------------------------------

    def await_plan(self) -> Plan:
        """What rank 0 found, once it has."""
        while 0 not in self.signs or self.signs[0].plan is None:
            self._rest()
        self.state = MAKING
        found = self.signs[0].plan
        assert found is not None
        return found

    def await_end(self) -> None:
        """This one's shards are made: until rank 0 has merged them all."""
        self.state = MADE
        self._beat()
        while not self.is_over:
            self._rest()

    # ---- signs ----------------------------------------------------------------------------------------

    def _rest(self) -> None:
        self.check()
        time.sleep(BEAT_SECONDS / 10)

    def _keep_beating(self) -> None:
        while not self.leaving.wait(BEAT_SECONDS):
            with suppress(UserError):  # a disk that is full or away: the others see no sign, and this one's work fails
                self._beat()

    def _beat(self) -> None:
        with self.beating:
            for rank in self.heard:
                self._look_at(rank)
            if not self.is_silent:
                self.is_silent = self._write().state == MADE

    def _look_at(self, rank: int) -> None:
        """Read a sign: it is news where it changed, and that of rank 0 only where it knows this process."""
        path = self._path(rank)
        try:
            sign = from_json(path.read_bytes(), Sign, path.name)
        except FileNotFoundError:
            self.is_over = self.is_silent
            return
        except (OSError, UserError):
            return  # of another version, or the file system is away
        is_mine = self.rank == 0 or sign.seen.get(str(self.rank)) == self.token
        if is_mine and sign != self.signs.get(rank):
            self.signs[rank], self.heard[rank] = sign, time.monotonic()

    def _write(self) -> Sign:
        self.beat += 1
        sign = Sign(
            token=self.token,
            beat=self.beat,
            state=self.state,
            why=self.why,
            images=self.images,
            fresh_images=self.fresh_images,
            processes=self.processes,
            continued_shards=self.continued_shards,
            seen={str(rank): found.token for rank, found in self.signs.items()} if self.rank == 0 else {},
            plan=self.plan,
        )
        write_atomically(self._path(self.rank), to_json(sign))
        return sign

    def _path(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"


def reason_of(error: BaseException) -> str:
    """One sentence for the other processes."""
    if isinstance(error, UserError):
        return str(error)
    return str(error) or "Ctrl-C" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"


def require_same_plan(rank: int, first: Plan, mine: Plan) -> None:
    """All processes must make the same data set; raises `UserError` with the difference."""
    changed = differences(first.settings, mine.settings)
    if changed:
        raise UserError(
            f"rank {rank} has other settings than rank 0 ({'; '.join(changed)}): start all processes with one command"
        )
    if first.shards_sha256 != mine.shards_sha256:
        raise UserError(
            f"rank {rank} comes to other shards than rank 0: it sees other raw images (names, sizes, times of change), "
            "or has another Pillow; give all processes the same raw_dir and environment"
        )
