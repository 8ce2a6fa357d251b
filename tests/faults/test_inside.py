"""Faults inside training: a full disk, numbers that are none, a process that hangs, a kill while one saves."""

from __future__ import annotations

import faulthandler
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from recipe.data.batches import Batch
from recipe.distributed import World
from recipe.errors import DiskError, HangError, NonFiniteError, UserError
from recipe.models import checkpoint
from recipe.models.checkpoint import checkpoint_files, load_checkpoint, newest_checkpoint, save_checkpoint
from recipe.run.directory import Run
from recipe.run.metric_rows import Row
from recipe.training import checkpointing, loop, metric_log
from recipe.training.build import Training
from recipe.training.metric_log import MetricLogger, append
from recipe.training.watchdog import Watchdog
from tests.builders.configs import compose_config
from tests.builders.ranks import spawn_ranks
from tests.builders.training import state_of
from tests.faults.inject import injected

Words = Callable[..., list[str]]


def disk_full_at(monkeypatch: pytest.MonkeyPatch, attempts: set[int]) -> list[int]:
    """Make those attempts to save (from 1) fail; gives the steps at which was tried."""
    tried: list[int] = []

    def saving(directory: Path, step: int, content: checkpoint.State) -> Path:
        tried.append(step)
        if len(tried) in attempts:
            raise DiskError("cannot write the checkpoint: No space left on device")
        return save_checkpoint(directory, step, content)

    monkeypatch.setattr(checkpointing, "save_checkpoint", saving)
    return tried


