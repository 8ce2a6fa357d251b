"""Faults inside training: a full disk, numbers that are none, a process that hangs, a kill while one saves."""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from recipe import checkpoint
from recipe.checkpoint import checkpoint_files, load_checkpoint, newest_checkpoint, save_checkpoint
from recipe.distributed import World
from recipe.errors import DiskError, HangError, NonFiniteError, UserError
from recipe.run import Run
from recipe.training import loop, state
from recipe.training.hanging import HangWatch
from tests.conftest import compose_config
from tests.worlds import run_world

Words = Callable[..., list[str]]


def disk_full_at(monkeypatch: pytest.MonkeyPatch, attempts: set[int]) -> list[int]:
    """Make those attempts to save (from 1) fail; gives the steps at which was tried."""
    tried: list[int] = []

    def saving(directory: Path, step: int, content: checkpoint.State) -> Path:
        tried.append(step)
        if len(tried) in attempts:
            raise DiskError("cannot write the checkpoint: No space left on device")
        return save_checkpoint(directory, step, content)

    monkeypatch.setattr(state, "save_checkpoint", saving)
    return tried


def test_a_disk_that_is_full_for_a_while_costs_a_warning(
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


def test_three_failures_in_a_row_stop_and_keep_what_was_saved(smoke: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 9."""
    words = smoke("trainer.save_every_steps=1", "optimization.batch_size=36", "optimization.epochs=2")
    tried = disk_full_at(monkeypatch, {2, 3, 4})
    with pytest.raises(DiskError, match="No space left") as stopped:
        loop.train(compose_config(*words))
    assert stopped.value.exit_code == 74
    assert tried == [1, 2, 3, 4]
    (path,) = checkpoint_files(Run(compose_config(*words).run_dir).checkpoints)
    assert load_checkpoint(path)["progress"]["step"] == 1


def kind_of_failure(words: list[str], fault: str) -> str:
    os.environ["FAULT"] = fault
    try:
        loop.train(compose_config(*words))
    except Exception as error:
        code = error.exit_code if isinstance(error, UserError) else "unexpected"
        return f"{code}: {error}"
    return "nothing"


def test_numbers_that_are_none_stop_every_process_and_spoil_no_checkpoint(smoke: Words, tmp_path: Path) -> None:
    """Fault 10: rank 1 alone is poisoned in the second epoch."""
    words = smoke("optimization.batch_size=36", "optimization.epochs=2", "trainer.log_every_steps=1")
    found = run_world(2, kind_of_failure, words, "nan@1:4")
    assert all(text.startswith(f"{NonFiniteError.exit_code}: ") and "step 5" in text for text in found), found
    (path,) = checkpoint_files(tmp_path / "run" / "checkpoints")
    assert load_checkpoint(path)["progress"]["step"] == 3


def seconds_until_noticed(words: list[str], fault: str) -> tuple[float, str]:
    """The process of that rank sleeps; how long each takes to end, and what it says."""
    if fault.startswith(f"hang@{os.environ['RANK']}"):
        time.sleep = _short_sleep  # type: ignore[assignment]
    started = time.monotonic()
    return kind_of_failure(words, fault), time.monotonic() - started


def _short_sleep(seconds: float, sleep: Callable[[float], None] = time.sleep) -> None:
    sleep(min(seconds, 8))  # so that the test ends


def test_f11_a_process_that_hangs_is_noticed_and_all_stacks_are_kept(smoke: Words, tmp_path: Path) -> None:
    """The frame that hangs is named, so is what the other one waits in; an earlier hang's stacks stay."""
    hangs = Run(tmp_path / "run").hangs
    hangs.mkdir(parents=True)
    (hangs / "rank-0.txt").write_text("earlier\n")
    words = smoke("optimization.batch_size=36", "trainer.timeout_seconds=4")
    found = run_world(2, seconds_until_noticed, words, "hang@1:2")
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
    """How training ends, and how often the alarm was set."""
    alarms: list[float] = []
    alarm = faulthandler.dump_traceback_later
    faulthandler.dump_traceback_later = lambda seconds, **more: alarms.append(seconds)
    text = kind_of_failure(words, "none")
    faulthandler.dump_traceback_later = alarm
    return f"{text}, {len(alarms)} alarms of {set(alarms)} s"


def test_f11_nothing_is_left_where_nothing_hung(smoke: Words, tmp_path: Path) -> None:
    """And an alarm is not set at every step."""
    words = smoke("optimization.batch_size=36", "trainer.timeout_seconds=600")
    found = run_world(2, watched_training, words)
    assert found == ["nothing, 1 alarms of {480.0} s"] * 2
    assert not Run(tmp_path / "run").hangs.exists()


def test_f11_a_process_that_was_slow_takes_its_stacks_back(tmp_path: Path) -> None:
    watch = HangWatch(World(0, 2, 0, 2, torch.device("cpu"), "gloo"), Run(tmp_path / "run"), timeout_seconds=0.1)
    for is_slow in (True, False):
        watch.progressed()
        time.sleep(0.5 if is_slow else 0.01)
        assert watch.has_fired == is_slow
    watch.close(is_clean=True)
    assert not Run(tmp_path / "run").hangs.exists()


@pytest.mark.parametrize("writes", [0, 1, 2, 3])
def test_a_kill_while_a_checkpoint_of_the_same_step_is_replaced_leaves_a_valid_one(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 7: a run stopped in its validation, continued, is saved again under the same step."""
    save_checkpoint(tmp_path, 4, {"content": "old"})
    renames: list[Path] = []
    rename = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if len(renames) == writes:
            raise KeyboardInterrupt
        renames.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt) if writes < 3 else nullcontext():
        save_checkpoint(tmp_path, 4, {"content": "new"})
    monkeypatch.undo()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found["content"] == ("old" if writes < 2 else "new")
