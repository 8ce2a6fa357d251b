"""Stopped at any step and continued: the same bits, the same rows, no image twice and none left out."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipe.checkpoint import checkpoint_files
from recipe.config import Config
from recipe.distributed import World
from recipe.records import TrainingRecord
from recipe.run import Run
from recipe.training import loop
from recipe.training.stopping import ECHO_SECONDS, STEPS_BETWEEN_LOOKS, Stopped, StopWish, stop_wish
from tests.conftest import compose_config
from tests.training.test_loop import assert_same_tensors, last_state
from tests.worlds import meet_elsewhere, run_world

Words = Callable[..., list[str]]
LONG = [
    "optimization.averaging.decay=0.9",
    "optimization.epochs=2",
    "optimization.batch_size=12",  # 9 steps an epoch
    "trainer.log_every_steps=4",
    "trainer.timeout_seconds=60",
]
STEPS_PER_EPOCH = 9
CUTS = sorted(random.Random(4).sample(range(STEPS_PER_EPOCH + 1, 2 * STEPS_PER_EPOCH), 2))  # twice within epoch 2
NOT_TIMES = ("split", "epoch", "step", "images_seen", "loss", "top1_accuracy", "top5_accuracy", "learning_rate")


@contextmanager
def fault(text: str) -> Iterator[None]:
    os.environ["FAULT"] = text  # not monkeypatch: this also runs in spawned processes
    try:
        yield
    finally:
        del os.environ["FAULT"]


def train(config: Config) -> TrainingRecord | None:
    meet_elsewhere()
    return loop.train(config)


def train_stopped(words: list[str], name: str, rank: int, step: int) -> None:
    """Train until that rank alone is told to stop; every process leaves with 75."""
    with fault(f"{name}@{rank}:{step}"), pytest.raises(SystemExit) as end:
        train(compose_config(*words))
    assert end.value.code == 75


def rows(words: list[str]) -> list[dict[str, Any]]:
    """Everything in the rows but times."""
    found = Run(compose_config(*words).run_dir).metric_rows()
    return [{name: row[name] for name in NOT_TIMES} for row in found]


def cut_and_compare(words: list[str], run_dir: str, rank: int, threads: int | None = None) -> TrainingRecord | None:
    """Cut twice within one epoch and once in its validation, continue; compare with an uninterrupted run."""
    whole, cut = [*words, f"run_dir={run_dir}/whole"], [*words, f"run_dir={run_dir}/cut"]
    train(compose_config(*whole))
    for step in CUTS:
        train_stopped(cut, "stop", rank, step)
    train_stopped(cut, "validation", 0, 2 * STEPS_PER_EPOCH)
    record = train(compose_config(*cut, *([f"trainer.data_threads={threads}"] if threads else [])))
    before, after = last_state(whole), last_state(cut)
    for part in ("model", "average", "optimizer"):
        assert_same_tensors(before[part], after[part])
    assert rows(whole) == rows(cut)
    return record


def exact_and_positions(words: list[str], run_dir: str, rank: int) -> tuple[list[bool | None], list[int]] | None:
    record = cut_and_compare(words, run_dir, rank)
    if record is None:
        return None
    return [session.is_exact for session in record.sessions], [session.first_step for session in record.sessions]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("processes", [2, 3])
def test_a_stopped_run_continues_bit_by_bit_on_several_processes(smoke: Words, tmp_path: Path, processes: int) -> None:
    """The last rank alone is told; three processes, because two hide the order of a sum."""
    results = run_world(processes, exact_and_positions, smoke(*LONG), str(tmp_path), processes - 1)
    assert results[0] == ([None, True, True, True], [0, *(cut + 1 for cut in CUTS), 2 * STEPS_PER_EPOCH])
    assert results[1:] == [None] * (processes - 1)


def test_a_stopped_run_continues_bit_by_bit_with_other_threads(smoke: Words, tmp_path: Path) -> None:
    record = cut_and_compare(smoke(*LONG), str(tmp_path), 0, threads=3)
    assert record is not None
    assert [session.is_exact for session in record.sessions] == [None, True, True, True]
    cost = record.epochs[1]
    assert 0 < cost.images_per_second * cost.seconds == pytest.approx(108, rel=0.02)  # every part of the epoch counts
    assert record.images_seen == 2 * 108


def images_of(words: list[str], fault_text: str | None) -> list[int]:
    """Which images this process trained on, in order, until it was stopped or done."""
    seen: list[int] = []
    step = loop.take_step

    def noting_step(training: Any, batches: Any) -> None:
        seen.extend(int(index) for batch in batches for index in batch.indices)
        step(training, batches)

    loop.take_step = noting_step
    try:
        if fault_text is None:
            train(compose_config(*words))
        else:
            with fault(fault_text), pytest.raises(SystemExit):
                train(compose_config(*words))
    finally:
        loop.take_step = step
    return seen


def test_another_number_of_processes_continues_with_the_right_images_and_says_so(smoke: Words, tmp_path: Path) -> None:
    words = smoke("optimization.epochs=1", "optimization.batch_size=12", "trainer.log_every_steps=4")
    by_two = run_world(2, images_of, words, "stop@1:5")
    by_one = images_of(words, None)
    images = [image for part in by_two for image in part] + by_one
    assert len(by_two[0]) == len(by_two[1]) == 6 * 6
    assert sorted(images) == list(range(108))
    run = Run(tmp_path / "run")
    record = run.read(TrainingRecord)
    assert record is not None
    assert [session.is_exact for session in record.sessions] == [None, False]
    assert "the number of processes was 2, is 1" in record.sessions[1].note
    seen = [row["images_seen"] for row in run.metric_rows()]
    assert seen == [48, 96, 108, 108]


def test_checkpoints_inside_an_epoch_come_when_asked_for_and_change_nothing(smoke: Words, tmp_path: Path) -> None:
    for run, words in (("often", ["trainer.save_every_steps=4", "trainer.keep_checkpoints=99"]), ("plain", [])):
        train(compose_config(*smoke(*LONG, *words, run=run)))
    steps = [int(path.stem.removeprefix("step-")) for path in checkpoint_files(tmp_path / "often" / "checkpoints")]
    assert steps == [4, 8, 9, 12, 16, 18]
    assert rows(smoke(run="often")) == rows(smoke(run="plain"))
    assert_same_tensors(last_state(smoke(run="often"))["model"], last_state(smoke(run="plain"))["model"])


# ---- signals ----------------------------------------------------------------------------------------


def world(size: int = 1, kind: str = "cpu") -> World:
    return World(0, size, 0, size, torch.device(kind), "none")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_noted_and_the_handlers_are_put_back(number: int) -> None:
    before = signal.getsignal(number)
    with stop_wish(world()) as wish:
        wish.look(1)
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped):
            wish.look(2)
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_stops_at_once() -> None:
    with stop_wish(world()):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_launchers_echo_of_ctrl_c_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    clock = [100.0]
    monkeypatch.setattr("recipe.training.stopping.time.monotonic", lambda: clock[0])
    wish = StopWish(world())
    wish.note(signal.SIGINT, None)
    clock[0] += 0.3
    wish.note(signal.SIGINT, None)
    clock[0] += ECHO_SECONDS
    with pytest.raises(KeyboardInterrupt):
        wish.note(signal.SIGINT, None)


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with stop_wish(world()) as wish:
            os.kill(os.getpid(), signal.SIGUSR1)
            wish.look(1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_several_accelerators_are_not_waited_for_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    wish = StopWish(world(8, "cuda"))
    asked: list[int] = []
    monkeypatch.setattr(StopWish, "_is_agreed", lambda self: bool(asked.append(1)))
    for step in range(1, 10 * STEPS_BETWEEN_LOOKS + 1):
        wish.look(step)
    assert len(asked) == 10


@pytest.mark.parametrize("images", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_process_looks_equally_often_while_it_validates(images: int, processes: int) -> None:
    """Some processes have one batch more; a look of theirs alone would wait for ever."""
    batches = len(np.array_split(np.arange(images), np.arange(4, images, 4)))
    common = batches // processes
    looks = []
    for rank in range(processes):
        wish = StopWish(world())
        wish.look = lambda count, counts=(counts := []): counts.append(count)  # type: ignore[method-assign,misc]
        assert len(list(wish.watched(range(rank, batches, processes), common))) in (common, common + 1)
        looks.append(counts)
    assert all(counts == looks[0] for counts in looks)