def test_f09_a_disk_that_is_full_for_a_while_costs_a_warning(
    smoke: Words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault 9: two failures, a success, two failures, the last one."""
    words = smoke("trainer.save_every_steps=1", "optimization.batch_size=36", "optimization.epochs=2")
    tried = disk_full_at(monkeypatch, {1, 2, 4, 5})
    loop.train(compose_config(*words))
    assert tried == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().err.count("training goes on") == 4
    files = checkpoint_files(Run(compose_config(*words).run_dir).checkpoints)
    assert [path.stem for path in files] == ["step-00000003", "step-00000006"]


def test_f09_three_failures_in_a_row_stop_and_keep_what_was_saved(
    smoke: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 9."""
    words = smoke("trainer.save_every_steps=1", "optimization.batch_size=36", "optimization.epochs=2")
    tried = disk_full_at(monkeypatch, {2, 3, 4})
    with pytest.raises(DiskError, match="No space left") as stopped:
        loop.train(compose_config(*words))
    assert stopped.value.exit_code == 74
    assert tried == [1, 2, 3, 4]
    (path,) = checkpoint_files(Run(compose_config(*words).run_dir).checkpoints)
    assert load_checkpoint(path)["progress"]["step"] == 1


def row(step: int) -> Row:
    numbers = {name: 0.5 for name in ("loss", "top1_accuracy", "top5_accuracy", "images_per_second", "seconds")}
    return Row(
        split="train", epoch=1, step=step, images_seen=step, learning_rate=0.1, data_wait_fraction=None, **numbers
    )


def events_of(run: Run) -> list[int]:
    """The steps of the TensorBoard events, as TensorBoard reads them."""
    (file,) = run.tensorboard.iterdir()
    return [event.step for event in EventFileLoader(str(file)).Load() if event.HasField("summary")]


@contextmanager
def files_of_at_most(limit: int) -> Iterator[None]:
    """The kernel cuts a write off there, in the middle of a line, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("smaller", ["metrics", "events"])
def test_f09_rows_that_the_disk_refuses_wait_and_none_is_lost_or_written_twice(
    smaller: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For either of the two files: half a line and half an event are cut off again."""
    run = Run(tmp_path / "run")
    with closing(MetricLogger(run, 1, 9, 1, 0, 0)) as logger:
        logger.write(row(1))
        full = logger.written_bytes if smaller == "metrics" else logger.event_bytes
        with files_of_at_most(full + 30):
            for step in (2, 3):
                logger.write(row(step))
            with pytest.raises(DiskError, match="cannot write"):
                logger.flush(durably=True)
        assert capsys.readouterr().err.count("rows wait") == 1
        assert [found["step"] for found in run.metric_rows()][:1] == [1]
        logger.write(row(4))
        assert "3 rows that had waited for the disk are written" in capsys.readouterr().err
        logger.write(row(5))
    assert [found["step"] for found in run.metric_rows()] == [1, 2, 3, 4, 5] == events_of(run)


def rows_refused(monkeypatch: pytest.MonkeyPatch, attempts: set[int]) -> None:
    """Make those attempts to write rows (from 1) fail."""
    tried: list[int] = []

    def appending(path: Path, content: bytes, at: int, durably: bool) -> None:
        if path.name == "metrics.jsonl":
            tried.append(at)
            if len(tried) in attempts:
                raise DiskError("cannot write metrics.jsonl: No space left on device")
        append(path, content, at, durably)

    monkeypatch.setattr(metric_log, "append", appending)


def test_f09_a_disk_that_is_full_for_a_while_costs_no_row(smoke: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and the checkpoint after them are refused together, then come together."""
    words = ("trainer.log_every_steps=1", "optimization.batch_size=36", "optimization.epochs=2")
    steps = [1, 2, 3, 3, 4, 5, 6, 6]
    rows_refused(monkeypatch, {2, 3, 4, 5})  # the rows of steps 2, 3 and of validation, the checkpoint of step 3
    loop.train(compose_config(*smoke(*words)))
    run = Run(compose_config(*smoke(*words)).run_dir)
    assert [found["step"] for found in run.metric_rows()] == steps == events_of(run)
    assert [path.stem for path in checkpoint_files(run.checkpoints)] == ["step-00000006"]


def test_f09_no_checkpoint_comes_before_its_rows(smoke: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    words = smoke("trainer.save_every_steps=1", "optimization.batch_size=36", "optimization.epochs=2")
    rows_refused(monkeypatch, set(range(1, 99)))
    with pytest.raises(DiskError, match=r"metrics\.jsonl.*No space left"):
        loop.train(compose_config(*words))
    assert not checkpoint_files(Run(compose_config(*words).run_dir).checkpoints)


def with_free_space(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(checkpointing.shutil, "disk_usage", lambda path: _Usage(count))  # type: ignore[attr-defined]


class _Usage(NamedTuple):
    free: int


@pytest.mark.parametrize("more", [(), ("optimization.ema.decay=0.9",), ("optimization.optimizer=lamb",)])
def test_f09_the_disk_is_asked_for_room_before_training(
    more: tuple[str, ...], smoke: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for one checkpoint too few stops the run. The message has the size of a checkpoint."""
    words = smoke("optimization.epochs=1", "trainer.save_every_steps=2", "optimization.learning_rate=0.01", *more)
    with_free_space(monkeypatch, 1000)
    with pytest.raises(DiskError, match=r"has 0\.0 MiB left, too little for 5 checkpoints of ") as stopped:
        loop.train(compose_config(*words))
    size = float(str(stopped.value).split("5 checkpoints of ")[1].split()[0])
    with_free_space(monkeypatch, int(4.9 * size * 2**20))
    with pytest.raises(DiskError, match=r"5 checkpoints of .* keep fewer"):
        loop.train(compose_config(*words))
    with_free_space(monkeypatch, int(5.1 * size * 2**20))
    loop.train(compose_config(*words))
    (first, *_) = checkpoint_files(Run(compose_config(*words).run_dir).checkpoints)
    assert first.stat().st_size / 2**20 == pytest.approx(size, rel=0.25)


def test_f09_no_warning_when_the_disk_has_room(
    smoke: Words, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_free_space(monkeypatch, 2**40)
    loop.train(compose_config(*smoke("optimization.epochs=1")))
    assert "warning" not in capsys.readouterr().err


def test_f17_a_run_directory_that_vanishes_ends_the_run_at_its_next_checkpoint(
    smoke: Words, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One sentence, and nothing half empty is made in its place."""
    words = smoke("optimization.batch_size=36", "optimization.epochs=3", "trainer.log_every_steps=1")
    step = loop.take_step

    def vanishing_step(training: Training, batches: list[Batch]) -> None:
        if training.progress.step == 4:
            (tmp_path / "run").rename(tmp_path / "elsewhere")
        step(training, batches)

    monkeypatch.setattr(loop, "take_step", vanishing_step)
    with pytest.raises(DiskError, match="run has vanished; nothing more can be saved there"):
        loop.train(compose_config(*words))
    assert not (tmp_path / "run").exists()
    (path,) = checkpoint_files(tmp_path / "elsewhere" / "checkpoints")
    assert load_checkpoint(path)["progress"]["step"] == 3


def kind_of_failure(words: list[str], fault: str) -> str:
    try:
        with injected(fault):
            loop.train(compose_config(*words))
    except Exception as error:
        code = error.exit_code if isinstance(error, UserError) else "unexpected"
        return f"{code}: {error}"
    return "nothing"


@pytest.mark.slow
def test_f10_nan_stops_every_process_and_spoils_no_checkpoint(smoke: Words, tmp_path: Path) -> None:
    """Fault 10: rank 1 alone is poisoned in the second epoch."""
    words = smoke("optimization.batch_size=36", "optimization.epochs=2", "trainer.log_every_steps=1")
    found = spawn_ranks(2, kind_of_failure, words, "nan@1:4")
    assert all(text.startswith(f"{NonFiniteError.exit_code}: ") and "step 5" in text for text in found), found
    (path,) = checkpoint_files(tmp_path / "run" / "checkpoints")
    assert load_checkpoint(path)["progress"]["step"] == 3


def seconds_until_noticed(words: list[str], fault: str) -> tuple[float, str]:
    """The process of that rank sleeps. Returns the seconds and the output of each."""
    if fault.startswith(f"hang@{os.environ['RANK']}"):
        time.sleep = _short_sleep  # type: ignore[assignment]
    started = time.monotonic()
    return kind_of_failure(words, fault), time.monotonic() - started


def _short_sleep(seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
    sleep(min(seconds, 8))  # so that the test ends


@pytest.mark.slow
def test_f11_a_process_that_hangs_is_noticed_and_all_stacks_are_kept(smoke: Words, tmp_path: Path) -> None:
    """The frame that hangs is named, and the one in which the other waits. An earlier hang's stacks stay."""
    hangs = Run(tmp_path / "run").hangs
    hangs.mkdir(parents=True)
    (hangs / "rank-0.txt").write_text("earlier\n")
    words = smoke("optimization.batch_size=36", "trainer.timeout_seconds=4")
    found = spawn_ranks(2, seconds_until_noticed, words, "hang@1:2")
    text, seconds = found[0]
    assert text.startswith(f"{HangError.exit_code}: ")
    assert "rank-*.txt" in text
    assert seconds < 40
    waiting, hanging = ((hangs / f"rank-{rank}.txt").read_text() for rank in range(2))
    assert waiting.startswith("earlier\n")
    assert "_short_sleep" in hanging
    assert "in strike" in hanging
    assert "_short_sleep" not in waiting
    assert "in fit" in waiting


def watched_training(words: list[str]) -> str:
    """The end of training, and the number of alarms."""
    alarms: list[float] = []
    alarm = faulthandler.dump_traceback_later
    faulthandler.dump_traceback_later = lambda seconds, **more: alarms.append(seconds)
    text = kind_of_failure(words, "none")
    faulthandler.dump_traceback_later = alarm
    return f"{text}, {len(alarms)} alarms of {set(alarms)} s"


@pytest.mark.slow
def test_f11_nothing_is_left_where_nothing_hung(smoke: Words, tmp_path: Path) -> None:
    """And an alarm is not set at every step."""
    words = smoke("optimization.batch_size=36", "trainer.timeout_seconds=600")
    found = spawn_ranks(2, watched_training, words)
    assert found == ["nothing, 1 alarms of {480.0} s"] * 2
    assert not Run(tmp_path / "run").hangs.exists()


def test_f11_a_process_that_was_slow_takes_its_stacks_back(tmp_path: Path) -> None:
    watch = Watchdog(World(0, 2, 0, 2, torch.device("cpu"), "gloo"), Run(tmp_path / "run"), timeout_seconds=0.1)
    for is_slow in (True, False):
        watch.progressed()
        time.sleep(0.5 if is_slow else 0.01)
        assert watch.has_fired == is_slow
    watch.close(is_clean=True)
    assert not Run(tmp_path / "run").hangs.exists()


@pytest.mark.parametrize("writes", [0, 1, 2, 3])
def test_f07_a_kill_while_a_checkpoint_of_the_same_step_is_replaced_leaves_a_valid_one(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 7: a run stopped in its validation, continued, is saved again under the same step."""
    old, new = state_of(1), state_of(2)
    save_checkpoint(tmp_path, 4, old)
    renames: list[Path] = []
    rename = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if len(renames) == writes:
            raise KeyboardInterrupt
        renames.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt) if writes < 3 else nullcontext():
        save_checkpoint(tmp_path, 4, new)
    monkeypatch.undo()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert torch.equal(found["model"]["w"], (old if writes < 2 else new)["model"]["w"])
