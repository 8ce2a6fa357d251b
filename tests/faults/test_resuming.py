"""Stopped, killed or damaged, and continued: the same bits, the same rows, no image twice and none left out."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipe.config.schema import Config
from recipe.errors import UserError
from recipe.models.checkpoint import checkpoint_files
from recipe.run.directory import Run
from recipe.run.records import TrainingRecord
from recipe.training import loop
from tests.builders.configs import compose_config
from tests.builders.ranks import spawn_ranks, use_next_port
from tests.builders.training import assert_same_tensors, last_state, train_killed_in_epoch
from tests.faults.inject import injected

Words = Callable[..., list[str]]
LONG = [
    "optimization.ema.decay=0.9",
    "optimization.epochs=2",
    "optimization.batch_size=12",  # 9 steps an epoch
    "trainer.log_every_steps=4",
    "trainer.timeout_seconds=60",
]
STEPS_PER_EPOCH = 9
CUTS = sorted(random.Random(4).sample(range(STEPS_PER_EPOCH + 1, 2 * STEPS_PER_EPOCH), 2))  # twice within epoch 2
NOT_TIMES = ("split", "epoch", "step", "images_seen", "loss", "top1_accuracy", "top5_accuracy", "learning_rate")


def train(config: Config) -> TrainingRecord | None:
    use_next_port()
    return loop.train(config)


def train_stopped(words: list[str], name: str, rank: int, step: int) -> None:
    """Train until that rank alone is asked to stop. Every process leaves with 75."""
    with injected(f"{name}@{rank}:{step}"), pytest.raises(SystemExit) as end:
        train(compose_config(*words))
    assert end.value.code == 75


def rows(words: list[str]) -> list[dict[str, Any]]:
    """Everything in the rows but times."""
    found = Run(compose_config(*words).run_dir).metric_rows()
    return [{name: row[name] for name in NOT_TIMES} for row in found]


def cut_and_compare(words: list[str], run_dir: str, rank: int, threads: int | None = None) -> TrainingRecord | None:
    """Cut twice within one epoch and once in its validation, continue, compare with an uninterrupted run."""
    whole, cut = [*words, f"run_dir={run_dir}/whole"], [*words, f"run_dir={run_dir}/cut"]
    train(compose_config(*whole))
    for step in CUTS:
        train_stopped(cut, "stop", rank, step)
    train_stopped(cut, "validation", 0, 2 * STEPS_PER_EPOCH)
    record = train(compose_config(*cut, *([f"loader.threads={threads}"] if threads else [])))
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


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [2, 3])
def test_f04_a_stopped_run_continues_bit_by_bit_on_several_processes(
    smoke: Words, tmp_path: Path, processes: int
) -> None:
    """The last rank alone is asked to stop. Three processes: two hide the order of a sum."""
    results = spawn_ranks(processes, exact_and_positions, smoke(*LONG), str(tmp_path), processes - 1)
    assert results[0] == ([None, True, True, True], [0, *(cut + 1 for cut in CUTS), 2 * STEPS_PER_EPOCH])
    assert results[1:] == [None] * (processes - 1)


def test_f05_a_stopped_run_continues_bit_by_bit_with_other_threads(smoke: Words, tmp_path: Path) -> None:
    record = cut_and_compare(smoke(*LONG), str(tmp_path), 0, threads=3)
    assert record is not None
    assert [session.is_exact for session in record.sessions] == [None, True, True, True]
    cost = record.epochs[1]
    assert 0 < cost.images_per_second * cost.seconds == pytest.approx(108, rel=0.02)  # every part of the epoch counts
    assert record.images_seen == 2 * 108


def images_of(words: list[str], fault_text: str | None) -> list[int]:
    """The images that this process trained on, in order, until it was stopped or done."""
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
            with injected(fault_text), pytest.raises(SystemExit):
                train(compose_config(*words))
    finally:
        loop.take_step = step
    return seen


@pytest.mark.slow
def test_f06_another_number_of_processes_continues_with_the_right_images_and_says_so(
    smoke: Words, tmp_path: Path
) -> None:
    words = smoke("optimization.epochs=1", "optimization.batch_size=12", "trainer.log_every_steps=4")
    by_two = spawn_ranks(2, images_of, words, "stop@1:5")
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


def test_f04_checkpoints_inside_an_epoch_come_when_asked_for_and_change_nothing(smoke: Words, tmp_path: Path) -> None:
    for run, words in (("often", ["trainer.save_every_steps=4", "trainer.keep_checkpoints=99"]), ("plain", [])):
        train(compose_config(*smoke(*LONG, *words, run=run)))
    steps = [int(path.stem.removeprefix("step-")) for path in checkpoint_files(tmp_path / "often" / "checkpoints")]
    assert steps == [4, 8, 9, 12, 16, 18]
    assert rows(smoke(run="often")) == rows(smoke(run="plain"))
    assert_same_tensors(last_state(smoke(run="often"))["model"], last_state(smoke(run="plain"))["model"])


def test_f08_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    smoke: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bit of the newest checkpoint is wrong: the one of the epoch before is used, and the end is the same."""
    whole, cut = (smoke("optimization.epochs=3", "optimization.batch_size=36", run=run) for run in ("whole", "cut"))
    loop.train(compose_config(*whole))
    train_killed_in_epoch(cut, 2, step_in_epoch=1)
    damage(checkpoint_files(tmp_path / "cut" / "checkpoints")[-1])
    record = loop.train(compose_config(*cut))
    assert record is not None
    assert [session.first_step for session in record.sessions] == [0, 3]
    assert "step-00000006.pt is damaged" in capsys.readouterr().err
    assert (tmp_path / "cut" / "checkpoints" / "step-00000006.pt.corrupt").exists()
    assert_same_tensors(last_state(whole)["model"], last_state(cut)["model"])
    assert rows(whole) == rows(cut)


def test_f08_where_all_checkpoints_are_damaged_training_does_not_start_over_in_silence(
    smoke: Words, tmp_path: Path
) -> None:
    words = smoke("optimization.epochs=2", "optimization.batch_size=36")
    train_killed_in_epoch(words, 1, step_in_epoch=1)
    damage(checkpoint_files(tmp_path / "run" / "checkpoints")[-1])
    for _ in range(2):
        with pytest.raises(UserError, match=r"no valid checkpoint is left .*trainer\.start_over=true"):
            loop.train(compose_config(*words))


def damage(path: Path) -> None:
    """Flip one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
